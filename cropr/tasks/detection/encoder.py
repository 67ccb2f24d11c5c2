"""The encoder of a detector: a pruned plain ViT with windows, whose output is a map.

B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from cropr.pruning.backbones import Backbone, windowed
from cropr.pruning.fusion import Fusion
from cropr.pruning.model import DeployedViT, PrunedViT, prune
from cropr.pruning.reducers import Reducer
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.detection import DetModelSpec


class Encoder(PrunedViT):
    """``logits`` of its output are the map [B, C, rows, columns]: the last block's tokens in their places. Raises
    ValueError for pruning without fusion, since the pyramid needs all tokens."""

    def __init__(
        self, backbone: Backbone, schedule: Schedule, reducers: Mapping[int, Reducer], fusion: Fusion | None
    ) -> None:
        if reducers and fusion is None:
            raise ValueError("a detector needs the whole map: choose a fusion that brings pruned tokens back, as 'llf'")
        super().__init__(backbone, schedule, reducers, fusion)

    def deploy(self) -> DeployedViT:
        return DeployedViT(Encoder(*self._inference_parts())).requires_grad_(False).eval()

    def _predict(self, images: Tensor, tokens: Tokens, pruned: Mapping[int, Tokens]) -> Tensor:
        return tokens.raster().patches.unflatten(1, self.backbone.grid(images)).permute(0, 3, 1, 2).contiguous()


def build_encoder(
    model: ModelSpec,
    spec: PruneSpec,
    detector: DetModelSpec,
    num_outputs: int,
    image_size: int | tuple[int, int],
    pretrained: bool = False,
) -> Encoder:
    """The encoder of a detector.

    Its map goes into the pyramid without a final norm, as in ViTDet and EVA-02. The last block has no drop path where
    tokens are pruned, as in classification.

    Args:
        model: a timm ViT or EVA-02; it is built without prefix tokens, norm after the last block and classifier.
        num_outputs: of the auxiliary heads.
        image_size: pixels that the host is built for, a side or height and width.

    Raises:
        TypeError: a host that cannot have windows, by name.
        ValueError: a schedule that leaves no whole windows, or pruning without fusion.
    """
    arguments: dict[str, Any] = {
        "num_classes": 0,
        "class_token": False,
        "global_pool": "avg",
        "dynamic_img_size": True,
        "drop_path_rate": model.drop_path,
        **model.args,
    }
    host: Any = timm.create_model(model.name, img_size=image_size, **arguments)
    if pretrained:
        # timm loads positions only into a model with as many prefix tokens as they were made for.
        donor = timm.create_model(model.name, pretrained, img_size=image_size, **{**arguments, "class_token": True})
        weights = {name: tensor for name, tensor in donor.state_dict().items() if name != "cls_token"}
        weights["pos_embed"] = weights["pos_embed"][:, -host.pos_embed.shape[1] :]
        host.load_state_dict(weights)
    host.norm, host.fc_norm = nn.Identity(), nn.Identity()
    backbone = windowed(host, detector.window, detector.global_blocks)
    arguments = {"num_outputs": num_outputs, "kind": Encoder}
    schedule = Schedule.from_config(spec.schedule)
    encoder: Encoder = prune(backbone, schedule, spec.reducer, spec.fusion, spec.options, **arguments)
    if encoder.reducers:
        for name in [name for name, _ in host.blocks[-1].named_children() if name.startswith("drop_path")]:
            setattr(host.blocks[-1], name, nn.Identity())
    return encoder
