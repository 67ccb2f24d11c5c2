"""Semantic segmentation: a prediction per patch, upsampled; one query per patch in every Cropr module.

B batch, P prefix tokens, N = h w patches, K survivors, C channels, Q queries, M Cropr modules, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cropr.data.ade20k import IGNORE
from cropr.pruning.backbones import Backbone
from cropr.pruning.fusion import Fusion
from cropr.pruning.methods import REDUCERS
from cropr.pruning.model import Output, PrunedViT
from cropr.pruning.reducers import Reducer
from cropr.pruning.reducers.select import Cropr
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens, take
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import Losses, build_model


class PrunedSegmenter(PrunedViT):
    """A host with token pruning that predicts a class for every pixel: logits [B, classes, H, W].

    The host's norm and linear classifier serve every token, without pooling (the authors' head: with average pooling,
    timm's name of that norm is ``fc_norm``); the predictions return to raster order and are upsampled bilinearly.
    Patches that no fusion brought back take the prediction of the nearest survivor (ours: the paper does not say).

    Images may have any size that the host takes; modules with queries are trained on images of the size that the host
    was built for, since each query belongs to one patch. Raises TypeError for a host without a linear classifier that
    suits single tokens, ValueError for modules with another number of queries than there are patches.
    """

    dense: ClassVar[bool] = True

    def __init__(
        self, backbone: Backbone, schedule: Schedule, reducers: Mapping[int, Reducer], fusion: Fusion | None
    ) -> None:
        backbone.verify_predict()
        super().__init__(backbone, schedule, reducers, fusion)
        for reducer in reducers.values():
            if isinstance(reducer, Cropr):
                _require_queries(reducer.scorer.queries.shape[1], backbone.grid_size)

    @classmethod
    def default_options(cls, reducer: str, backbone: Backbone) -> dict[str, Any]:
        """One query per patch."""
        return {"num_queries": backbone.num_patches} if "num_queries" in REDUCERS[reducer].options else {}

    def _predict(self, images: Tensor, tokens: Tokens, pruned: Mapping[int, Tokens]) -> Tensor:
        scores = self._fuse("after_head", self.backbone.predict(tokens), pruned)
        patches = spread(scores, self.backbone.grid(images))
        return F.interpolate(patches, images.shape[-2:], mode="bilinear", align_corners=False)


def build(
    model: ModelSpec, spec: PruneSpec, num_classes: int, image_size: int, pretrained: bool = False
) -> PrunedSegmenter:
    """The segmenter of a training spec; raises what ``PrunedSegmenter`` raises.

    EVA-02 at the paper's scale is ``ModelSpec(name="eva02_large_patch14_224.mim_m38m", args={"patch_size": 16})`` with
    ``image_size=512``: timm then resamples patch embedding and positions of the pretrained weights itself.
    """
    return build_model(model, spec, num_classes, image_size, pretrained, PrunedSegmenter)


def spread(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Values of the patch tokens at their places, [B, C, h, w]; empty places take those of the nearest patch alive, or
    of the token that their patch went into.

    Nearest in the grid, Euclidean; of two at the same distance, the one that comes first in raster order.
    """
    assert tokens.index is not None
    size, columns, device = grid[0] * grid[1], grid[1], tokens.index.device
    if tokens.source is not None:
        source = tokens.source
    elif tokens.num_patches == size:
        position = torch.arange(size, device=device).expand_as(tokens.index)
        source = torch.empty_like(tokens.index).scatter(1, tokens.index, position)
    else:
        place, alive = torch.arange(size, device=device)[:, None], tokens.index[:, None]
        distance = (place // columns - alive // columns) ** 2 + (place % columns - alive % columns) ** 2
        source = (distance * size + alive).argmin(dim=2)  # over [B, h w, K]
    return take(tokens.x, source + tokens.prefix).transpose(1, 2).unflatten(2, grid)


def losses(output: Output, target: Tensor, aux_weight: float = 1.0) -> Losses:
    """Main loss plus the weighted sum of the auxiliary losses: cross-entropy over all labelled pixels or patches.

    A batch without a label gives zeros. Means are over the labelled pixels of the batch, as in the authors' code;
    micro-batches of an accumulated step weigh by images, not by labels.

    ``target`` is [B, H, W] integers, ``IGNORE`` where there is no label. The target of an auxiliary prediction
    [B, Q, classes] is the label of each patch (``patch_labels``); raises ValueError for another grid than the images'.
    """
    target = target.long()
    main = F.cross_entropy(output.logits.float(), target, ignore_index=IGNORE, reduction="sum") / _labelled(target)
    if not output.aux:
        return Losses(main + output.extra_loss, main, main.new_empty(0))
    _require_queries(output.aux[0].shape[1], output.grid)
    logits = torch.stack(output.aux).float()  # [M, B, Q, classes]
    labels = patch_labels(target, output.grid).flatten(1).expand(logits.shape[:3])
    each = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    aux = each.view(len(logits), -1).sum(dim=1) / _labelled(labels[0])
    return Losses(main + aux_weight * aux.sum() + output.extra_loss, main, aux)


def patch_labels(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels [B, h, w] of the patches of maps [B, H, W]: those of the pixels in their upper left corners."""
    return F.interpolate(target[:, None].float(), grid, mode="nearest")[:, 0].long()


def _labelled(target: Tensor) -> Tensor:
    return (target != IGNORE).sum().clamp(min=1)


def _require_queries(queries: int, grid: tuple[int, int]) -> None:
    if queries != grid[0] * grid[1]:
        raise ValueError(
            f"{queries} queries for a grid of {grid[0]} x {grid[1]} patches: each query is trained on one patch, which "
            f"ties training to one grid; set num_queries to {grid[0] * grid[1]}, or train on images that have "
            f"{queries} patches (evaluation and deployment take any)"
        )
