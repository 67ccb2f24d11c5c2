"""Cascade Mask R-CNN (Cai and Vasconcelos, 2018): stages with rising IoU thresholds, each on the boxes of the previous.

With one stage it is Mask R-CNN with class-agnostic boxes, which needs less memory and time.

R regions, G objects of an image, M detections, K classes without background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import box_iou

from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.nms import nms, soft_nms
from cropr.tasks.detection.regions import BOX_SIZE, MASK_SIZE, BoxStage, MaskHead, RegionPooler, scale_gradient

if TYPE_CHECKING:
    from cropr.data.coco import Target

POSITIVE = 0.25
"""Largest share of the sampled regions that lie on an object."""
SMALLEST = 0.01
"""Pixels; refined boxes with a side no longer than this are not trained on."""


class Regions(NamedTuple):
    """Regions of an image and their targets."""

    boxes: Tensor
    """[R, 4]."""
    labels: Tensor
    """[R], 0 for background."""
    matched: Tensor
    """[R], the object with the largest overlap; 0 without objects."""
    truth: Tensor
    """[R, 4], the box of that object; zeros without objects."""


class Detections(NamedTuple):
    """Detections of an image, by falling score."""

    boxes: Tensor
    """[M, 4]: left, top, right, bottom in pixels of the network's input."""
    labels: Tensor
    """[M], from 1 to K."""
    scores: Tensor
    """[M]."""
    masks: Tensor
    """[M, s, s]: probabilities within the box."""


class CascadeHeads(nn.Module):
    """Box stages and the mask head. ``strides``: of the pyramid's levels that regions are pooled from."""

    def __init__(self, spec: DetModelSpec, num_classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.pool = RegionPooler(strides, spec.canonical_size, spec.canonical_stride)
        self.stages = nn.ModuleList(BoxStage(spec, num_classes, number) for number in range(1, len(spec.stages) + 1))
        self.mask_head = MaskHead(spec, num_classes)
        self.sampler = BalancedPositiveNegativeSampler(spec.rois, POSITIVE)

    def losses(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """``loss_classes_k`` and ``loss_box_k`` of every stage k, and ``loss_mask``; all finite without objects."""
        levels = [level.float() for level in levels]
        with torch.no_grad():
            regions = [self._sample(*pair) for pair in zip(proposals, targets, strict=True)]
        # Masks are learnt on the regions of the first stage that lie on an object.
        positive = [Regions(*(values[region.labels > 0] for values in region)) for region in regions]
        boxes, matched = [region.boxes for region in positive], [region.matched for region in positive]
        masks, labels = [target["masks"] for target in targets], [target["labels"] - 1 for target in targets]
        logits = self.mask_head(self.pool(levels, boxes, MASK_SIZE))
        losses = {"loss_mask": maskrcnn_loss(logits, boxes, masks, labels, matched)}
        for number, stage in enumerate(self.stages, start=1):
            assert isinstance(stage, BoxStage)
            boxes = [region.boxes for region in regions]
            # All stages together send as much gradient into the pyramid as one alone would.
            pooled = scale_gradient(self.pool(levels, boxes, BOX_SIZE), 1 / len(self.stages))
            logits, deltas = stage(pooled)
            wanted = (torch.cat([region.labels for region in regions]), torch.cat([region.truth for region in regions]))
            parts = stage.loss(logits, deltas, torch.cat(boxes), *wanted)
            losses |= {f"loss_classes_{number}": parts[0], f"loss_box_{number}": parts[1]}
            if number < len(self.stages):
                refined = stage.refine(deltas, boxes, sizes)
                solid = [box[((box[:, 2:] - box[:, :2]) > SMALLEST).all(dim=1)] for box in refined]
                threshold = self.spec.stages[number]
                regions = [match(box, target, threshold) for box, target in zip(solid, targets, strict=True)]
        return losses

    def _sample(self, proposals: Tensor, target: Target) -> Regions:
        """A random choice of ``spec.rois`` among the proposals and the true boxes themselves."""
        regions = match(torch.cat((proposals, target["boxes"].to(proposals))), target, self.spec.stages[0])
        positive, negative = self.sampler([regions.labels])
        chosen = (positive[0] | negative[0]).bool()
        return Regions(*(values[chosen] for values in regions))

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
        spec, suppress = self.spec, soft_nms if self.spec.nms == "soft" else nms
        limits: dict[str, Any] = {
            "threshold": spec.nms_threshold,
            "min_score": spec.min_score,
            "limit": spec.max_detections,
        }
        picks = [suppress(box, score, **limits) for box, score in zip(boxes, mean, strict=True)]
        found = [box[pick.index] for box, pick in zip(boxes, picks, strict=True)]
        labels = torch.cat([pick.labels for pick in picks])
        logits = self.mask_head(self.pool(levels, found, MASK_SIZE))
        masks = logits[torch.arange(len(labels), device=labels.device), labels - 1].sigmoid()
        split = masks.split([len(box) for box in found])
        return [
            Detections(box, pick.labels, pick.scores, mask) for box, pick, mask in zip(found, picks, split, strict=True)
        ]


def match(boxes: Tensor, target: Target, threshold: float) -> Regions:
    """Give each box [R, 4] the object that it overlaps most, or the background below ``threshold``."""
    objects = target["boxes"].to(boxes)
    if not len(objects):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return Regions(boxes, nothing, nothing, torch.zeros_like(boxes))
    overlap, matched = box_iou(objects, boxes).max(dim=0)
    labels = torch.where(overlap >= threshold, target["labels"][matched], 0)
    return Regions(boxes, labels, matched, objects[matched])
