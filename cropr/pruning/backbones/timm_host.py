"""What timm's models have in common: names of parts, poolings, checkpointing."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cropr.pruning.backbones.base import Backbone, gated_attention
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
        host = self.host
        self.image_size, self.patch_size = host.patch_embed.img_size, host.patch_embed.patch_size
        self.has_cls = host.cls_token is not None

    def norm(self, tokens: Tokens) -> Tokens:
        return tokens.replace(self.host.norm(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        host = self.host
        if tokens.weight is None or host.global_pool == "token":
            return host.forward_head(tokens.x)
        if host.global_pool != "avg":
            raise self._refuse(f"pooling {host.global_pool!r}, for tokens that differ in weight,")
        lead = self.prefix if getattr(host, "pool_include_prefix", False) else 0
        return host.head(host.head_drop(host.fc_norm(self._mean(tokens, lead))))

    def predict(self, tokens: Tokens) -> Tokens:
        host = self.host
        return tokens.replace(host.head(host.head_drop(host.fc_norm(tokens.x))))

    def verify_predict(self) -> None:
        if self.pools_by_attention:
            raise self._refuse("attention pooling, for a prediction per patch,")
        if getattr(self.host, "head_dist", None) is not None:
            raise self._refuse("a second head for distillation, for a prediction per patch,")
        if not isinstance(self.host.head, nn.Linear):
            raise self._refuse("no classes (num_classes=0), for a prediction per patch,")

    def _attended(self, module: Any, x: Tensor, block: int, tokens: Tokens, position: Any) -> Tensor:
        normed, attention = module.norm1(x), module.attn
        if tokens.gate is None:
            found = attention(normed, **self._arguments(block, tokens, position))
        else:
            heads = gated_attention(*self._project(block, normed, tokens, position), tokens.gate, self.prefix)
            found = attention.norm(heads.transpose(1, 2).flatten(2))
            if attention.gate is not None:
                found = found * attention.gate(normed).sigmoid()
            found = attention.proj_drop(attention.proj(found))
        return x + module.drop_path1(self._scale(module, 1, found))

    def _transformed(self, module: Any, x: Tensor) -> Tensor:
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
