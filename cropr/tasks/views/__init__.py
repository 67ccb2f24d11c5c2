"""What ``python -m cropr show`` asks of a task, by name. Training needs none of it, so it reruns nothing."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cropr.specs import TrainSpec

if TYPE_CHECKING:
    from cropr.tasks.views.base import View

_CLASSES = {
    "classification": ("cropr.tasks.views.classification", "ClassificationView"),
    "segmentation": ("cropr.tasks.views.segmentation", "SegmentationView"),
    "detection": ("cropr.tasks.views.detection", "DetectionView"),
}


def open_view(spec: TrainSpec, root: Path | None = None) -> View:
    """The view of a specification, its model without trained weights yet.

    Args:
        spec: of the run.
        root: the images, in the layout of the task; None where only pictures of the user's own are looked at.

    Raises:
        ValueError, FileNotFoundError: images that are not there, or others than the spec asks for.
    """
    module, name = _CLASSES[spec.task]
    found: type[View] = getattr(import_module(module), name)
    return found(spec, root)
