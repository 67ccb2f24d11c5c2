"""timm ``VisionTransformer``: ViT, DeiT, MAE, DINOv2; any prefix tokens, LayerScale, q/k norm, post-norm, parallel."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone, cls_row
from cropr.pruning.tokens import Tokens


class ViTBackbone(Backbone):
    """Plain blocks without positions of their own: a token's place matters in the embedding only."""

    host_type = timm_vit.VisionTransformer
    block_types = (
        timm_vit.Block,
        timm_vit.ResPostBlock,
        timm_vit.ParallelScalingBlock,
        timm_vit.ParallelThingsBlock,
    )
    halved_types = (timm_vit.Block,)
    attention_type = Attention

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        return Tokens.full(x, self.prefix), None

    def _scale(self, module: Any, half: int, x: Tensor) -> Tensor:
        scaled: Tensor = getattr(module, f"ls{half}")(x)
        return scaled

    def _project(self, block: int, normed: Tensor, tokens: Tokens, position: Any) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.host.blocks[block - 1].attn
        query, key, value = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attention.q_norm(query) * attention.scale, attention.k_norm(key), value

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attention = self.host.blocks[block - 1].attn
        x = self._normed(block, tokens)
        query = self._part(attention, 0, x[:, 0])  # [B, H, d]
        query = attention.q_norm(query) * attention.scale
        if isinstance(attention.k_norm, nn.Identity):
            # q (W x) = (W^T q) x: one vector a head instead of a projection of every token. The bias of the keys adds
            # the same to all logits of a head, which softmax does not see.
            weight = attention.qkv.weight.unflatten(0, (3, attention.num_heads, -1))[1]  # [H, d, C]
            return cls_row(torch.einsum("bhd,hdc->bhc", query, weight) @ x.transpose(-2, -1), tokens)
        key = attention.k_norm(self._part(attention, 1, x))
        return cls_row(torch.einsum("bhd,blhd->bhl", query, key), tokens)

    def mean_key(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attention = self.host.blocks[block - 1].attn
        x = self._normed(block, tokens)
        if not isinstance(attention.k_norm, nn.Identity):
            return attention.k_norm(self._part(attention, 1, x)).mean(dim=2)
        # The mean of projections is the projection by the mean.
        heads = (3, attention.num_heads, -1)
        bias = None if attention.qkv.bias is None else attention.qkv.bias.unflatten(0, heads)[1].mean(dim=0)
        return F.linear(x, attention.qkv.weight.unflatten(0, heads)[1].mean(dim=0), bias)

    def value_norms(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        value = self._part(self.host.blocks[block - 1].attn, 2, self._normed(block, tokens)[:, self.prefix :])
        return value.float().norm(dim=3).transpose(1, 2)

    def reading_macs(self, field: str, tokens: int) -> int:
        attention = self.host.blocks[0].attn
        dim, heads = self.dim, attention.num_heads
        if not isinstance(attention.k_norm, nn.Identity):
            return super().reading_macs(field, tokens)
        # The keys themselves are not computed.
        cost = {"cls_attention": 2 * dim * dim + tokens * dim * heads, "mean_key": tokens * dim * dim // heads}
        return cost[field] if field in cost else super().reading_macs(field, tokens)

    def _part(self, attention: Any, part: int, x: Tensor) -> Tensor:
        """Queries (0), keys (1) or values (2) of x [..., C], [..., H, d]."""
        bias = None if attention.qkv.bias is None else attention.qkv.bias.chunk(3)[part]
        return F.linear(x, attention.qkv.weight.chunk(3)[part], bias).unflatten(-1, (attention.num_heads, -1))


ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}
