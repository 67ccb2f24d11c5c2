"""Adapters to host libraries: a file each, which lists the classes that it adapts in ``ADAPTERS``.

To add one, add its file. Any other model is refused by name.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from cropr.pruning.backbones.base import Backbone
from cropr.pruning.backbones.eva import EvaBackbone
from cropr.pruning.backbones.vit import ViTBackbone
from cropr.pruning.backbones.windowed import WindowedBackbone, windowed

__all__ = ["Backbone", "EvaBackbone", "ViTBackbone", "WindowedBackbone", "adapt", "windowed"]

_ADAPTERS: dict[type[nn.Module], type[Backbone]] = {}
for _found in iter_modules(__path__):
    _ADAPTERS |= getattr(import_module(f"{__name__}.{_found.name}"), "ADAPTERS", {})


def adapt(host: nn.Module) -> Backbone:
    """The adapter for a model of a host library.

    Raises:
        TypeError: no adapter for this model or its blocks, with the supported ones.
    """
    for kind, adapter in _ADAPTERS.items():
        if isinstance(host, kind):
            return adapter(host)
    supported = [f"{kind.__module__.partition('.')[0]} {kind.__name__}" for kind in _ADAPTERS]
    raise TypeError(f"no adapter for {type(host).__name__}; supported: {supported}")
