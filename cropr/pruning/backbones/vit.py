"""timm ``VisionTransformer``: ViT, DeiT, MAE, DINOv2; any prefix tokens, LayerScale, q/k norm, post-norm, parallel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.backbones.base import cls_row
from cropr.pruning.backbones.timm_host import TimmBackbone
from cropr.pruning.tokens import Tokens


class ViTBackbone(TimmBackbone):
    """Plain blocks without positions of their own: a token's place matters in the embedding only."""

    host_type: ClassVar[Any] = timm_vit.VisionTransformer
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

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attention = self.host.blocks[block - 1].attn
        if not isinstance(attention.k_norm, nn.Identity):
            return super().cls_attention(block, tokens, position)
        # q (W x) = (W^T q) x: one vector a head instead of a projection of every token. The bias of the keys adds the
        # same to all logits of a head, which softmax does not see.
        x = self._normed(block, tokens)
        query = self._part(block, 0, x[:, :1]).squeeze(2)  # [B, H, d]
        weight = attention.qkv.weight.unflatten(0, (3, attention.num_heads, -1))[1]  # [H, d, C]
        return cls_row(torch.einsum("bhd,hdc->bhc", query, weight) @ x.transpose(-2, -1), tokens)

    def mean_key(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attention = self.host.blocks[block - 1].attn
        if not isinstance(attention.k_norm, nn.Identity):
            return super().mean_key(block, tokens, position)
        # The mean of projections is the projection by the mean.
        heads = (3, attention.num_heads, -1)
        bias = None if attention.qkv.bias is None else attention.qkv.bias.unflatten(0, heads)[1].mean(dim=0)
        return F.linear(self._normed(block, tokens), attention.qkv.weight.unflatten(0, heads)[1].mean(dim=0), bias)

    def reading_macs(self, field: str, tokens: int) -> int:
        attention = self.blocks[0].attn
        dim, heads = self.dim, attention.num_heads
        if not isinstance(attention.k_norm, nn.Identity):
            return super().reading_macs(field, tokens)
        # The keys themselves are not computed.
        cost = {"cls_attention": 2 * dim * dim + tokens * dim * heads, "mean_key": tokens * dim * dim // heads}
        return cost[field] if field in cost else super().reading_macs(field, tokens)


ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}
