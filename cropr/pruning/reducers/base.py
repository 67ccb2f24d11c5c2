"""What a reducer is: tokens in, fewer tokens out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cropr.pruning.methods import REDUCERS, choose
from cropr.pruning.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Context:
    """What a reducer may read besides the tokens. A field is None unless the reducer wants it."""

    cls_attention: Tensor | None = None
    """[B, N]: attention of the CLS query to each patch alive in the block just run, averaged over heads."""
    pixels: Tensor | None = None
    """[B, all patches]: variance of every patch's pixels, in raster order."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """Result of a reducer."""

    kept: Tokens
    pruned: Tokens | None
    """Pruned tokens, without prefix; None unless they were asked for."""
    aux: Tensor | None = None
    """[B, Q, outputs]: auxiliary prediction, in training only."""


class Reducer(nn.Module):
    """Base class. One instance follows one block."""

    learns: ClassVar[bool] = False
    """Has weights that training must reach, and so runs in training even where K = N."""
    wants_attention: ClassVar[bool] = False
    """Reads ``Context.cls_attention``. One row is computed for it; the blocks stay on fused attention."""
    wants_pixels: ClassVar[bool] = False
    """Reads ``Context.pixels``."""

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        """Reduce to ``keep`` patch tokens.

        Args:
            tokens: the output of the block; N patch tokens.
            keep: K, with 1 <= K < N; K = N for one that learns, in training.
            context: the fields that it wants.
            want_pruned: whether a fusion will use the pruned tokens.
        """
        raise NotImplementedError

    def deploy(self) -> Reducer:
        """The inference form, sharing nothing with this one; it has no training-only weights."""
        raise NotImplementedError


class ScoreReducer(Reducer):
    """Keeps the K patch tokens of highest score, in their present order. A method without weights defines ``score``
    alone; ``dim`` and ``num_outputs`` are for those that have weights."""

    def __init__(self, dim: int = 0, num_outputs: int = 0) -> None:
        super().__init__()

    def deploy(self) -> Reducer:
        return copy.deepcopy(self)

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        """[B, N] float32; the lowest are pruned."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        return select(tokens, self.score(tokens, context), keep, want_pruned)


def select(tokens: Tokens, score: Tensor, keep: int, want_pruned: bool) -> Reduction:
    """Split tokens by score [B, N]: the ``keep`` highest stay, in their present order.

    Only the pruned are searched for (top-k of R, no sort of all N); positions of the rest follow by counting. Shapes
    are static, so this compiles to one graph and exports.
    """
    batch, alive = score.shape
    pruned = score.topk(alive - keep, dim=1, largest=False, sorted=False).indices
    stays = torch.ones_like(score, dtype=torch.bool).scatter(1, pruned, False)
    # Every token writes its position to its rank among the kept; the pruned all write to a slot that is cut off.
    rank = torch.where(stays, stays.cumsum(1) - 1, keep)
    position = torch.arange(alive, device=score.device).expand(batch, -1)
    kept = position.new_zeros(batch, keep + 1).scatter(1, rank, position)[:, :keep]
    return Reduction(kept=tokens.keep(kept), pruned=tokens.cut(pruned) if want_pruned else None)


def create(name: str, dim: int, num_outputs: int, **options: Any) -> Reducer:
    """Make the reducer of one block.

    Args:
        name: one of ``cropr.pruning.methods.REDUCERS`` but ``none``.
        dim, num_outputs: channels of the tokens; outputs of an auxiliary head, where it has one.
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
