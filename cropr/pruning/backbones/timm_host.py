"""What timm's models have in common: names of parts, poolings, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cropr.pruning.backbones.base import Backbone, gated_attention
from cropr.pruning.tokens import Tokens


class TimmBackbone(Backbone):
    """Adapter to a timm model, through its documented surface."""

    host_type: ClassVar[type[nn.Module]]
    """Class of the host; a subclass must not have a ``forward_features`` of its own, which we would skip."""
    halved_types: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of blocks with a norm before each half."""
    attention_type: ClassVar[type[nn.Module]]
    """Class of a block's ``attn`` whose projections can be read."""
    gates: ClassVar[bool] = True

    @property
    def blocks(self) -> Sequence[Any]:
        return self.host.blocks

    @property
    def dim(self) -> int:
        return self.host.embed_dim

    @property
    def heads(self) -> int:
        return self.host.blocks[0].attn.num_heads

    @property
    def prefix(self) -> int:
        return self.host.num_prefix_tokens

    @property
    def has_cls(self) -> bool:
        return self.host.cls_token is not None

    @property
    def pools_by_attention(self) -> bool:
        return getattr(self.host, "attn_pool", None) is not None

    @property
    def num_classes(self) -> int:
        return self.host.num_classes or 0

    @property
    def image_size(self) -> tuple[int, int]:
        return self.host.patch_embed.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.host.patch_embed.patch_size

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
            found = attention.proj_drop(attention.proj(attention.norm(heads.transpose(1, 2).flatten(2))))
        return x + module.drop_path1(self._scale(module, 1, found))

    def _transformed(self, module: Any, x: Tensor) -> Tensor:
        return x + module.drop_path2(self._scale(module, 2, module.mlp(module.norm2(x))))

    def _scale(self, module: Any, half: int, x: Tensor) -> Tensor:
        """LayerScale of the first or second half of a block."""
        raise NotImplementedError

    def _normed(self, block: int, tokens: Tokens) -> Tensor:
        module = self.host.blocks[block - 1]
        return module.norm1(tokens.x) if type(module) in self.halved_types else tokens.x

    def _can_read(self, module: Any) -> bool:
        return type(getattr(module, "attn", None)) is self.attention_type

    def _can_halve(self, module: Any) -> bool:
        return type(module) in self.halved_types

    def _call(self, function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
        if self.host.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, x, use_reentrant=False, **arguments)
        return function(x, **arguments)

    def _verify(self) -> None:
        if type(self.host).forward_features is not self.host_type.forward_features:  # type: ignore[attr-defined]
            raise self._refuse("a forward_features of its own")
        super()._verify()
        drop = getattr(self.host, "patch_drop", None)
        if drop is not None and not isinstance(drop, nn.Identity):
            raise self._refuse("patch dropout (patch_drop_rate > 0)")
