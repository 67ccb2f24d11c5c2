"""A model and a folder of images that train within a second."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cropr.data.imagenet import Split, TrainImages
from cropr.data.loading import TrainBatches
from cropr.pruning.model import PrunedViT
from cropr.tasks import TrainSpec
from cropr.tasks.base import build_model
from cropr.tasks.classification.run import Objective

CLASSES = 3


def write_folder(root: Path, train: int = 48, val: int = 12, size: int = 32) -> Path:
    """Noise images in class folders; the class shifts the mean of one colour, so that it can be learnt."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % CLASSES
            pixels = rng.integers(0, 180, (size, size, 3))
            pixels[..., label] += 75
            path = root / split / f"class_{label}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def spec(**changes: Any) -> TrainSpec:
    """A pruned ViT of depth 4 on 32 px; ``changes`` are dotted keys with ``__`` for the dot."""
    args = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "global_pool": "avg"}
    recipe = {"epochs": 2, "batch_size": 8, "base_lr": 0.03, "warmup_epochs": 0.5, "layer_decay": 0.9}
    values: dict[str, Any] = {
        "model": {"name": "vit_tiny_patch16_224", "args": args},
        "prune": {"reducer": "cropr", "schedule": {"constant": {"rate": 4}}, "fusion": "llf"},
        "data": {"image_size": 32, "num_classes": CLASSES, "crop_pct": 1.0, "augment": {"hflip": 0.5}},
        "recipe": recipe | {"precision": "fp32"},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return TrainSpec.model_validate(values)


def batches(split: Split, spec: TrainSpec, seed: int = 0) -> TrainBatches:
    """Training batches of a run."""
    return TrainBatches(TrainImages(split, spec.data, seed), spec.recipe.batch_size, seed)


def model(spec: TrainSpec, seed: int = 0, classes: int = CLASSES, size: int = 32) -> PrunedViT:
    """The model of a run with its initial weights."""
    torch.manual_seed(seed)
    return build_model(spec.model, spec.prune, classes, size)


class Signalled(Objective):
    """Sends this process a signal in step ``at``."""

    def __init__(self, data: Any, at: int, number: int) -> None:
        super().__init__(data)
        self.left, self.number = at, number

    def prepare(self, images, labels):
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        self.left -= 1
        return super().prepare(images, labels)


def log_lines(out: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; a line that is being written is left out."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def files(root: Path) -> dict[str, bytes]:
    """Relative path -> content, of all files but the record, which has a date, and the mark of a set."""
    found = (p for p in root.rglob("*") if p.is_file() and p.name not in ("record.json", "WRITTEN_BY_CROPR"))
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def equal(a: Any, b: Any) -> bool:
    """Whether two passes over batches of two tensors are the same, and not empty."""
    one, other = ([tensor for images, targets in batches for tensor in (images, targets)] for batches in (a, b))
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))
