"""Adapters to host libraries: a file each, imported when a model needs it. To add one, add its file (see ``base``)."""

from typing import TYPE_CHECKING, Any

from cropr.pruning.backbones.base import Backbone, adapt

if TYPE_CHECKING:
    from cropr.pruning.backbones.windows import windowed

__all__ = ["Backbone", "adapt", "windowed"]


def __getattr__(name: str) -> Any:
    if name == "windowed":
        from cropr.pruning.backbones import windows

        return windows.windowed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
