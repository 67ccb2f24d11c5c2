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
    attention_type = timm_eva.EvaAttention

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x, rope = host._pos_embed(host.patch_embed(images))
        return Tokens.full(host.norm_pre(x), self.prefix), rope

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        return tokens.replace(self._call(block, tokens.x, rope=self._rope(block, tokens, position), attn_mask=mask))

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        module = self.host.blocks[block - 1]
        attention = module.attn
        x = module.norm1(tokens.x) if isinstance(module, timm_eva.EvaBlock) else tokens.x
        query, key = _project(attention, x)
        query, key = attention.q_norm(query), attention.k_norm(key)
        rope = self._rope(block, tokens, position)
        if rope is not None:
            lead, patches = key[:, :, : self.prefix], key[:, :, self.prefix :]
            key = torch.cat((lead, apply_rot_embed_cat(patches, rope, half=attention.rotate_half)), dim=2)
        logits = (query @ key.transpose(-2, -1)).squeeze(2)
        return cls_row(logits, attention.scale, self.prefix)

    def _rope(self, block: int, tokens: Tokens, position: Any) -> Tensor | None:
        """Rotary rows of the tokens alive: [B, 1, N, 2 d], or [B, H, N, 2 d] where the table has heads."""
        if position is None:
            return None
        table = position[block - 1] if getattr(self.host, "rope_mixed", False) else position
        rows = apply_keep_indices_nlc(tokens.x, table, tokens.index)
        return rows.unsqueeze(1) if table.ndim == 2 else rows


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """CLS query [B, H, 1, d] and all keys [B, H, L, d] by EVA's fused or separate projections."""
    if attention.qkv is None:
        query, key = attention.q_proj(x[:, :1]), attention.k_proj(x)
    else:
        width = attention.qkv.weight.shape[0] // 3
        query = F.linear(x[:, :1], attention.qkv.weight[:width], attention.q_bias)
        key = F.linear(x, attention.qkv.weight[width : 2 * width], attention.k_bias)
    heads = (attention.num_heads, -1)
    return query.unflatten(-1, heads).transpose(1, 2), key.unflatten(-1, heads).transpose(1, 2)


ADAPTERS = {"timm.models.eva.Eva": "EvaBackbone"}
