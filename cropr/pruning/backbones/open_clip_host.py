"""open_clip ``VisionTransformer``, the ``visual`` tower of its CLIP models, with images of one size."""

from typing import Any

from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from cropr.pruning.backbones.base import Backbone
from cropr.pruning.tokens import Tokens


class OpenClipBackbone(Backbone):
    """``head`` gives the image embedding [B, output_dim]; ``norm`` nothing, since the host's belongs to its pooling."""

    path, switch = "transformer.resblocks", "transformer.grad_checkpointing"
    masks, host_type = False, VisionTransformer
    block_types = (ResidualAttentionBlock, CustomResidualAttentionBlock)

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self.dim, self.prefix, self.heads = host.transformer.width, 1, self.blocks[0].attn.num_heads
        self.image_size, self.patch_size = host.image_size, host.patch_size

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        return Tokens.full(self.host._embeds(images), 1), None

    def norm(self, tokens: Tokens) -> Tokens:
        return tokens

    def head(self, tokens: Tokens) -> Tensor:
        pooled, _ = self.host._pool(tokens.x)
        return pooled if self.host.proj is None else pooled @ self.host.proj

    def _verify(self) -> None:
        host = self.host
        super()._verify()
        if host.output_tokens or host.pool_type == "none" or not host.transformer.batch_first:
            raise self._refuse("output_tokens=True, pool_type='none' or batch_first=False")
        if not isinstance(host.patch_dropout, nn.Identity):
            raise self._refuse("patch dropout")


ADAPTERS = {"open_clip.transformer.VisionTransformer": "OpenClipBackbone"}
