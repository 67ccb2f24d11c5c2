"""torchvision ``VisionTransformer``: ``vit_b_16`` and its kin, with images of one size. Their blocks take no mask."""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from cropr.pruning.backbones.base import Backbone
from cropr.pruning.tokens import Tokens


class TorchvisionBackbone(Backbone):
    """Adapter to torchvision's model."""

    path = "encoder.layers"
    masks, host_type = False, VisionTransformer
    block_types = (EncoderBlock,)

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self.dim, self.prefix, self.num_classes = host.hidden_dim, 1, host.heads[-1].out_features
        self.heads = self.blocks[0].num_heads
        self.image_size, self.patch_size = (host.image_size,) * 2, (host.patch_size,) * 2

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host, patches = self.host, self.host._process_input(images)
        x = torch.cat((host.class_token.expand(patches.shape[0], -1, -1), patches), dim=1) + host.encoder.pos_embedding
        return Tokens.full(host.encoder.dropout(x), 1), None

    def norm(self, tokens: Tokens) -> Tokens:
        return tokens.replace(self.host.encoder.ln(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        return self.host.heads(tokens.x[:, 0])


ADAPTERS = {"torchvision.models.vision_transformer.VisionTransformer": "TorchvisionBackbone"}
