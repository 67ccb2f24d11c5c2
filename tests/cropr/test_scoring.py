"""Figures of scores against hand-made tensors, and the series of an evaluation."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from cropr.data.layouts import write
from cropr.distributed import World
from cropr.tasks import TrainSpec, open_task
from cropr.tasks.base import EvaluationSettings
from cropr.tasks.classification.run import evaluate
from cropr.tasks.scoring import FIGURES, Scoring, auc, figures

SCORE = torch.tensor([[3.0, 2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("on_object", "expected"),
    [([1, 1, 0, 0], 1), ([0, 0, 1, 1], 0), ([1, 0, 0, 1], 0.5), ([0, 1, 0, 0], 2 / 3), ([1, 0, 1, 0], 3 / 4)],
)
def test_auc_counts_pairs_in_order(on_object, expected):
    assert auc(SCORE, torch.tensor([on_object]).bool()).item() == pytest.approx(expected)


def test_auc_of_ties_is_chance_and_needs_both_kinds():
    assert auc(torch.zeros(1, 4), torch.tensor([[True, False, False, True]])).item() == 0.5
    assert auc(SCORE.expand(2, -1), torch.tensor([[True] * 4, [False] * 4])).isnan().all()


def test_entropy_and_attention_by_hand():
    """Two queries: one sees all patches alike, the other one patch alone."""
    logits = torch.tensor([[[[0.0, 0.0, 0.0, 0.0], [0.0, 1e4, 0.0, 0.0]]]])
    found = figures(logits, 16, torch.tensor([[False, True, False, True]]), 2)
    assert found["entropy"].tolist() == [pytest.approx(0.5)]
    assert found["attention_on_object"].tolist() == [pytest.approx(100 * (2 / 4 + 1) / 2)]
    assert found["object_share"].tolist() == [50]
    p = torch.tensor([3 / 4, 1 / 4])
    found = figures(4 * p.log().view(1, 1, 1, 2), 16, None, 1)
    assert list(found) == ["entropy"]
    assert found["entropy"].item() == pytest.approx(-(p * p.log()).sum().item() / math.log(2))


def test_orders_differ_with_several_queries_and_agree_with_one():
    """The sum of raw logits follows the query of large values; each query counts alike after its softmax."""
    logits = torch.tensor([[[[9.0, 8.0, 0.0, 0.0], [0.0, -9.0, 1.0, 0.0]]]])
    on_object = torch.tensor([[True, False, True, False]])
    found = figures(logits, 1, on_object, 2)
    assert found["auc_sum"].item() == pytest.approx(1)  # 9, -1, 1, 0
    assert found["recall_sum"].item() == 100
    wide = figures(torch.cat((logits, torch.tensor([[[[0.0, 0.0, 0.0, 5.0]]]])), dim=2), 1, on_object, 2)
    assert wide["recall_sum"].item() == 50  # 9, -1, 1, 5
    single = figures(torch.randn(8, 1, 1, 20), 4, torch.rand(8, 20) < 0.4, 7)
    assert torch.equal(single["auc_sum"], single["auc_softmax"])
    assert torch.equal(single["recall_sum"], single["recall_softmax"])


def batches(count: int, start: int = 0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 32, 32, generator=generator)[start : start + count]
    return list(zip(images.split(4), torch.zeros(count, dtype=torch.long).split(4), strict=True))


OBJECTS = torch.rand(12, 16, generator=torch.Generator().manual_seed(1)) < 0.3


def test_recall_is_what_the_module_keeps():
    """At the first module all of the object is alive, so that recall is ``object_kept`` of the evaluation."""
    model = tiny.model(tiny.spec())
    series = evaluate(model, batches(12), objects=OBJECTS).series
    assert [row["block"] for row in series["scoring"]] == [1, 2]
    first = series["scoring"][0]
    assert first["recall_sum"] == pytest.approx(series["relevance"][1]["object_kept"])
    assert first["object_share"] == pytest.approx(series["relevance"][0]["kept_on_object"])
    assert set(first) == {"block", *FIGURES}
    assert series["scoring"][1]["object_share"] == pytest.approx(series["relevance"][1]["kept_on_object"])


def test_sums_of_processes_are_those_of_one():
    model = tiny.model(tiny.spec())
    whole = evaluate(model, batches(12), objects=OBJECTS).series["scoring"]
    parts: list[torch.Tensor] = []

    class First(World):
        def sum(self, values):
            parts.append(values)
            return values

    class Second(World):
        def sum(self, values):
            return values + parts.pop(0)

    evaluate(model, batches(4), EvaluationSettings(world=First()), OBJECTS[:4])
    joined = evaluate(model, batches(8, 4), EvaluationSettings(world=Second()), OBJECTS[4:]).series["scoring"]
    assert not parts
    for row, other in zip(whole, joined, strict=True):
        assert row == pytest.approx(other)


def test_only_models_with_queries_have_the_series():
    assert "scoring" not in evaluate(tiny.model(tiny.spec(prune__reducer="random")), batches(4)).series
    model = tiny.model(tiny.spec())
    deployed, own = evaluate(model.deploy(), batches(4)), evaluate(model, batches(4))
    assert "scoring" not in deployed.series
    assert [set(row) for row in own.series["scoring"]] == [{"block", "entropy", "aux_top1"}] * 2  # no truth


def test_nothing_stays_hooked():
    model = tiny.model(tiny.spec())
    scoring = Scoring(model)
    with scoring:
        assert any(reducer._forward_pre_hooks for reducer in model.reducers.values())
    assert not any(reducer._forward_pre_hooks for reducer in model.reducers.values())
    assert scoring.series(lambda sums: sums) == {"scoring": []}


@pytest.mark.parametrize("shown", [32, 48])
def test_segmentation_knows_objects_of_scenes_as_they_were_drawn(tmp_path, shown):
    host = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    scenes = {"image_size": shown, "train": 4, "val": 6, "distractors": [0, 1]}
    spec = TrainSpec.model_validate({
        "task": "segmentation", "model": {"name": "eva02_tiny_patch14_224", "args": host}, "recipe": {"epochs": 1},
        "prune": tiny.spec().prune.model_dump(), "data": {"image_size": 32, "num_classes": 11, "scenes": scenes},
    })  # fmt: skip
    write(spec.data.scenes, tmp_path, "ade20k")
    task = open_task(spec, tmp_path)
    rows = task.evaluate(task.build(), EvaluationSettings(batch_size=4)).series["scoring"]
    assert [row["block"] for row in rows] == [1, 2]
    for row in rows:
        assert ("auc_sum" in row) == (shown == 32)
        assert 0 < row["entropy"] <= 1
