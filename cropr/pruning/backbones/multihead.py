"""Hosts whose attention is torch's ``nn.MultiheadAttention`` over [B, L, C]: torchvision and open_clip.

Their blocks hand no mask on. Where tokens carry a bias, or a fusion a mask, a block runs by its halves.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone
from cropr.pruning.tokens import Tokens


class MultiheadBackbone(Backbone):
    """Blocks with ``ln_1``, an attention, ``ln_2`` and ``mlp``."""

    attention: ClassVar[str]
    """Name of a block's attention."""

    @property
    def heads(self) -> int:
        return getattr(self.blocks[0], self.attention).num_heads

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        if mask is None and tokens.size is None and tokens.valid is None:
            return tokens.replace(self._call(self.blocks[block - 1], tokens.x))
        return self.mlp(block, self.attend(block, tokens, mask))

    def _attended(self, module: Any, x: Tensor, block: int, tokens: Tokens, position: Any) -> Tensor:
        """Here ``position`` is a fusion's mask, since these hosts have no rotary positions."""
        normed, attention = module.ln_1(x), getattr(module, self.attention)
        bias = tokens.bias(x.dtype)
        padding = None if bias is None else bias.flatten(1)
        blocked = None if position is None else ~position  # torch's module names what is not attended to
        found = attention(normed, normed, normed, padding, need_weights=False, attn_mask=blocked)[0]
        return x + self._scaled(module, 1, found)

    def _transformed(self, module: Any, x: Tensor) -> Tensor:
        return x + self._scaled(module, 2, module.mlp(module.ln_2(x)))

    def _scaled(self, module: Any, half: int, x: Tensor) -> Tensor:
        """Dropout or LayerScale of a half of a block."""
        raise NotImplementedError

    def _normed(self, block: int, tokens: Tokens) -> Tensor:
        return self.blocks[block - 1].ln_1(tokens.x)

    def _part(self, block: int, part: int, x: Tensor) -> Tensor:
        attention = getattr(self.blocks[block - 1], self.attention)
        weight, bias = (tensor.chunk(3)[part] for tensor in (attention.in_proj_weight, attention.in_proj_bias))
        found = F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        return found * found.shape[3] ** -0.5 if part == 0 else found

    def _can_read(self, module: Any) -> bool:
        return True

    def _can_halve(self, module: Any) -> bool:
        return True
