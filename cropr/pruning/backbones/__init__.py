"""Adapters to host libraries: a file each, imported when a model needs it. To add one, add its file (see ``base``)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cropr.pruning.backbones.base import Backbone, adapt

if TYPE_CHECKING:
    from cropr.pruning.backbones.eva import EvaBackbone
    from cropr.pruning.backbones.vit import ViTBackbone
    from cropr.pruning.backbones.windows import WindowedBackbone, windowed

__all__ = ["Backbone", "EvaBackbone", "ViTBackbone", "WindowedBackbone", "adapt", "windowed"]
_FILES = {"EvaBackbone": "eva", "ViTBackbone": "vit", "WindowedBackbone": "windows", "windowed": "windows"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
