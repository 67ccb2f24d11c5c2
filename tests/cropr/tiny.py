"""A model and a folder of images that train within a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cropr.data.imagenet import Split, TrainImages
from cropr.data.loading import TrainBatches
from cropr.training.specs import TrainSpec

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
    values: dict[str, Any] = {
        "model": {
            "name": "vit_tiny_patch16_224",
            "args": {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "global_pool": "avg"},
        },
        "prune": {"reducer": "cropr", "schedule": {"constant": {"rate": 4}}, "fusion": "llf"},
        "data": {"image_size": 32, "num_classes": CLASSES, "crop_pct": 1.0, "augment": {"hflip": 0.5}},
        "recipe": {
            "epochs": 2,
            "batch_size": 8,
            "base_lr": 0.03,
            "warmup_epochs": 0.5,
            "layer_decay": 0.9,
            "precision": "fp32",
        },
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
