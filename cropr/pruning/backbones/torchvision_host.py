"""torchvision ``VisionTransformer``: ``vit_b_16`` and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from cropr.pruning.backbones.multihead import MultiheadBackbone
from cropr.pruning.tokens import Tokens


class TorchvisionBackbone(MultiheadBackbone):
    """One class token, learned positions, images of one size."""

    block_types = (EncoderBlock,)
    attention = "self_attention"

    @property
    def blocks(self) -> Sequence[Any]:
        return self.host.encoder.layers

    @property
    def dim(self) -> int:
        return self.host.hidden_dim

    @property
    def prefix(self) -> int:
        return 1

    @property
    def num_classes(self) -> int:
        return self.host.heads[-1].out_features

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.host.image_size,) * 2

    @property
    def patch_size(self) -> tuple[int, int]:
        return (self.host.patch_size,) * 2

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        patches = host._process_input(images)
        x = torch.cat((host.class_token.expand(len(patches), -1, -1), patches), dim=1) + host.encoder.pos_embedding
        return Tokens.full(host.encoder.dropout(x), 1), None

    def norm(self, tokens: Tokens) -> Tokens:
        return tokens.replace(self.host.encoder.ln(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        return self.host.heads(tokens.x[:, 0])

    def predict(self, tokens: Tokens) -> Tokens:
        return tokens.replace(self.host.heads(tokens.x))

    def verify_predict(self) -> None:
        """Its heads are linear layers, which suit single tokens."""

    def _scaled(self, module: Any, half: int, x: Tensor) -> Tensor:
        return module.dropout(x) if half == 1 else x

    def _verify(self) -> None:
        if type(self.host).forward is not VisionTransformer.forward:
            raise self._refuse("a forward of its own")
        super()._verify()


ADAPTERS = {"torchvision.models.vision_transformer.VisionTransformer": "TorchvisionBackbone"}
