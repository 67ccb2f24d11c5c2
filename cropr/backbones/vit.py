"""timm ``VisionTransformer``: ViT, DeiT, MAE, DINOv2; any prefix tokens, LayerScale, q/k norm, post-norm, parallel."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor
from torch.nn import functional as F

from cropr.backbones.base import Backbone, cls_row
from cropr.tokens import Tokens

_BLOCKS = (
    timm_vit.Block,
    timm_vit.ResPostBlock,
    timm_vit.ParallelScalingBlock,
    timm_vit.ParallelThingsBlock,
)


class ViTBackbone(Backbone):
    """Plain blocks without positions of their own: a token's place matters in the embedding only."""

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        return Tokens.full(x, self.prefix), None

    def run(self, block: int, tokens: Tokens, position: Any) -> Tokens:
        return tokens.replace(self._call(block, tokens.x))

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        module = self.host.blocks[block - 1]
        attention = module.attn
        x = module.norm1(tokens.x) if isinstance(module, timm_vit.Block) else tokens.x
        width = attention.attn_dim
        weight, bias = attention.qkv.weight, attention.qkv.bias

        def project(x: Tensor, part: int) -> Tensor:
            rows = slice(part * width, (part + 1) * width)
            y = F.linear(x, weight[rows], None if bias is None else bias[rows])
            return y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        query = attention.q_norm(project(x[:, :1], 0))
        return cls_row(query, attention.k_norm(project(x, 1)), attention.scale, self.prefix)

    def verify_cls_attention(self) -> None:
        if self.host.cls_token is None:
            raise self._refuse("no class token, for a reducer that reads its attention,")
        for module in self.host.blocks:
            supported = isinstance(module, (timm_vit.Block, timm_vit.ResPostBlock))
            if not supported or type(module.attn) is not Attention:
                raise self._refuse(f"blocks of type {type(module).__name__}, for a reducer that reads attention,")

    def _verify(self) -> None:
        self._verify_common(timm_vit.VisionTransformer, _BLOCKS)
