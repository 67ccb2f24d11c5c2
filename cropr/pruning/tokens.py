"""Tokens and what travels with them.

B batch, P prefix tokens (CLS, registers), N patch tokens alive, K kept, R pruned, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token values and the place in the image that each patch token came from."""

    x: Tensor
    """[B, P + N, C]; prefix tokens first. They are never pruned."""
    index: Tensor
    """[B, N] int64: raster index of every patch token in the full patch grid."""
    prefix: int
    """P: how many prefix tokens lead the sequence."""

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
        return Tokens(x, self.index, self.prefix)

    def keep(self, position: Tensor) -> Tokens:
        """Prefix and the patch tokens at these positions of the present sequence; position is [B, K]."""
        lead = torch.arange(self.prefix, device=position.device).expand(position.shape[0], -1)
        rows = torch.cat((lead, position + self.prefix), dim=1)
        return Tokens(take(self.x, rows), self.index.gather(1, position), self.prefix)

    def cut(self, position: Tensor) -> Tokens:
        """The patch tokens at these positions [B, R] alone, without prefix: what a pruner sets aside."""
        return Tokens(take(self.x, position + self.prefix), self.index.gather(1, position), 0)

    def append(self, others: Sequence[Tokens]) -> Tokens:
        """These tokens followed by the patch tokens of the others."""
        if not others:
            return self
        x = torch.cat((self.x, *(other.patches for other in others)), dim=1)
        index = torch.cat((self.index, *(other.index for other in others)), dim=1)
        return Tokens(x, index, self.prefix)

    def raster(self) -> Tokens:
        """Sorted by place in the image; with every patch alive, the patches form the grid again."""
        return self.keep(self.index.argsort(dim=1))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, rows[b]]: [B, M, C] of x [B, L, C] and rows [B, M].

    One row copy per token: as fast as memory allows, where a gather with an expanded index moves single numbers.
    """
    batch, length, channels = x.shape
    start = torch.arange(batch, device=x.device).mul(length).unsqueeze(1)
    flat = x.reshape(batch * length, channels).index_select(0, (rows + start).flatten())
    return flat.view(batch, rows.shape[1], channels)
