"""Image classification: specs and the entry; imports no torch."""

from typing import Literal

from pydantic import Field

from cropr.specs import ImagesSpec, Spec
from cropr.tasks import Task


class AugmentSpec(Spec):
    """Training transforms; the names are timm's."""

    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    auto_augment: str | None = None
    color_jitter: float | None = None
    erasing: float = Field(0.0, ge=0, le=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    smoothing: float = Field(0.0, ge=0, lt=1)


class DataSpec(ImagesSpec):
    """Images of classification and their transforms."""

    image_size: int = Field(224, ge=8)
    num_classes: int = Field(1000, ge=2)
    augment: AugmentSpec = AugmentSpec()
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Evaluation: shorter side resized to ``image_size / crop_pct``, then centre crop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


TASK = Task(
    name="classification",
    run="cropr.tasks.classification.run:Classification",
    show="cropr.tasks.classification.show:ClassAnswers",
    data=DataSpec,
    layout="imagenet",
    folders=("train", "val"),
    metrics={"top1": "Top-1", "top5": "Top-5"},
)
