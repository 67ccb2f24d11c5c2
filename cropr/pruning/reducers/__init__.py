"""Reducers. A family of methods is a file here; ``cropr.pruning.methods`` lists them."""

from cropr.pruning.reducers.base import Context, Reducer, Reduction, ScoreReducer, create

__all__ = ["Context", "Reducer", "Reduction", "ScoreReducer", "create"]
