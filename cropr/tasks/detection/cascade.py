"""Cascade Mask R-CNN (Cai and Vasconcelos, 2018): stages of growing strictness, each on the boxes of the one before.

With one stage it is Mask R-CNN with class-agnostic boxes, the lighter choice for small machines.

R regions, G objects of an image, M detections, K classes without background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.nms import Picks, nms, soft_nms
from cropr.tasks.detection.regions import BOX_SIZE, MASK_SIZE, BoxStage, MaskHead, RegionPooler, ScaleGradient

if TYPE_CHECKING:
    from cropr.data.coco import Target

POSITIVE = 0.25
"""Share of the sampled regions that lie on an object, at most."""
SMALLEST = 0.01
"""Pixels a side; refined boxes that are no larger are not trained on."""


class Regions(NamedTuple):
    """Regions of an image and what they are trained on."""

    boxes: Tensor
    """[R, 4]."""
    labels: Tensor
    """[R], 0 for background."""
    matched: Tensor
    """[R], the object with the largest overlap; 0 where there are no objects."""


class Detections(NamedTuple):
    """What was found in an image, by falling score."""

    boxes: Tensor
    """[M, 4]: left, top, right, bottom in pixels of the image as the network saw it."""
    labels: Tensor
    """[M], from 1 to K."""
    scores: Tensor
    """[M]."""
    masks: Tensor
    """[M, s, s]: probabilities within the box."""


class CascadeHeads(nn.Module):
    """Box stages and the mask head.

    Args:
        num_classes: K.
        strides: of the pyramid's levels that regions are pooled from.
    """

    def __init__(self, spec: DetModelSpec, num_classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.pool = RegionPooler(strides, spec.canonical_size, spec.canonical_stride)
        self.stages = nn.ModuleList(
            BoxStage(spec, num_classes, threshold, (10.0 * k, 10.0 * k, 5.0 * k, 5.0 * k))
            for k, threshold in enumerate(spec.stages, start=1)
        )
        self.mask_head = MaskHead(spec, num_classes)
        self.sampler = BalancedPositiveNegativeSampler(spec.rois, POSITIVE)

    # Training ---------------------------------------------------------------------------------------------------

    def losses(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """``loss_classes_k`` and ``loss_box_k`` of every stage k, and ``loss_mask``; all finite without objects."""
        levels = [level.float() for level in levels]
        threshold = self.spec.stages[0]
        regions = [self._sample(boxes, target, threshold) for boxes, target in zip(proposals, targets, strict=True)]
        losses = {"loss_mask": self._mask_loss(levels, regions, targets)}
        for number, stage in enumerate(self.stages, start=1):
            assert isinstance(stage, BoxStage)
            boxes = [region.boxes for region in regions]
            pooled = ScaleGradient.apply(self.pool(levels, boxes, BOX_SIZE), 1 / len(self.stages))
            logits, deltas = stage(pooled)
            labels = torch.cat([region.labels for region in regions])
            truth = torch.cat([_true_boxes(region, target) for region, target in zip(regions, targets, strict=True)])
            parts = stage.loss(logits, deltas, torch.cat(boxes), labels, truth)
            losses |= {f"loss_classes_{number}": parts[0], f"loss_box_{number}": parts[1]}
            if number < len(self.stages):
                refined = stage.refine(deltas, boxes, sizes)
                threshold = self.spec.stages[number]
                regions = [match(_solid(box), target, threshold) for box, target in zip(refined, targets, strict=True)]
        return losses

    @torch.no_grad()
    def _sample(self, proposals: Tensor, target: Target, threshold: float) -> Regions:
        """So many of the proposals and of the true boxes themselves, drawn at random."""
        regions = match(torch.cat((proposals, target["boxes"].to(proposals))), target, threshold)
        positive, negative = self.sampler([regions.labels])
        chosen = (positive[0] | negative[0]).bool()
        return Regions(*(values[chosen] for values in regions))

    def _mask_loss(self, levels: Sequence[Tensor], regions: Sequence[Regions], targets: Sequence[Target]) -> Tensor:
        """Masks are learnt on the first stage's regions on objects."""
        positive = [region.labels > 0 for region in regions]
        boxes = [region.boxes[chosen] for region, chosen in zip(regions, positive, strict=True)]
        matched = [region.matched[chosen] for region, chosen in zip(regions, positive, strict=True)]
        return self.mask_head.loss(self.mask_head(self.pool(levels, boxes, MASK_SIZE)), boxes, matched, targets)

    # Inference --------------------------------------------------------------------------------------------------

    def detect(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Detections of each image by falling score: scores are means over the stages, boxes the last stage's."""
        levels = [level.float() for level in levels]
        boxes, scores = tuple(proposals), []
        for stage in self.stages:
            assert isinstance(stage, BoxStage)
            logits, deltas = stage(self.pool(levels, boxes, BOX_SIZE))
            scores.append(logits.softmax(dim=-1))
            boxes = stage.refine(deltas, boxes, sizes)
        mean = torch.stack(scores).mean(dim=0)[:, 1:].split([len(box) for box in boxes])
        picks = [self._suppress(box, score) for box, score in zip(boxes, mean, strict=True)]
        found = [box[pick.index] for box, pick in zip(boxes, picks, strict=True)]
        labels = torch.cat([pick.labels for pick in picks])
        masks = self.mask_head.probabilities(self.mask_head(self.pool(levels, found, MASK_SIZE)), labels)
        split = masks.split([len(box) for box in found])
        return [
            Detections(box, pick.labels, pick.scores, mask) for box, pick, mask in zip(found, picks, split, strict=True)
        ]

    def _suppress(self, boxes: Tensor, scores: Tensor) -> Picks:
        suppress = soft_nms if self.spec.nms == "soft" else nms
        return suppress(
            boxes,
            scores,
            threshold=self.spec.nms_threshold,
            min_score=self.spec.min_score,
            limit=self.spec.max_detections,
        )


def match(boxes: Tensor, target: Target, threshold: float) -> Regions:
    """Give each box [R, 4] the object that it overlaps most, or the background below ``threshold``."""
    if not len(target["boxes"]):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return Regions(boxes, nothing, nothing)
    overlap, matched = box_iou(target["boxes"].to(boxes), boxes).max(dim=0)
    return Regions(boxes, torch.where(overlap >= threshold, target["labels"][matched], 0), matched)


def _true_boxes(regions: Regions, target: Target) -> Tensor:
    """[R, 4]: the matched object's box; zeros without objects."""
    if not len(target["boxes"]):
        return torch.zeros_like(regions.boxes)
    return target["boxes"].to(regions.boxes)[regions.matched]


def _solid(boxes: Tensor) -> Tensor:
    """Boxes that have an area."""
    return boxes[((boxes[:, 2:] - boxes[:, :2]) > SMALLEST).all(dim=1)]
