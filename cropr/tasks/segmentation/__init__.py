"""Semantic segmentation: specs and the entry; imports no torch."""

from typing import Literal

from pydantic import Field

from cropr.specs import ImagesSpec, Range
from cropr.tasks import Task


class SegDataSpec(ImagesSpec):
    """Images of semantic segmentation, in the layout of ADE20k; defaults are the authors' (docs/authors_code.md)."""

    image_size: int = Field(512, ge=8)
    """Side of the square training crops, and of the windows of evaluation."""
    num_classes: int = Field(150, ge=2, le=254)
    """Classes to tell apart. In a file they are 1, 2, ...; 0 is not labelled, and ignored."""
    resize: Range = (0.5, 2.0)
    """Training: range of the shorter side, in units of ``image_size``; the longer side is at most four times it."""
    cat_max_ratio: float = Field(0.75, gt=0, le=1)
    """Training: largest share of one class in a crop. Ten crops are tried, the last is taken in any case."""
    hflip: float = Field(0.5, ge=0, le=1)
    photometric: bool = True
    """Training: random brightness, contrast, saturation and hue."""
    evaluation: Literal["single", "slide"] = "single"
    """``single``: the authors' way, the whole image shrunk into one window; ``slide``: windows over the image as it is,
    their logits averaged where they overlap."""
    stride: int | None = Field(None, ge=1)
    """Distance of windows that slide, in pixels; None: ``image_size``, as the authors have it (no overlap)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


TASK = Task(
    name="segmentation",
    run="cropr.tasks.segmentation.run:Segmentation",
    show="cropr.tasks.segmentation.show:MapAnswers",
    data=SegDataSpec,
    layout="ade20k",
    folders=("images/training", "images/validation", "annotations/training", "annotations/validation"),
    metrics={"miou": "mIoU", "macc": "Mean class accuracy", "aacc": "Pixel accuracy"},
)
