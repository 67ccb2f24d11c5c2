"""Token Cropr: faster Vision Transformers by pruning tokens, reproduced.

    model = cropr.prune(vit, schedule=cropr.Schedule.constant(rate=8), reducer="cropr", fusion="llf")
    fast = model.deploy()

Imports are lazy: ``import cropr`` does not load torch, so that the workflow starts in a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cropr.pruning.schedule import Schedule

if TYPE_CHECKING:
    from cropr.pruning.model import DeployedViT, Output, PrunedViT, prune
    from cropr.pruning.tokens import Tokens

__version__ = "0.1.0"
__all__ = ["DeployedViT", "Output", "PrunedViT", "Schedule", "Tokens", "prune"]

_LAZY = {
    "DeployedViT": ("cropr.pruning.model", "DeployedViT"),
    "Output": ("cropr.pruning.model", "Output"),
    "PrunedViT": ("cropr.pruning.model", "PrunedViT"),
    "Tokens": ("cropr.pruning.tokens", "Tokens"),
    "prune": ("cropr.pruning.model", "prune"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cropr' has no attribute {name!r}; it has {sorted(__all__)}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
