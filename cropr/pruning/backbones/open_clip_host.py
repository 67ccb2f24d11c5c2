"""open_clip ``VisionTransformer``: the ``visual`` tower of its CLIP models. Towers from timm are pruned as timm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cropr.pruning.backbones.multihead import MultiheadBackbone
from cropr.pruning.tokens import Tokens


class OpenClipBackbone(MultiheadBackbone):
    """One class token, learned positions, images of one size; ``head`` gives the image embedding [B, output_dim]."""

    block_types = (ResidualAttentionBlock,)
    attention = "attn"

    @property
    def blocks(self) -> Sequence[Any]:
        return self.host.transformer.resblocks

    @property
    def dim(self) -> int:
        return self.host.transformer.width

    @property
    def prefix(self) -> int:
        return 1

    @property
    def pools_by_attention(self) -> bool:
        return self.host.attn_pool is not None

    @property
    def num_classes(self) -> int:
        return 0

    @property
    def image_size(self) -> tuple[int, int]:
        return self.host.image_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.host.patch_size

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        return Tokens.full(self.host._embeds(images), 1), None

    def norm(self, tokens: Tokens) -> Tokens:
        """As they are: the host's norm belongs to its pooling."""
        return tokens

    def head(self, tokens: Tokens) -> Tensor:
        host = self.host
        if tokens.weight is not None and host.pool_type == "avg":
            after = host.final_ln_after_pool
            mean = self._mean(tokens if after else tokens.replace(host.ln_post(tokens.x)))
            pooled = host.ln_post(mean) if after else mean
        else:
            pooled, _ = host._pool(tokens.x)
        return pooled if host.proj is None else pooled @ host.proj

    def _scaled(self, module: Any, half: int, x: Tensor) -> Tensor:
        return module.ls_1(x) if half == 1 else module.ls_2(x)

    def _call(self, function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
        if self.host.transformer.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, x, use_reentrant=False, **arguments)
        return function(x, **arguments)

    def _verify(self) -> None:
        host = self.host
        if type(host).forward is not VisionTransformer.forward:
            raise self._refuse("a forward of its own")
        super()._verify()
        if not host.transformer.batch_first:
            raise self._refuse("batch_first=False")
        if host.output_tokens or host.pool_type == "none":
            raise self._refuse("an output of all its tokens (output_tokens=True or pool_type='none')")
        if not isinstance(host.patch_dropout, nn.Identity):
            raise self._refuse("patch dropout")


ADAPTERS = {"open_clip.transformer.VisionTransformer": "OpenClipBackbone"}
