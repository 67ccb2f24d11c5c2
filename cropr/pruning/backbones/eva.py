"""timm ``Eva``: EVA-02 and other models with rotary positions, whose rows must follow the kept tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_keep_indices_nlc, apply_rot_embed_cat
from timm.models import eva as timm_eva
from torch import Tensor
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone, cls_row
from cropr.pruning.tokens import Tokens


class EvaBackbone(Backbone):
    """Blocks that take a rotary table; ``position`` is the host's table for the full grid, or None."""

    host_type = timm_eva.Eva
    block_types = (timm_eva.EvaBlock, timm_eva.EvaBlockPostNorm)
    halved_types = (timm_eva.EvaBlock,)
    attention_type = timm_eva.EvaAttention

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x, rope = host._pos_embed(host.patch_embed(images))
        return Tokens.full(host.norm_pre(x), self.prefix), rope

    def _arguments(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> dict[str, Any]:
        return {**super()._arguments(block, tokens, position, mask), "rope": self._rope(block, tokens, position)}

    def _scale(self, module: Any, half: int, x: Tensor) -> Tensor:
        gamma = getattr(module, f"gamma_{half}")
        return x if gamma is None else gamma * x

    def _project(self, block: int, normed: Tensor, tokens: Tokens, position: Any) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.host.blocks[block - 1].attn
        query, key, value = (_part(attention, part, normed) for part in range(3))
        rope = self._rope(block, tokens, position)
        query, key = (self._turn(attention, x, rope) for x in (attention.q_norm(query), attention.k_norm(key)))
        return query * attention.scale, key, value

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attention = self.host.blocks[block - 1].attn
        x = self._normed(block, tokens)
        query = attention.q_norm(_part(attention, 0, x[:, :1])) * attention.scale
        key = self._turn(attention, attention.k_norm(_part(attention, 1, x)), self._rope(block, tokens, position))
        return cls_row((query @ key.transpose(-2, -1)).squeeze(2), tokens)

    def mean_key(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attention = self.host.blocks[block - 1].attn
        key: Tensor = attention.k_norm(_part(attention, 1, self._normed(block, tokens)))
        return key.mean(dim=1)

    def value_norms(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        normed = self._normed(block, tokens)[:, self.prefix :]
        return _part(self.host.blocks[block - 1].attn, 2, normed).float().norm(dim=3)

    def verify_reducer(self, reducer: Any) -> None:
        super().verify_reducer(reducer)
        if reducer.slots and getattr(self.host, "rope", None) is not None:
            raise self._refuse(f"rotary positions, for {type(reducer).__name__}, whose tokens have no place,")

    def _turn(self, attention: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """Queries or keys [B, H, L, d] with the rotary positions of their patches."""
        if rope is None:
            return x
        lead, patches = x[:, :, : self.prefix], x[:, :, self.prefix :]
        return torch.cat((lead, apply_rot_embed_cat(patches, rope, half=attention.rotate_half)), dim=2).type_as(x)

    def _rope(self, block: int, tokens: Tokens, position: Any) -> Tensor | None:
        """Rotary rows of the tokens alive: [B, 1, N, 2 d], or [B, H, N, 2 d] where the table has heads."""
        if position is None:
            return None
        assert tokens.index is not None
        table = position[block - 1] if getattr(self.host, "rope_mixed", False) else position
        rows = apply_keep_indices_nlc(tokens.x, table, tokens.index)
        return rows.unsqueeze(1) if table.ndim == 2 else rows


def _part(attention: Any, part: int, x: Tensor) -> Tensor:
    """Queries (0), keys (1) or values (2) [B, H, L, d] of x [B, L, C], by EVA's fused or separate projections."""
    if attention.qkv is None:
        found = (attention.q_proj, attention.k_proj, attention.v_proj)[part](x)
    else:
        bias = (attention.q_bias, attention.k_bias, attention.v_bias)[part]
        found = F.linear(x, attention.qkv.weight.chunk(3)[part], bias)
    return found.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


ADAPTERS = {"timm.models.eva.Eva": "EvaBackbone"}
