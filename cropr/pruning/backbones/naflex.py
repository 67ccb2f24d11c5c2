"""timm ``NaFlexVit`` on images [B, 3, H, W]; its batches of patches with padding are not taken."""

from typing import Any, ClassVar

from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from cropr.pruning.backbones.eva import EvaBackbone
from cropr.pruning.backbones.vit import TimmBackbone, ViTBackbone
from cropr.pruning.tokens import Tokens


class NaFlexBackbone(TimmBackbone):
    """What differs from timm's other models: the embedding, and where the sizes stand. Made by ``naflex``."""

    host_type: ClassVar[Any] = NaFlexVit

    def _read_sizes(self) -> None:
        embeds = self.host.embeds
        if embeds.pos_embed_grid_size is None:
            raise self._refuse("no grid of position embeddings, which says the image size,")
        (rows, columns), self.patch_size = embeds.pos_embed_grid_size, embeds.patch_size
        self.image_size = rows * self.patch_size[0], columns * self.patch_size[1]
        self.has_cls = embeds.cls_token is not None

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        found = self.host._forward_embeds(images, None, None, None)
        return Tokens.full(found["patches"], self.prefix), found["rope_embeds"]


class NaFlexPlain(NaFlexBackbone, ViTBackbone):
    """With the blocks of ``VisionTransformer``."""


class NaFlexEva(NaFlexBackbone, EvaBackbone):
    """With the blocks of ``Eva``."""


def naflex(host: nn.Module) -> NaFlexBackbone:
    """The adapter by the type of the blocks. Raises TypeError as ``Backbone`` does."""
    return (NaFlexEva if isinstance(host.blocks[0], EvaBlock) else NaFlexPlain)(host)  # type: ignore[index]


ADAPTERS = {"timm.models.naflexvit.NaFlexVit": "naflex"}
