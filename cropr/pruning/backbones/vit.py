"""timm ``VisionTransformer``: ViT, DeiT, MAE, DINOv2; any prefix tokens, LayerScale, q/k norm, post-norm, parallel.

``TimmBackbone`` is what all of timm's models have in common.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone, gated_attention, patch_attention
from cropr.pruning.tokens import Tokens


class TimmBackbone(Backbone):
    """Adapter to a timm model, through its documented surface."""

    entry = "forward_features"
    halved_types: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of blocks with a norm before each half."""
    attention_type: ClassVar[type[nn.Module]]
    """Class of a block's ``attn`` whose projections can be read."""
    gates: ClassVar[bool] = True
    path, switch = "blocks", "grad_checkpointing"

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self.dim, self.prefix, self.num_classes = host.embed_dim, host.num_prefix_tokens, host.num_classes or 0
        self.heads = getattr(getattr(host.blocks[0], "attn", None), "num_heads", 0)
        self.rotary = getattr(host, "rope", None) is not None
        self.pools_by_attention = getattr(host, "attn_pool", None) is not None
        self._read_sizes()

    def _read_sizes(self) -> None:
        embed = self.host.patch_embed
        self.image_size, self.has_cls = embed.img_size, self.host.cls_token is not None
        self.patch_size = embed.feat_ratio(as_scalar=False)  # in pixels; a hybrid's patch_size counts cells

    def norm(self, tokens: Tokens) -> Tokens:
        return tokens.replace(self.host.norm(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        host = self.host
        if tokens.weight is None or host.global_pool == "token":
            return host.forward_head(tokens.x)
        if host.global_pool != "avg":
            raise self._refuse(f"pooling {host.global_pool!r}, for tokens that differ in weight,")
        lead = self.prefix if getattr(host, "pool_include_prefix", False) else 0
        return self._classify(self._mean(tokens, lead))

    def predict(self, tokens: Tokens) -> Tokens:
        return tokens.replace(self._classify(tokens.x))

    def _classify(self, x: Tensor) -> Tensor:
        return self.host.head(self.host.head_drop(self.host.fc_norm(x)))

    def verify_predict(self) -> None:
        if self.pools_by_attention:
            raise self._refuse("attention pooling, for a prediction per patch,")
        if getattr(self.host, "head_dist", None) is not None:
            raise self._refuse("a second head for distillation, for a prediction per patch,")
        if not isinstance(self.host.head, nn.Linear):
            raise self._refuse("no classes (num_classes=0), for a prediction per patch,")

    def _attended(self, block: int, x: Tensor, tokens: Tokens, position: Any) -> Tensor:
        module = self.blocks[block - 1]
        normed, attention = module.norm1(x), module.attn
        if tokens.gate is None:
            found = attention(normed, **self._arguments(block, tokens, position))
        else:
            heads = gated_attention(*self._project(block, normed, tokens, position), tokens.gate, self.prefix)
            found = attention.norm(heads.transpose(1, 2).flatten(2))
            if (gate := getattr(attention, "gate", None)) is not None:
                found = found * gate(normed).sigmoid()
            found = attention.proj_drop(attention.proj(found))
        return x + module.drop_path1(self._scale(module, 1, found))

    def _transformed(self, block: int, x: Tensor) -> Tensor:
        module = self.blocks[block - 1]
        return x + module.drop_path2(self._scale(module, 2, module.mlp(module.norm2(x))))

    def _scale(self, module: Any, half: int, x: Tensor) -> Tensor:
        """LayerScale of the first or second half of a block: a module of ViT, a parameter or None of EVA."""
        if hasattr(module, f"ls{half}"):
            return getattr(module, f"ls{half}")(x)
        gamma = getattr(module, f"gamma_{half}")
        return x if gamma is None else gamma * x

    def _normed(self, block: int, tokens: Tokens) -> Tensor:
        module = self.host.blocks[block - 1]
        return module.norm1(tokens.x) if type(module) in self.halved_types else tokens.x

    def _part(self, block: int, part: int, x: Tensor) -> Tensor:
        attention, letter = self.host.blocks[block - 1].attn, "qkv"[part]
        if attention.qkv is None:
            found = getattr(attention, f"{letter}_proj")(x)
        else:
            fused = attention.qkv.bias
            bias = getattr(attention, f"{letter}_bias", None) if fused is None else fused.chunk(3)[part]
            found = F.linear(x, attention.qkv.weight.chunk(3)[part], bias)
        found = found.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        if part == 2:
            return found
        return attention.q_norm(found) * attention.scale if part == 0 else attention.k_norm(found)

    def _can_read(self, module: Any) -> bool:
        return type(getattr(module, "attn", None)) is self.attention_type

    def _can_halve(self, module: Any) -> bool:
        return type(module) in self.halved_types

    def _verify(self) -> None:
        super()._verify()
        drop = getattr(self.host, "patch_drop", None)
        if drop is not None and not isinstance(drop, nn.Identity):
            raise self._refuse("patch dropout (patch_drop_rate > 0)")
        if getattr(getattr(self.host, "patch_embed", None), "dynamic_img_pad", False):
            raise self._refuse("dynamic_img_pad")


class ViTBackbone(TimmBackbone):
    """Plain blocks without positions of their own: a token's place matters in the embedding only."""

    host_type: ClassVar[Any] = timm_vit.VisionTransformer
    block_types = (timm_vit.Block, timm_vit.ResPostBlock, timm_vit.ParallelScalingBlock, timm_vit.ParallelThingsBlock)
    halved_types = (timm_vit.Block,)
    attention_type = Attention

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        return Tokens.full(x, self.prefix), None

    def cls_attention(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attn = self.blocks[block - 1].attn
        if not isinstance(attn.k_norm, nn.Identity):
            return super().cls_attention(block, tokens, position)
        # q (W x) = (W^T q) x: one vector a head instead of a projection of every token. The bias of the keys adds the
        # same to all logits of a head, which softmax does not see.
        x = self._normed(block, tokens)
        query = self._part(block, 0, x[:, :1]).squeeze(2)  # [B, H, d]
        weight = attn.qkv.weight.unflatten(0, (3, attn.num_heads, -1))[1]  # [H, d, C]
        logits = torch.einsum("bhd,hdc->bhc", query, weight) @ x.transpose(-2, -1)
        return patch_attention(logits.unsqueeze(2), tokens).squeeze(2)

    def mean_key(self, block: int, tokens: Tokens, position: Any) -> Tensor:
        attn = self.blocks[block - 1].attn
        if not isinstance(attn.k_norm, nn.Identity):
            return super().mean_key(block, tokens, position)
        # The mean of projections is the projection by the mean.
        heads = (3, attn.num_heads, -1)
        bias = None if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, heads)[1].mean(dim=0)
        return F.linear(self._normed(block, tokens), attn.qkv.weight.unflatten(0, heads)[1].mean(dim=0), bias)

    def reading_macs(self, field: str, tokens: int) -> int:
        attention = self.blocks[0].attn
        dim, heads = self.dim, attention.num_heads
        if not isinstance(attention.k_norm, nn.Identity):
            return super().reading_macs(field, tokens)
        # The keys themselves are not computed.
        cost = {"cls_attention": 2 * dim * dim + tokens * dim * heads, "mean_key": tokens * dim * dim // heads}
        return cost[field] if field in cost else super().reading_macs(field, tokens)


ADAPTERS = {"timm.models.vision_transformer.VisionTransformer": "ViTBackbone"}
