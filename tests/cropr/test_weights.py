"""Weights on disk: strict loading, and the ways in which initial weights may differ from the model."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import model as new_model
from tiny_detector import CLASSES, HOSTS, SHAPE, SIZE, detector

from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import build_model
from cropr.tasks.segmentation.run import PrunedSegmenter
from cropr.training.checkpoint import load_initial, load_weights, save_weights


def test_weights_round_trip_and_a_misfit_lists_all_keys(tmp_path):
    model = new_model(tiny.spec())
    path = tmp_path / "weights.safetensors"
    save_weights(path, model)
    other = new_model(tiny.spec(), seed=1)
    load_weights(other, path)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True))

    tensors = load_file(path)
    tensors["surplus"] = tensors.pop("backbone.host.fc_norm.weight")
    tensors["backbone.host.head.weight"] = torch.zeros(5, 16)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(other, path)
    message = str(caught.value)
    assert "missing 1: backbone.host.fc_norm.weight" in message
    assert "unexpected 1: surplus" in message
    assert "backbone.host.head.weight [5, 16], in the model [3, 16]" in message


@pytest.fixture
def pretrained(tmp_path):
    """Weights of an unpruned model on a 4 x 4 grid, with 3 classes and average pooling."""
    model = new_model(tiny.spec(prune={"reducer": "none"}), seed=5)
    save_weights(tmp_path / "weights.safetensors", model)
    return tmp_path / "weights.safetensors", model.backbone.host.state_dict()


@pytest.mark.parametrize("names", ["unpruned run", "pruned run", "timm"])
def test_pruned_model_starts_from_the_host_of_any_file(pretrained, tmp_path, names):
    """Reducers stay as they are."""
    path, source = pretrained
    if names == "timm":
        save_file(source, path)
    elif names == "pruned run":
        other = new_model(tiny.spec(), seed=6)
        save_weights(path, other)
        source = other.backbone.host.state_dict()
    model = new_model(tiny.spec())
    reducers = {name: p.clone() for name, p in model.reducers.state_dict().items()}
    report = load_initial(model, path)
    assert set(report["loaded"]) == set(source)
    assert report["interpolated"] == report["fresh"] == report["ignored"] == []
    assert all(torch.equal(p, source[name]) for name, p in model.backbone.host.state_dict().items())
    assert all(torch.equal(p, reducers[name]) for name, p in model.reducers.state_dict().items())


def test_positions_are_interpolated_to_another_grid(pretrained):
    path, source = pretrained
    model = new_model(tiny.spec(), size=48)
    assert load_initial(model, path)["interpolated"] == ["pos_embed"]
    position = model.backbone.host.pos_embed
    assert position.shape == (1, 37, 16)
    torch.testing.assert_close(position[:, :1], source["pos_embed"][:, :1])
    torch.testing.assert_close(position[:, 1:].mean(), source["pos_embed"][:, 1:].mean(), atol=2e-3, rtol=0)


def test_classifier_starts_fresh_for_other_classes_and_the_final_norm_may_differ(pretrained, caplog):
    path, _ = pretrained
    model = new_model(tiny.spec(), classes=7)
    before = model.backbone.host.head.weight.clone()
    with caplog.at_level("INFO"):
        report = load_initial(model, path)
    assert set(report["fresh"]) == {"head.weight", "head.bias"}
    assert torch.equal(model.backbone.host.head.weight, before)
    assert "head.weight" in caplog.text
    report = load_initial(new_model(tiny.spec(model__args={**tiny.spec().model.args, "global_pool": "token"})), path)
    assert set(report["fresh"]) == {"norm.weight", "norm.bias"}
    assert set(report["ignored"]) == {"fc_norm.weight", "fc_norm.bias"}


def test_weights_of_another_depth_or_width_are_refused(pretrained, tmp_path):
    path, _ = pretrained
    for change, says in (
        ({"depth": 5}, r"missing 12: blocks\.4\.norm1\.weight"),
        ({"embed_dim": 32}, r"other shape .*pos_embed \[1, 17, 16\], in the model \[1, 17, 32\]"),
    ):
        with pytest.raises(ValueError, match=says):
            load_initial(new_model(tiny.spec(model__args={**tiny.spec().model.args, **change})), path)
    path.write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(new_model(tiny.spec()), path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(new_model(tiny.spec()), tmp_path / "absent.safetensors")


def test_a_segmenters_host_starts_a_detector_without_its_class_token_and_classifier(tmp_path):
    host = ModelSpec(name=HOSTS["eva"], args={**SHAPE, "global_pool": "avg"})
    donor = build_model(host, PruneSpec(), CLASSES + 1, SIZE, kind=PrunedSegmenter)
    save_weights(tmp_path / "weights.safetensors", donor)
    later = detector("eva")
    heads = [parameter.clone() for parameter in later.heads.parameters()]
    load_initial(later, tmp_path / "weights.safetensors")
    theirs = donor.backbone.host.state_dict()
    for name, tensor in later.backbone.host.state_dict().items():
        assert torch.equal(tensor, theirs[name][:, 1:] if name == "pos_embed" else theirs[name]), name
    assert all(torch.equal(*pair) for pair in zip(heads, later.heads.parameters(), strict=True))
