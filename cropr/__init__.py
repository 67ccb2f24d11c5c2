"""Token Cropr: faster Vision Transformers by pruning tokens, reproduced.

    model = cropr.prune(vit, schedule=cropr.Schedule.constant(rate=8), reducer="cropr", fusion="llf")
    fast = model.deploy()
    maps = cropr.show.show(fast, images)

``import cropr`` does not load torch; these names do, when first used. ``cropr.pruning.methods`` lists the methods.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cropr.pruning.schedule import Schedule

if TYPE_CHECKING:
    from cropr import show
    from cropr.hosts import as_host, speedup
    from cropr.pruning.model import DeployedViT, Output, PrunedViT, prune
    from cropr.pruning.tokens import Tokens

__version__ = "0.1.0"
__all__ = ["DeployedViT", "Output", "PrunedViT", "Schedule", "Tokens", "as_host", "prune", "show", "speedup"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cropr' has no attribute {name!r}; it has {sorted(__all__)}")
    if name == "show":
        return import_module("cropr.show")
    module = {"Tokens": "pruning.tokens", "as_host": "hosts", "speedup": "hosts"}.get(name, "pruning.model")
    return getattr(import_module(f"cropr.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
