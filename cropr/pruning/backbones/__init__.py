"""Adapters to hosts. Anything that none of them knows is refused by name."""

from __future__ import annotations

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cropr.pruning.backbones.base import Backbone
from cropr.pruning.backbones.eva import EvaBackbone
from cropr.pruning.backbones.vit import ViTBackbone
from cropr.pruning.backbones.windowed import WindowedBackbone, windowed

__all__ = ["Backbone", "EvaBackbone", "ViTBackbone", "WindowedBackbone", "adapt", "windowed"]

_ADAPTERS: dict[type[nn.Module], type[Backbone]] = {VisionTransformer: ViTBackbone, Eva: EvaBackbone}


def adapt(host: nn.Module) -> Backbone:
    """The adapter for a timm model.

    Raises:
        TypeError: no adapter for this model or its blocks, with the supported ones.
    """
    for kind, adapter in _ADAPTERS.items():
        if isinstance(host, kind):
            return adapter(host)
    supported = [f"timm {kind.__name__}" for kind in _ADAPTERS]
    raise TypeError(f"no adapter for {type(host).__name__}; supported: {supported}")
