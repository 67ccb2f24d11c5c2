"""The quantities that tables and figures show: their names, units and number of digits, and which of them a task has.

Everything that differs between classification, segmentation and detection stands here, so that the rest of the report
knows no task by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """How a quantity is written."""

    label: str
    unit: str = ""
    digits: int = 1
    signed: bool = False
    """Written with its sign: a difference."""
    timed: bool = False
    """Its interval is over the rounds of one process, not over seeds."""
    exact: bool = False
    """The same for every seed: written without interval, thousands apart."""

    def write(self, text: str) -> str:
        """A number's text with the unit behind it: ``85.3 %``, ``1.72x``."""
        return f"{text}x" if self.unit == "x" else f"{text} {self.unit}".rstrip()

    def places(self, value: float) -> int:
        """Digits behind the point: two more for throughputs so low that nothing would be left of them."""
        return self.digits + 2 * (self.unit == "images/s" and abs(value) < 0.1)

    @property
    def title(self) -> str:
        """``Top-1 (%)``: a column head or an axis label."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def difference(self) -> Quantity:
        """The same, against a baseline: points of a percentage."""
        return Quantity(f"{self.label}, difference", "points", self.digits, signed=True)


@dataclass(frozen=True)
class Measures:
    """What a task is judged by."""

    compared: tuple[str, ...]
    """Quantities in which rows are compared with their baseline; the first is the one that figures and claims mean."""
    paper: str
    """What the published numbers were made with."""
    binomial: bool = False
    """Whether the first is a share of images that are right or wrong, which alone gives it a sampling interval."""
    further: tuple[str, ...] = ()
    """Other quantities that readers of such tables expect."""
    median: bool = False
    """Whether the paper publishes the median over seeds, so that ours stands beside it."""

    @property
    def primary(self) -> str:
        """The quantity that figures and claims mean by accuracy."""
        return self.compared[0]


TASKS: dict[str, Measures] = {
    "classification": Measures(("top1",), "ViT-L/16 on ImageNet-1k", binomial=True, further=("top5", "loss")),
    "segmentation": Measures(("miou",), "EVA-02-L on ADE20k", median=True, further=("macc", "aacc")),
    "detection": Measures(
        ("box_ap", "mask_ap"),
        "EVA-02-L with Cascade Mask R-CNN on COCO",
        further=tuple(
            f"{kind}_ap{part}" for kind in ("box", "mask") for part in ("50", "75", "_small", "_medium", "_large")
        ),
    ),
}


def _average_precision() -> Iterator[tuple[str, Quantity]]:
    """COCO's twelve figures, of boxes and of masks, in percent."""
    for kind in ("box", "mask"):
        name = kind.capitalize()
        yield f"{kind}_ap", Quantity(f"{name} AP", "%")
        for part, words in (("50", " at IoU 0.5"), ("75", " at IoU 0.75")):
            yield f"{kind}_ap{part}", Quantity(f"{name} AP{words}", "%")
        for size in ("small", "medium", "large"):
            yield f"{kind}_ap_{size}", Quantity(f"{name} AP, {size}", "%")
        for most in (1, 10, 100):
            yield f"{kind}_ar{most}", Quantity(f"{name} AR, {most} an image", "%")
        for size in ("small", "medium", "large"):
            yield f"{kind}_ar_{size}", Quantity(f"{name} AR, {size}", "%")


ACCURACIES = {
    "top1": Quantity("Top-1", "%"),
    "top5": Quantity("Top-5", "%"),
    "miou": Quantity("mIoU", "%"),
    "macc": Quantity("Mean class accuracy", "%"),
    "aacc": Quantity("Pixel accuracy", "%"),
    **dict(_average_precision()),
}
"""All that says how often a model is right, of every task."""
COSTS = ("loss", "tpr", "step_ms", "parameters_training_only")
"""What stands beside accuracies where two runs are compared."""

QUANTITIES = {
    **ACCURACIES,
    "miou_median": Quantity("mIoU, median", "%"),
    "miou_logged": Quantity("mIoU, authors' logs", "%", digits=2),
    **{f"{name}_difference": ACCURACIES[name].difference for task in TASKS.values() for name in task.compared},
    "loss": Quantity("Validation loss", digits=3),
    "tpr": Quantity("TPR: patches pruned", "%", digits=0, exact=True),
    "speedup": Quantity("Speed-up", "x", digits=2, timed=True),
    "speedup_whole": Quantity("Speed-up, whole model", "x", digits=2, timed=True),
    "share_of_bound": Quantity("Share of the bound", "%", digits=0, timed=True),
    "images_per_s": Quantity("Throughput", "images/s", digits=2),
    "images_per_s_whole": Quantity("Throughput, whole model", "images/s", digits=2),
    "base_images_per_s": Quantity("Unpruned beside it", "images/s", digits=2),
    "base_images_per_s_whole": Quantity("Unpruned beside it, whole model", "images/s", digits=2),
    "gmacs": Quantity("Multiply-adds", "G", digits=2),
    "gmacs_linear": Quantity("Multiply-adds, linear layers only", "G"),
    "gmacs_change": Quantity("Multiply-adds, change", "%", digits=0, signed=True),
    "base_gmacs": Quantity("Multiply-adds, unpruned", "G", digits=2),
    "weights_mb": Quantity("Weights", "MB"),
    "base_weights_mb": Quantity("Weights, unpruned", "MB"),
    "weights_extra": Quantity("Weights, added when deployed", "%", digits=2, signed=True),
    "kept_on_object": Quantity("Kept patches on the object", "%"),
    "object_kept": Quantity("Object's patches kept", "%"),
    "amp_flash_gain": Quantity("Gain of mixed precision with flash attention", "x"),
    "unaligned_cost": Quantity("Cost of a token off an aligned count", "x"),
    "step_ms": Quantity("Training step", "ms", digits=0),
    "train_images_per_s": Quantity("Training", "images/s", digits=0),
    "train_speedup": Quantity("Training step, speed-up", "x", digits=2),
    "parameters": Quantity("Parameters", digits=0, exact=True),
    "parameters_training_only": Quantity("Parameters, training only", digits=0, exact=True),
}
"""Names as records and published tables use them."""

FORMULA = frozenset({"gmacs", "gmacs_linear", "base_gmacs"})
"""Counted by a formula, not measured: the kind ``predicted``."""


def quantity(name: str) -> Quantity:
    """The entry of ``name``; one that is not listed is written under its own name with two digits."""
    return QUANTITIES.get(name, Quantity(name.replace("_", " "), digits=2))
