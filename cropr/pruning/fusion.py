"""Fusions: ways to bring pruned tokens back, behind one interface.

Pruned tokens are set aside in the state in which they left. A fusion puts them behind the survivors: before the last
block, after it, or after the head. The paper defines Last Layer Fusion; of the alternatives it gives names and results
only. Each class says what is from the paper and what is our reading.

B batch, P prefix tokens, K survivors, R pruned, N = K + R patch tokens, L = P + N, C channels.
"""

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from cropr.pruning.methods import Place
from cropr.pruning.tokens import Tokens

METHODS = {  # a literal, which cropr.pruning.methods reads without importing this file
    "none": {"class": None, "label": "No reactivation"},
    "concat": {"class": "TokenConcat", "label": "Token concatenation", "place": "after_last_block"},
    "exit": {"class": "EarlyExit", "label": "Early exit", "place": "after_head"},
    "cross": {"class": "CrossAttention", "label": "Cross-attention", "place": "after_last_block"},
    "llf": {"class": "LastLayerFusion", "label": "Last Layer Fusion", "place": "before_last_block"},
    "llf_no_self": {"like": "llf", "class": "LastLayerFusionNoSelf", "label": "Last Layer Fusion, pruned apart"},
}


class Fusion(nn.Module):
    """Base class. ``num_outputs`` are those of the model's head, ``sites`` the blocks that a reducer follows."""

    place: ClassVar[Place]
    """Where it runs. ``after_head``: on predictions per patch, so that it suits dense tasks only."""

    def __init__(self, dim: int, num_outputs: int, sites: Iterable[int]) -> None:
        super().__init__()

    def forward(self, alive: Tokens, pruned: Mapping[int, Tokens]) -> Tokens:
        """All patch tokens again, survivors first, then the pruned in the order in which they left. Attention does not
        see the order; ``Tokens.raster`` restores the grid where a task needs it.

        Args:
            alive: P + K tokens, [B, P + K, C], or their predictions where ``place`` is ``after_head``.
            pruned: block -> patch tokens [B, R of that block, C] that left after it, in the state of then.
        """
        return alive.append(tuple(pruned.values()))

    def mask(self, alive: Tokens, fused: Tokens) -> Tensor | None:
        """[L, L] bool: which token (row) the last block lets attend to which (column); None for all to all."""
        return None


class LastLayerFusion(Fusion):
    """Before the last block, which attends over all tokens; no parameters. All of it is the paper's (section 3)."""

    place: ClassVar[Place] = "before_last_block"


class LastLayerFusionNoSelf(LastLayerFusion):
    """LLF without self-attention among the pruned. From the paper: the idea. Our reading: a pruned token attends to
    prefix, survivors and itself; survivors attend to all, as in LLF.

    Survivors stand first, so one mask [L, L] serves all images and heads. The host's own block computes it, in the
    fused kernels that take a mask: memory-efficient attention on CUDA, not the flash kernel, and the CPU's.
    """

    def mask(self, alive: Tokens, fused: Tokens) -> Tensor | None:
        survivors, length = alive.x.shape[1], fused.x.shape[1]
        if survivors == length:
            return None
        position = torch.arange(length, device=fused.x.device)
        return (position < survivors) | (position < survivors)[:, None] | (position == position[:, None])


class TokenConcat(Fusion):
    """After the last block, which does not see the pruned; no parameters. From the paper: the name. Our reading: the
    last norm and the head are applied to pruned tokens in the state in which they left."""

    place: ClassVar[Place] = "after_last_block"


class EarlyExit(Fusion):
    """The pruned keep the prediction made from their state when pruned. From the paper: logits fused as in DToP. Our
    reading: LayerNorm and linear a site, trained by the main loss where their tokens are."""

    place: ClassVar[Place] = "after_head"

    def __init__(self, dim: int, num_outputs: int, sites: Iterable[int]) -> None:
        super().__init__(dim, num_outputs, sites)
        heads = {block: nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_outputs)) for block in sites}
        self.heads = nn.ModuleDict({str(block): head for block, head in heads.items()})

    def forward(self, alive: Tokens, pruned: Mapping[int, Tokens]) -> Tokens:
        exits = {block: tokens.replace(self.heads[str(block)](tokens.x)) for block, tokens in pruned.items()}
        return super().forward(alive, exits)


class CrossAttention(Fusion):
    """After the last block, whose survivors the pruned attend to. From the paper: learned cross-attention. Our reading:
    one pre-norm block (cross-attention, MLP of ratio 4) without rotary positions; it starts as ``TokenConcat``, since
    its two output projections start at zero."""

    place: ClassVar[Place] = "after_last_block"

    def __init__(self, dim: int, num_outputs: int, sites: Iterable[int]) -> None:
        super().__init__(dim, num_outputs, sites)
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.key_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(dim, dim // math.gcd(dim, 64), batch_first=True)
        out = nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim), nn.GELU(), out)
        for layer in (self.attention.out_proj, out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, alive: Tokens, pruned: Mapping[int, Tokens]) -> Tokens:
        if not pruned:
            return alive
        first, *others = pruned.values()
        left = first.append(others)
        keys = self.key_norm(alive.x)
        x = left.x + self.attention(self.query_norm(left.x), keys, keys, need_weights=False)[0]
        return alive.append([left.replace(x + self.mlp(x))])
