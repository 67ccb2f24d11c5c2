"""timm ``Eva``: EVA-02 and other models with rotary positions, whose rows must follow the kept tokens."""

from typing import Any, ClassVar

import torch
from timm.layers import apply_keep_indices_nlc, apply_rot_embed_cat
from timm.models import eva as timm_eva
from torch import Tensor

from cropr.pruning.backbones.vit import TimmBackbone
from cropr.pruning.tokens import Tokens


class EvaBackbone(TimmBackbone):
    """Blocks that take a rotary table; ``position`` is the host's table for the full grid, or None."""

    host_type: ClassVar[Any] = timm_eva.Eva
    block_types = (timm_eva.EvaBlock, timm_eva.EvaBlockPostNorm)
    halved_types = (timm_eva.EvaBlock,)
    attention_type = timm_eva.EvaAttention

    def embed(self, images: Tensor) -> tuple[Tokens, Any]:
        host = self.host
        x, rope = host._pos_embed(host.patch_embed(images))
        return Tokens.full(host.norm_pre(x), self.prefix), rope

    def _arguments(self, block: int, tokens: Tokens, position: Any, mask: Tensor | None = None) -> dict[str, Any]:
        return {**super()._arguments(block, tokens, position, mask), "rope": self._rope(block, tokens, position)}

    def _turn(self, block: int, x: Tensor, tokens: Tokens, position: Any) -> Tensor:
        rope, half = self._rope(block, tokens, position), self.host.blocks[block - 1].attn.rotate_half
        if rope is None:
            return x
        lead, patches = x[:, :, : self.prefix], x[:, :, self.prefix :]
        return torch.cat((lead, apply_rot_embed_cat(patches, rope, half=half)), dim=2).type_as(x)

    def _rope(self, block: int, tokens: Tokens, position: Any) -> Tensor | None:
        """Rotary rows of the tokens alive: [B, 1, N, 2 d], or [B, H, N, 2 d] where the table has heads."""
        if position is None:
            return None
        assert tokens.index is not None
        mixed = any(getattr(self.host, name, False) for name in ("rope_mixed", "rope_is_mixed"))
        table = position[block - 1] if mixed else position
        rows = apply_keep_indices_nlc(tokens.x, table, tokens.index)
        return rows.unsqueeze(1) if table.ndim == 2 else rows


ADAPTERS = {"timm.models.eva.Eva": "EvaBackbone"}
