"""Counts that the authors published, or that their logs show; models on the meta device, so no weights are made."""

from __future__ import annotations

import pytest
import torch

from cropr.pruning.model import PrunedViT
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import build_model

MAE_L = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg", "pool_include_prefix": True})
R8 = {"constant": {"rate": 8}}


def _build(prune: PruneSpec) -> PrunedViT:
    with torch.device("meta"):
        return build_model(MAE_L, prune, num_classes=1000, image_size=224)


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_the_classification_models():
    assert _parameters(_build(PruneSpec())) == 304_326_632
    assert _parameters(_build(PruneSpec(reducer="cropr", schedule=R8, fusion="llf"))) == 511_651_288


def test_modules_and_their_size():
    model = _build(PruneSpec(reducer="cropr", schedule=R8, fusion="llf"))
    assert list(model.reducers) == [str(block) for block in range(1, 23)]
    assert {_parameters(module) for module in model.reducers.values()} == {9_423_848}
    assert list(_build(PruneSpec(reducer="cropr", schedule=R8)).reducers)[-1] == "23"


def test_token_traces_of_the_table():
    assert _build(PruneSpec(reducer="cropr", schedule=R8, fusion="llf")).token_trace[:3] == (197, 188, 180)
    stages = PruneSpec(reducer="cropr", schedule={"stages": {"at": {6: 50, 12: 50, 18: 50}}})
    assert sorted(set(_build(stages).token_trace)) == [47, 97, 147, 197]


def test_memory_of_the_deployed_model():
    model = _build(PruneSpec(reducer="cropr", schedule=R8, fusion="llf"))
    host = sum(tensor.numel() for tensor in model.backbone.host.state_dict().values())
    folded = sum(module.deploy().scorer.weight.numel() for module in model.reducers.values())
    assert folded / host == pytest.approx(7.4e-5, rel=0.01)


def test_the_last_block_of_a_pruned_model_has_no_drop_path():
    spec = ModelSpec(name="vit_tiny_patch16_224", drop_path=0.2)
    with torch.device("meta"):
        pruned = build_model(spec, PruneSpec(reducer="cropr", schedule=R8), 10, 224)
        plain = build_model(spec, PruneSpec(), 10, 224)
    assert isinstance(pruned.backbone.host.blocks[-1].drop_path1, torch.nn.Identity)
    assert isinstance(pruned.backbone.host.blocks[-1].drop_path2, torch.nn.Identity)
    assert pruned.backbone.host.blocks[-2].drop_path1.drop_prob > 0
    assert plain.backbone.host.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
