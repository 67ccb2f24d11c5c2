"""The quantities that tables and figures show: their names, units and number of digits, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """How a quantity is written."""

    label: str
    unit: str = ""
    digits: int = 1
    signed: bool = False
    """Written with its sign: a difference."""
    exact: bool = False
    """The same for every seed: written without interval, thousands apart."""

    def write(self, text: str) -> str:
        """A number's text with the unit behind it: ``85.3 %``, ``1.72x``."""
        return f"{text}x" if self.unit == "x" else f"{text} {self.unit}".rstrip()

    @property
    def title(self) -> str:
        """``Top-1 (%)``: a column head or an axis label."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


QUANTITIES = {
    "top1": Quantity("Top-1", "%"),
    "top5": Quantity("Top-5", "%"),
    "top1_difference": Quantity("Top-1, difference", "points", signed=True),
    "loss": Quantity("Validation loss", digits=3),
    "speedup": Quantity("Speed-up", "x", digits=2),
    "share_of_bound": Quantity("Share of the bound", "%", digits=0),
    "images_per_s": Quantity("Throughput", "images/s", digits=2),
    "base_images_per_s": Quantity("Throughput, unpruned", "images/s", digits=2),
    "gmacs": Quantity("Multiply-adds", "G", digits=2),
    "base_gmacs": Quantity("Multiply-adds, unpruned", "G", digits=2),
    "weights_mb": Quantity("Weights", "MB"),
    "base_weights_mb": Quantity("Weights, unpruned", "MB"),
    "weights_extra": Quantity("Weights, added when deployed", "%", digits=2, signed=True),
    "kept_on_object": Quantity("Kept patches on the object", "%"),
    "object_kept": Quantity("Object's patches kept", "%"),
    "step_ms": Quantity("Training step", "ms", digits=0),
    "train_images_per_s": Quantity("Training", "images/s", digits=0),
    "train_speedup": Quantity("Training step, speed-up", "x", digits=2),
    "parameters": Quantity("Parameters", exact=True),
    "parameters_training_only": Quantity("Parameters, training only", exact=True),
}


def quantity(name: str) -> Quantity:
    """The entry of ``name``; one that is not listed is written under its own name with two digits."""
    return QUANTITIES.get(name, Quantity(name.replace("_", " "), digits=2))
