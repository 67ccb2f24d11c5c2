"""Reducers by name. A family of methods is a file; each lists its classes in ``REDUCERS``."""

from __future__ import annotations

import inspect
from typing import Any

from cropr.pruning.reducers import select
from cropr.pruning.reducers.base import Context, Reducer, Reduction, ScoreReducer

__all__ = ["Context", "Reducer", "Reduction", "ScoreReducer", "available", "create"]

_REGISTRY: dict[str, type[Any]] = {**select.REDUCERS}


def available() -> tuple[str, ...]:
    """Names that ``prune`` takes; ``none`` is the unpruned model."""
    return ("none", *_REGISTRY)


def create(name: str, dim: int, num_outputs: int, **options: Any) -> Reducer:
    """Make the reducer of one block.

    Args:
        name: one of ``available()`` but ``none``.
        dim: channels of the tokens.
        num_outputs: outputs of an auxiliary head, where it has one.
        options: keyword arguments of the reducer.

    Raises:
        ValueError: unknown name or option, with the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown reducer {name!r}; choose one of {list(available())}")
    kind = _REGISTRY[name]
    allowed = sorted(set(inspect.signature(kind).parameters) - {"dim", "num_outputs"})
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"reducer {name!r} has no option {unknown}; it has {allowed or 'none'}")
    return kind(dim, num_outputs, **options)
