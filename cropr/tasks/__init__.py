"""Tasks by name. A task is a package here; its ``__init__`` holds its entry, ``TASK``, and imports no torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cropr.tasks.table import Task

if TYPE_CHECKING:
    from cropr.tasks.base import TaskRun
    from cropr.training.specs import TrainSpec

__all__ = ["TASKS", "Task", "open_task"]

_PACKAGES = sorted(file.parent.name for file in Path(__file__).parent.glob("*/__init__.py"))

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (import_module(f"{__name__}.{name}") for name in _PACKAGES)
    if hasattr(module, "TASK")
}
"""Every task by name."""


def open_task(spec: TrainSpec, root: Path) -> TaskRun:
    """The run of a specification, with its images. Imports torch.

    Raises:
        ValueError, FileNotFoundError: images are missing or differ from those of the spec.
    """
    task = TASKS[spec.task]
    work: TaskRun = task.load(task.run)(spec, root)
    return work
