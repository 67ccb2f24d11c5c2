"""Object detection and instance segmentation: specs and the entry; imports no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cropr.specs import ImagesSpec, Range, Spec
from cropr.tasks import Task


class DetDataSpec(ImagesSpec):
    """Images of object detection, in the layout of COCO 2017; defaults are those of the paper's EVA-02 detector."""

    image_size: int = Field(1536, ge=32)
    """Side of the square into which images are padded. Evaluation resizes the longer side to it."""
    num_classes: int = Field(80, ge=1)
    """Categories of the annotation files; the background is not one of them."""
    scale: Range = (0.1, 2.0)
    """Large-scale jitter: training images are resized to this range times the size that fits into the square."""
    hflip: float = Field(0.5, ge=0, le=1)


class DetModelSpec(Spec):
    """Windows of the encoder, pyramid and heads of a detector; defaults are those of EVA-02-L at 1536 px."""

    window: int = Field(16, ge=1)
    """Patches a side of the windows that blocks attend in."""
    global_blocks: tuple[int, ...] = (3, 6, 9, 12, 15, 18, 21, 24)
    """Blocks (from 1) that attend over all tokens; the last must be one."""
    scales: tuple[float, ...] = (4, 2, 1, 0.5)
    """Levels of the pyramid against the encoder's map; proposals have one more, the coarsest halved."""
    channels: int = Field(256, ge=8)
    """Of the pyramid and of the convolutions in the heads."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square root of the area of the anchors of each level, in pixels."""
    rpn_samples: int = Field(256, ge=2)
    """Anchors an image that proposals are trained on, half of them on objects at most."""
    proposals_train: tuple[int, int] = (2000, 1000)
    """Proposals of a level before suppression, and of an image after it."""
    proposals_test: tuple[int, int] = (1000, 1000)
    canonical_size: int = Field(224, ge=1)
    """A region of this many pixels a side is pooled from the level of stride ``canonical_stride``."""
    canonical_stride: int = Field(16, ge=1)
    stages: tuple[float, ...] = Field((0.5, 0.6, 0.7), min_length=1)
    """Overlap from which a region counts as an object, a stage each. ``(0.5,)`` is Mask R-CNN, the lighter choice."""
    rois: int = Field(512, ge=4)
    """Regions an image that the heads are trained on, a quarter of them on objects at most."""
    box_convs: int = Field(4, ge=0)
    box_width: int = Field(1024, ge=1)
    """Of the linear layer after the convolutions."""
    mask_convs: int = Field(4, ge=0)
    nms: Literal["soft", "plain"] = "soft"
    nms_threshold: float = Field(0.6, gt=0, le=1)
    """Overlap from which scores are lowered (soft, linearly) or boxes dropped (plain)."""
    min_score: float = Field(0.001, ge=0, lt=1)
    max_detections: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if len(self.anchor_sizes) != len(self.scales) + 1:
            counts = f"{len(self.anchor_sizes)} anchor_sizes for {len(self.scales)} scales"
            raise ValueError(f"{counts}: give one a scale, and one more")
        return self


FIGURES = {
    "ap": "AP",
    "ap50": "AP at IoU 0.5",
    "ap75": "AP at IoU 0.75",
    **{f"ap_{size}": f"AP, {size}" for size in ("small", "medium", "large")},
    **{f"ar{most}": f"AR, {most} an image" for most in (1, 10, 100)},
    **{f"ar_{size}": f"AR, {size}" for size in ("small", "medium", "large")},
}
"""pycocotools' twelve, in its order, with labels. AP: mean over IoU 0.50 to 0.95; AR: recall with 1, 10, 100 detections
an image and category; small: below 32^2 pixels of area, large: above 96^2."""

TASK = Task(
    name="detection",
    run="cropr.tasks.detection.run:Detection",
    show="cropr.tasks.detection.show:ObjectAnswers",
    data=DetDataSpec,
    detector=DetModelSpec,
    layout="coco",
    folders=("train2017", "val2017", "annotations"),
    metrics={f"{k}_{name}": f"{k.capitalize()} {label}" for name, label in FIGURES.items() for k in ("box", "mask")},
)
