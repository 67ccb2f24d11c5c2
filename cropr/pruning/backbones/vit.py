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
    attention_type = Attention

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        return Tokens.full(x, self.prefix), None

    def run(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> Tokens:
        return tokens.replace(self._call(block, tokens.x, attn_mask=mask))

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        module = self.host.blocks[block - 1]
        attention = module.attn
        x = module.norm1(tokens.x) if isinstance(module, timm_vit.Block) else tokens.x
        heads = attention.num_heads
        query_weight, key_weight, _ = attention.qkv.weight.unflatten(0, (3, heads, -1))  # each [H, d, C]
        query_bias, key_bias = None, None
        if attention.qkv.bias is not None:
            query_bias, key_bias, _ = attention.qkv.bias.unflatten(0, (3, -1))
        query = F.linear(x[:, 0], query_weight.flatten(0, 1), query_bias).unflatten(-1, (heads, -1))
        query = attention.q_norm(query)  # [B, H, d]
        if isinstance(attention.k_norm, nn.Identity):
            # q (W x) = (W^T q) x: one vector a head instead of a projection of every token. The bias of the keys adds
            # the same to all logits of a head, which softmax does not see.
            folded = torch.einsum("bhd,hdc->bhc", query, key_weight)
            return cls_row(folded @ x.transpose(-2, -1), attention.scale, self.prefix)
        key = F.linear(x, key_weight.flatten(0, 1), key_bias).unflatten(-1, (heads, -1))
        logits = torch.einsum("bhd,blhd->bhl", query, attention.k_norm(key))
        return cls_row(logits, attention.scale, self.prefix)


ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}
