"""A detection run from spec to record."""

from __future__ import annotations

import itertools
import os
import signal

import pytest
import tiny_coco
import tiny_detector
import torch
from safetensors.torch import load_file

from cropr.distributed import World
from cropr.tasks import TrainSpec
from cropr.tasks.detection import run
from cropr.tasks.detection.run import Detection
from cropr.training.loop import TrainingInterrupted, train

SPEC = TrainSpec(
    task="detection",
    model={"name": tiny_detector.HOSTS["eva"], "args": tiny_detector.SHAPE, "drop_path": 0.1},
    prune=tiny_detector.PRUNED,
    data={"image_size": 64, "num_classes": 3, "scale": (0.7, 1.5)},
    detector=tiny_detector.detector_spec(),
    recipe={"epochs": 2, "batch_size": 4, "accumulate": 2, "warmup_epochs": 0.5, "base_lr": 0.05}
    | {"precision": "fp32", "ema": 0.5},
)
"""Everything that draws or carries state: jitter, drop path, sampled regions, an average, micro-batches."""


@pytest.mark.model
def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch):
    root = tiny_coco.write_coco(tmp_path / "coco", train=15, val=5)
    record = train(SPEC, 0, root, tmp_path / "undisturbed", world=World())
    calls, prepare = itertools.count(), Detection.prepare

    def signalled(self, images, targets):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(Detection, "prepare", signalled)
        with pytest.raises(TrainingInterrupted, match="step_00000004"):
            train(SPEC, 0, root, tmp_path / "run", world=World())
    resumed = train(SPEC, 0, root, tmp_path / "run", world=World(), workers=1)
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("undisturbed", "run")]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    figures = {name: value for name, value in record["metrics"].items() if name.startswith(("box_", "mask_"))}
    assert len(figures) == 16  # of 24; the tiny set has small objects alone
    assert figures == {name: resumed["metrics"][name] for name in figures}
    assert record["tokens"] == [64, 36, 16, 16, 64]
    assert record["metrics"]["images"] == 24  # 12 have an object


def test_a_run_starts_from_a_published_detector(tmp_path, monkeypatch):
    task = Detection(SPEC, tiny_coco.write_coco(tmp_path / "coco", train=2, val=1))
    model, taken = task.build(), []
    monkeypatch.setattr(run, "load_eva02", lambda model, tensors: taken.append(tensors))
    torch.save({"model": {"backbone.net.pos_embed": torch.zeros(1, 2, 3)}}, tmp_path / "eva02.pth")
    assert task.load_published(model, tmp_path / "eva02.pth")
    assert list(taken[0]) == ["backbone.net.pos_embed"]
    assert not task.load_published(model, tmp_path / "weights.safetensors")
