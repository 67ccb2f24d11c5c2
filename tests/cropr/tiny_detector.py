"""A detector and images with objects that train within seconds."""

from typing import Any

import torch
from torch import Tensor, nn

from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks import TrainSpec
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.model import Detector, build_detector

SIZE = 64
CLASSES = 3
HOSTS = {"vit": "vit_tiny_patch16_224", "eva": "eva02_tiny_patch14_224"}
SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
PRUNED: dict[str, Any] = {"reducer": "cropr", "schedule": {"squares": {"at": {1: 6, 2: 4}}}, "fusion": "llf"}
"""64 -> 36 -> 16 tokens of an image, in windows of 2 x 2."""


def detector_spec(**changes: Any) -> DetModelSpec:
    """Heads of 16 channels for 64 px."""
    small: dict[str, Any] = {
        "window": 2, "global_blocks": (2, 4), "scales": (2, 1, 0.5), "channels": 16, "anchor_sizes": (12, 20, 32, 48),
        "rpn_samples": 32, "proposals_train": (100, 50), "proposals_test": (100, 30), "canonical_size": 32,
        "canonical_stride": 8, "rois": 24, "box_convs": 1, "box_width": 32, "mask_convs": 1, "max_detections": 10,
    }  # fmt: skip
    return DetModelSpec(**{**small, **changes})


DETECTION = TrainSpec(
    task="detection",
    model={"name": HOSTS["eva"], "args": SHAPE, "drop_path": 0.1},
    prune=PRUNED,
    data={"image_size": 64, "num_classes": 3, "scale": (0.7, 1.5)},
    detector=detector_spec(),
    recipe={"epochs": 2, "batch_size": 4, "accumulate": 2, "warmup_epochs": 0.5, "base_lr": 0.05}
    | {"precision": "fp32", "ema": 0.5},
)
"""Everything that draws or carries state: jitter, drop path, sampled regions, an average, micro-batches."""


def detector(
    host: str = "vit", prune: dict[str, Any] | None = None, size: Any = SIZE, spread: bool = True, **changes: Any
) -> Detector:
    """Weights are random by seed 0; ``spread``: those of the encoder far enough from initial values to matter."""
    torch.manual_seed(0)
    spec = PruneSpec(**(PRUNED if prune is None else prune))
    model = build_detector(ModelSpec(name=HOSTS[host], args=SHAPE), spec, detector_spec(**changes), CLASSES, size)
    for name, parameter in model.backbone.named_parameters():
        if spread and "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def images(sizes: list[tuple[int, int]], seed: int = 1) -> list[Tensor]:
    """Noise."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def scene(boxes: list[tuple[int, int, int, int]], labels: list[int], size: int = SIZE) -> tuple[Tensor, dict[str, Any]]:
    """Rectangles, each bright in the colour of its class, on faint noise; and the target."""
    generator = torch.Generator().manual_seed(len(boxes))
    image = 0.1 * torch.randn(3, size, size, generator=generator)
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom), label in zip(masks, boxes, labels, strict=True):
        mask[top:bottom, left:right] = 1
        image[label - 1, top:bottom, left:right] += 2
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks,
        "size": (size, size),
    }
    return image, target
