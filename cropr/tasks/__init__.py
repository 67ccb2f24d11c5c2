"""Tasks by name. Each is imported when it is opened: detection brings more than classification needs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cropr.specs import TrainSpec

if TYPE_CHECKING:
    from cropr.tasks.base import TaskRun

_CLASSES = {
    "classification": ("cropr.tasks.classification.run", "Classification"),
    "segmentation": ("cropr.tasks.segmentation.run", "Segmentation"),
    "detection": ("cropr.tasks.detection.run", "Detection"),
}


def open_task(spec: TrainSpec, root: Path) -> TaskRun:
    """The task of a specification, with its images.

    Raises:
        ValueError, FileNotFoundError: images that are not there, or others than the spec asks for.
    """
    return task_class(spec)(spec, root)


def task_class(spec: TrainSpec) -> type[TaskRun]:
    """Class of a specification's task."""
    module, name = _CLASSES[spec.task]
    found: type[TaskRun] = getattr(import_module(module), name)
    return found
