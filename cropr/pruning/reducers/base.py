"""What a reducer is: tokens in, fewer tokens out.

B batch, H heads, L = P + N tokens with prefix, N patch tokens, K kept, C channels, d = C / H.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cropr.pruning.methods import REDUCERS, Place, choose
from cropr.pruning.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Context:
    """What a reducer may read of the block just run, besides the tokens. A field is None unless ``reads`` names it."""

    cls_attention: Tensor | None = None
    """[B, H, N] float32: attention of the CLS query to each patch; 0 for padding."""
    mean_key: Tensor | None = None
    """[B, L, d]: keys before rotary positions, averaged over heads."""
    value_norms: Tensor | None = None
    """[B, H, N] float32: Euclidean norm of each patch's value."""
    column_sums: Tensor | None = None
    """[B, N] float32: attention that each patch receives, summed over heads and queries."""
    pixels: Tensor | None = None
    """[B, all patches]: variance of every patch's pixels, in raster order."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """Result of a reducer."""

    kept: Tokens
    pruned: Tokens | None = None
    """Pruned tokens, without prefix; None unless they were asked for."""
    aux: Tensor | None = None
    """[B, Q, outputs]: auxiliary prediction, in training only."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars by name, in training only, weighted: their mean over the sites is added to the main loss."""


class Reducer(nn.Module):
    """Base class. One instance follows one block, or acts within it.

    Args:
        dim, num_outputs: channels of the tokens; outputs of an auxiliary head.
        place: ``after_block``, or ``after_attention``, where the block's MLP runs on the kept tokens; by default the
            method's own.
    """

    places: ClassVar[tuple[Place, ...]] = ("after_block",)
    """Where it can act; the first is its own."""
    reads: frozenset[str] = frozenset()
    """Fields of ``Context``. The blocks stay on fused attention: what is read is computed beside them."""
    sets: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``Tokens`` among ``size``, ``valid`` and ``gate`` that later attention and pooling must respect."""
    leaves_pruned: ClassVar[bool] = False
    """Prunes whole tokens, which a fusion can bring back."""
    slots: ClassVar[bool] = False
    """Its K outputs are mixtures of all tokens without a place in the image; K is fixed when it is made."""
    learns: ClassVar[bool] = False
    """Has weights that training must reach, and so runs in training even where K = N."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Names of parts that inference does not need."""
    told: ClassVar[tuple[str, ...]] = ()
    """What ``create`` tells it of its site: ``keep`` (K), ``depth`` (its block over the blocks)."""

    def __init__(self, dim: int = 0, num_outputs: int = 0, *, place: Place | None = None) -> None:
        super().__init__()
        self.place = place or self.places[0]
        if self.place not in self.places:
            raise ValueError(f"place={place!r}: {type(self).__name__} acts at {' or '.join(self.places)}")

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        """Reduce ``tokens``, the output of the block or of its attention, to ``keep`` patch tokens: 1 <= K < N; K = N
        for one that learns, in training. ``context`` has the fields that it reads; ``want_pruned``: a fusion will use
        the pruned tokens."""
        raise NotImplementedError

    def macs(self, tokens: int, patches: int, keep: int, dim: int, head: int) -> int:
        """Multiply-adds of one call on one image in its deployed form, without what it reads. ``tokens`` and
        ``patches`` are those that enter, with and without prefix; ``head`` is d."""
        return 0

    def deploy(self) -> Reducer:
        """The inference form, sharing nothing with this one; it has no training-only weights."""
        return copy.deepcopy(self)


class Ruled(Reducer):
    """A method whose published code departs from its paper or from sound arithmetic; ``rule`` is that of the code,
    ``reference``, or ``corrected`` (docs/reducers.md)."""

    def __init__(self, *args: Any, rule: str = "reference", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rule not in ("reference", "corrected"):
            allowed = "'reference' (the published code) or 'corrected' (docs/reducers.md)"
            raise ValueError(f"rule={rule!r}; choose {allowed}")
        self.corrected = rule == "corrected"


class ScoreReducer(Reducer):
    """Keeps the K patch tokens of highest score, in their present order. A subclass defines ``score``."""

    leaves_pruned: ClassVar[bool] = True

    def score(self, tokens: Tokens, context: Context) -> Tensor:
        """[B, N] float32; the lowest are pruned."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, keep: int, context: Context, want_pruned: bool) -> Reduction:
        return select(tokens, self.score(tokens, context), keep, want_pruned)


def select(tokens: Tokens, score: Tensor, keep: int, want_pruned: bool) -> Reduction:
    """Split tokens by score [B, N]: the ``keep`` highest stay, in their present order."""
    kept, pruned = split(score, keep)
    return Reduction(kept=tokens.keep(kept), pruned=tokens.cut(pruned) if want_pruned else None)


def split(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Positions [B, K] of the ``keep`` highest scores [B, N], ascending, and [B, N - K] of the others, in any order.

    Only the pruned are searched for (top-k of R, no sort of all N); positions of the rest follow by counting. Shapes
    are static, so this compiles to one graph and exports.
    """
    batch, alive = score.shape
    pruned = score.topk(alive - keep, dim=1, largest=False, sorted=False).indices
    stays = torch.ones_like(score, dtype=torch.bool).scatter(1, pruned, False)
    # Every token writes its position to its rank among the kept; the pruned all write to a slot that is cut off.
    rank = torch.where(stays, stays.cumsum(1) - 1, keep)
    position = torch.arange(alive, device=score.device).expand(batch, -1)
    return position.new_zeros(batch, keep + 1).scatter(1, rank, position)[:, :keep], pruned


def pool(x: Tensor, assignment: Tensor, keep: int) -> Tensor:
    """Sums [B, K, C] of the rows of x [B, N, C] that are assigned to each of ``keep``; assignment is [B, N] int64."""
    batch, _, channels = x.shape
    start = torch.arange(batch, device=x.device).mul(keep).unsqueeze(1)
    empty = x.new_zeros(batch * keep, channels)
    return empty.index_add(0, (assignment + start).flatten(), x.flatten(0, 1)).view(batch, keep, channels)


def create(name: str, dim: int, num_outputs: int, *, keep: int = 0, depth: float = 0.5, **options: Any) -> Reducer:
    """Make the reducer of one block from its name in ``cropr.pruning.methods.REDUCERS`` and its options. ``keep`` and
    ``depth`` are for methods that must know (``Reducer.told``). Raises ValueError for an unknown name, option or value.
    """
    method = choose(REDUCERS, "reducer", name)
    if unknown := sorted(set(options) - set(method.options)):
        allowed = ", ".join(method.options) or "none"
        raise ValueError(f"reducer {name!r} has no option {', '.join(unknown)}; it has {allowed}")
    kind, site = method.load(), {"keep": keep, "depth": depth}
    try:
        return kind(dim, num_outputs, **{key: site[key] for key in kind.told}, **options)
    except (TypeError, RuntimeError) as error:  # a value of another type, or of a size that torch refuses
        raise ValueError(f"reducer {name!r} cannot be made with {options}: {error}") from error
