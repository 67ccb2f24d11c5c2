"""The Cropr module: learned queries score tokens, an auxiliary task trains the queries.

Paper, section 3. Training: A = Q K(X)^T; token score = sum of A over queries (raw logits); the aggregator forms
Z = softmax(A / sqrt(d)) V(X), then Z + MLP(LN(Z)); a linear head on Z predicts the task. Inference needs the scores
alone, and a sum of dot products is one dot product: every variant folds to one vector (``Scorer.fold``).

B batch, L tokens with prefix, Q queries, H heads, C channels, d = C / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Scorer(nn.Module):
    """Cross-attention logits of learned queries over tokens.

    Args:
        num_queries: Q; one for an image-level task, one a patch for segmentation.
        num_heads: H; must divide ``dim``. More than one only matters to the aggregator: scores sum over heads.
        qkv_proj, norm: linear projections of queries, keys and values; LayerNorm before keys and values (ablations; the
            paper's module has neither).
    """

    def __init__(
        self, dim: int, num_queries: int = 1, num_heads: int = 1, qkv_proj: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries} must be 1 or more")
        if num_heads < 1 or dim % num_heads:
            fits = [h for h in range(1, dim + 1) if dim % h == 0]
            raise ValueError(f"num_heads={num_heads} does not divide the width {dim}; choose one of {fits}")
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(1, num_queries, dim))
        nn.init.trunc_normal_(self.queries, std=dim**-0.5, a=-2 * dim**-0.5, b=2 * dim**-0.5)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.q_proj = nn.Linear(dim, dim) if qkv_proj else nn.Identity()
        self.k_proj = nn.Linear(dim, dim) if qkv_proj else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits [B, H, Q, L] of tokens x [B, L, C], and the tokens as the aggregator is to see them."""
        x = self.norm(x)
        queries = self._heads(self.q_proj(self.queries))
        keys = self._heads(self.k_proj(x))
        return queries @ keys.transpose(-2, -1), x

    def fold(self) -> FoldedScorer:
        """The same scores, up to a constant that no ranking sees, from one vector."""
        weight = self.q_proj(self.queries).sum(dim=(0, 1))
        if isinstance(self.k_proj, nn.Linear):
            weight = self.k_proj.weight.t() @ weight
        if isinstance(self.norm, nn.LayerNorm):
            return FoldedScorer(weight * self.norm.weight, eps=self.norm.eps)
        return FoldedScorer(weight)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, H, L, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FoldedScorer(nn.Module):
    """Token scores at inference: one dot product a token, O(L C) whatever the number of queries.

    ``weight`` [C] is the sum of the queries with projections and norm weight multiplied in; ``eps`` is that of the
    LayerNorm whose centring and scaling remain, None without one.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [B, L] in float32 of tokens x [B, L, C]; low precision would make ties."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.eps is not None:
                x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            return x @ self.weight.float()


class Aggregator(nn.Module):
    """Attention-weighted sum of the tokens, one vector a query: Z + MLP(LN(Z)). Training only.

    ``num_heads`` is the scorer's, and more than one adds an output projection; ``qkv_proj`` projects the values. The
    residual MLP (``mlp``; paper: +0.3 points with it) has the hidden width ``mlp_ratio`` times C.
    """

    def __init__(
        self, dim: int, num_heads: int = 1, qkv_proj: bool = False, mlp: bool = True, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.v_proj = nn.Linear(dim, dim) if qkv_proj else nn.Identity()
        self.out_proj = nn.Linear(dim, dim) if num_heads > 1 else nn.Identity()
        hidden = int(dim * mlp_ratio)
        layers = (nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) if mlp else ()
        self.mlp = nn.Sequential(*layers) if mlp else None

    def initialise(self, std: float) -> None:
        """Start the MLP from a truncated normal and zero biases, not from torch's default."""
        for layer in self.mlp or ():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        """[B, Q, C] from logits [B, H, Q, L] and tokens x [B, L, C]."""
        heads = logits.shape[1]
        values = self.v_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, L, d]
        attention = (logits * values.shape[-1] ** -0.5).softmax(dim=-1)
        z = self.out_proj((attention @ values).transpose(1, 2).flatten(2))
        return z if self.mlp is None else z + self.mlp(z)


class AuxiliaryHead(nn.Sequential):
    """LayerNorm and linear: [B, Q, C] -> [B, Q, outputs]. Training only."""

    def __init__(self, dim: int, num_outputs: int) -> None:
        linear = nn.Linear(dim, num_outputs)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.LayerNorm(dim), linear)
