"""Reducers. A family of methods is a file here; ``cropr.pruning.methods`` lists them."""

from __future__ import annotations

from typing import Any

from cropr.pruning.methods import REDUCERS, choose
from cropr.pruning.reducers.base import Context, Reducer, Reduction, ScoreReducer

__all__ = ["Context", "Reducer", "Reduction", "ScoreReducer", "create"]


def create(name: str, dim: int, num_outputs: int, **options: Any) -> Reducer:
    """Make the reducer of one block.

    Args:
        name: one of ``cropr.pruning.methods.REDUCERS`` but ``none``.
        dim: channels of the tokens.
        num_outputs: outputs of an auxiliary head, where it has one.
        options: keyword arguments of the reducer.

    Raises:
        ValueError: unknown name or option, with the known ones.
    """
    method = choose(REDUCERS, "reducer", name)
    if unknown := sorted(set(options) - set(method.options)):
        allowed = ", ".join(method.options) or "none"
        raise ValueError(f"reducer {name!r} has no option {', '.join(unknown)}; it has {allowed}")
    reducer: Reducer = method.load()(dim, num_outputs, **options)
    return reducer
