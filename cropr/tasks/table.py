"""The entry of a task; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cropr.specs import ImagesSpec, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Entry of a task. Each package in ``cropr.tasks`` holds one, named ``TASK``."""

    name: str
    """As in specs and configuration."""
    run: str
    """``module:Class`` of its ``TaskRun``."""
    show: str
    """``module:Class`` of its ``cropr.show.Answers``, for pruning maps."""
    data: type[ImagesSpec]
    """Describes its images."""
    detector: type[Spec] | None = None
    """Describes pyramid and heads around the encoder; None without them."""
    layout: str
    """Name of the public layout that its images lie in."""
    folders: tuple[str, ...]
    """Folders of that layout, under the root."""
    metrics: Mapping[str, str]
    """Metric in percent -> label, in order of importance; rows are ranked by the first."""

    def load(self, path: str) -> Any:
        """The class behind ``run`` or ``show``. Imports torch."""
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)
