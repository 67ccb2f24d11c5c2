"""Tokens and what travels with them.

B batch, P prefix tokens (CLS, registers), N patch tokens alive, N0 patches of the image, K kept, R pruned, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token values and what travels with each. Fields that are None have no effect and cost nothing."""

    x: Tensor
    """[B, P + N, C]; prefix tokens first. They are never pruned."""
    index: Tensor | None
    """[B, N] int64: raster index of every patch token in the full patch grid, of a merged token that of its centre;
    None for slots, which have no place."""
    prefix: int
    """P: how many prefix tokens lead the sequence."""
    size: Tensor | None = None
    """[B, N] float32: how many patches a token stands for in attention and pooling; None for 1 each."""
    valid: Tensor | None = None
    """[B, N] bool: False for padding, where the number of tokens differs by image; None for no padding."""
    source: Tensor | None = None
    """[B, N0] int64: position among the N of the token that holds each patch now, -1 for none; None before the first
    merge, when ``index`` says it."""
    gate: Tensor | None = None
    """[B, N] float32, in training only: 0 for tokens that other tokens do not attend to, else 1 (DynamicViT)."""

    @classmethod
    def full(cls, x: Tensor, prefix: int) -> Tokens:
        """All tokens of an image, in raster order."""
        batch, length = x.shape[:2]
        index = torch.arange(length - prefix, device=x.device).expand(batch, -1)
        return cls(x, index, prefix)

    @property
    def num_patches(self) -> int:
        """N: patch tokens alive."""
        return self.x.shape[1] - self.prefix

    @property
    def patches(self) -> Tensor:
        """[B, N, C]: the patch tokens without the prefix."""
        return self.x[:, self.prefix :]

    def replace(self, x: Tensor) -> Tokens:
        """The same places with new values (a block ran)."""
        return replace(self, x=x)

    def keep(self, position: Tensor) -> Tokens:
        """Prefix and the patch tokens at these positions of the present sequence; position is [B, K]."""
        lead = torch.arange(self.prefix, device=position.device).expand(position.shape[0], -1)
        kept = self._pick(position, take(self.x, torch.cat((lead, position + self.prefix), dim=1)))
        if self.source is None:
            return kept
        order = torch.arange(position.shape[1], device=position.device).expand_as(position)
        where = torch.full_like(self.x[:, :, 0], -1, dtype=torch.int64).scatter(1, position, order)
        return replace(kept, source=_follow(self.source, where))

    def cut(self, position: Tensor) -> Tokens:
        """The patch tokens at these positions [B, R] alone, without prefix: what a pruner sets aside."""
        return replace(self._pick(position, take(self.x, position + self.prefix)), prefix=0, source=None)

    def merge(self, x: Tensor, centre: Tensor, assignment: Tensor, size: Tensor | None = None) -> Tokens:
        """The prefix and K new patch tokens, of values x [B, K, C] and ``size`` [B, K]. They take the places in the
        image of the tokens at the positions ``centre`` [B, K]; ``assignment`` [B, N] int64 says which of the K each
        present patch token went into, -1 for none."""
        assert self.index is not None
        source = self.source
        if source is None:  # all N0 patches are present: nothing was merged or pruned before
            position = torch.arange(self.num_patches, device=x.device).expand_as(self.index)
            source = torch.empty_like(self.index).scatter(1, self.index, position)
        x = torch.cat((self.x[:, : self.prefix], x), dim=1)
        return replace(self, x=x, index=self.index.gather(1, centre), size=size, source=_follow(source, assignment))

    @property
    def weight(self) -> Tensor | None:
        """[B, N] float32: how much each patch token counts in a mean; None for 1 each."""
        found = [part.float() for part in (self.size, self.valid, self.gate) if part is not None]
        return torch.stack(found).prod(dim=0) if found else None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, P + N]: what every attention adds to the logits of each key: log of its size, minus infinity for
        padding; None for no effect. Equal to attending to ``size`` copies of it (ToMe)."""
        if self.size is None and self.valid is None:
            return None
        found = self.patches.new_zeros(1, dtype=torch.float32) if self.size is None else self.size.log()
        if self.valid is not None:
            found = found.masked_fill(~self.valid, float("-inf"))
        return F.pad(found, (self.prefix, 0))[:, None, None].to(dtype)

    def _pick(self, position: Tensor, x: Tensor) -> Tokens:
        """These values with the fields of the patch tokens at these positions."""
        fields = {name: getattr(self, name) for name in ("index", "size", "valid", "gate")}
        picked = {name: value.gather(1, position) for name, value in fields.items() if value is not None}
        return replace(self, x=x, **picked)

    def append(self, others: Sequence[Tokens]) -> Tokens:
        """These tokens followed by the patch tokens of the others."""
        if not others:
            return self
        x = torch.cat((self.x, *(other.patches for other in others)), dim=1)
        index = torch.cat([tokens.index for tokens in (self, *others) if tokens.index is not None], dim=1)
        return replace(self, x=x, index=index)

    def raster(self) -> Tokens:
        """Sorted by place in the image; with every patch alive, the patches form the grid again."""
        assert self.index is not None, "slots have no places"
        return self.keep(self.index.argsort(dim=1))


def _follow(source: Tensor, where: Tensor) -> Tensor:
    """Each patch's position after tokens moved from position j to ``where[:, j]``; -1 stays -1."""
    return torch.where(source < 0, source, where.gather(1, source.clamp(min=0)))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, rows[b]]: [B, M, C] of x [B, L, C] and rows [B, M]. One row copy per token: as fast as memory allows, where
    a gather with an expanded index moves single numbers."""
    batch, length, channels = x.shape
    start = torch.arange(batch, device=x.device).mul(length).unsqueeze(1)
    flat = x.reshape(batch * length, channels).index_select(0, (rows + start).flatten())
    return flat.view(batch, rows.shape[1], channels)
