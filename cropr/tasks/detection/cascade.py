"""Proposals, and Cascade Mask R-CNN (Cai and Vasconcelos, 2018): stages with rising IoU thresholds, each on the boxes
of the previous. With one stage it is Mask R-CNN with class-agnostic boxes, which needs less memory and time.

R regions, D channels of the pyramid, G objects of an image, M detections, K classes labelled from 1; 0 is background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.poolers import LevelMapper

from cropr.tasks.detection import DetModelSpec

if TYPE_CHECKING:
    from cropr.data.coco import Target

Size = tuple[int, int]
"""Height and width in pixels."""
BOX_SIZE, MASK_SIZE = 7, 14
"""Side of the grid that a region is pooled to; masks have twice theirs."""
POSITIVE = 0.25
"""Largest share of the sampled regions that lie on an object."""
SMALLEST = 0.01
"""Pixels; refined boxes with a side no longer than this are not trained on."""


class Regions(NamedTuple):
    """Regions of an image: boxes [R, 4], labels [R]; number [R] and box [R, 4] of the object each overlaps most."""

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor


class Detections(NamedTuple):
    """Detections of an image by falling score: boxes [M, 4] (left, top, right, bottom in pixels of the padded image),
    labels [M], scores [M] and masks [M, 28, 28], probabilities within the box."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


class CascadeHeads(nn.Module):
    """Box stages and the mask head. ``strides``: of the pyramid's levels that regions are pooled from."""

    stages: Any

    def __init__(self, spec: DetModelSpec, num_classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.pool = RegionPooler(strides, spec.canonical_size, spec.canonical_stride)
        self.stages = nn.ModuleList(BoxStage(spec, num_classes, number) for number in range(1, len(spec.stages) + 1))
        self.mask_head = _mask_head(spec, num_classes)
        self.sampler = Sampler(spec.rois, POSITIVE)

    def losses(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """``loss_classes_k`` and ``loss_box_k`` of every stage k, and ``loss_mask``; all finite without objects."""
        levels = [level.float() for level in levels]
        regions = []
        for proposed, target in zip(proposals, targets, strict=True):  # true boxes are among those sampled from
            own = match(torch.cat((proposed, target["boxes"].to(proposed))), target, self.spec.stages[0])
            chosen = self.sampler(own.labels, target)
            regions.append(Regions(*(values[chosen] for values in own)))
        # Masks are learnt on the regions of the first stage that lie on an object.
        positive = [Regions(*(values[region.labels > 0] for values in region)) for region in regions]
        boxes, matched = [region.boxes for region in positive], [region.matched for region in positive]
        masks, labels = [target["masks"] for target in targets], [target["labels"] - 1 for target in targets]
        logits = self.mask_head(self.pool(levels, boxes, MASK_SIZE)).float()
        share = len(logits) / mean_over_processes(len(logits), logits.device)
        losses = {"loss_mask": maskrcnn_loss(logits, boxes, masks, labels, matched) * share}
        for number, stage in enumerate(self.stages, start=1):
            boxes = [region.boxes for region in regions]
            pooled = self.pool(levels, boxes, BOX_SIZE)
            if pooled.requires_grad:  # all stages together send as much into the pyramid as one alone would
                pooled.register_hook(lambda gradient: gradient * (1 / len(self.stages)))
            logits, deltas = stage(pooled)
            every = Regions(*(torch.cat(values) for values in zip(*regions, strict=True)))
            losses[f"loss_classes_{number}"], losses[f"loss_box_{number}"] = stage.loss(logits, deltas, every)
            if number < len(self.stages):
                refined = stage.refine(deltas, boxes, sizes)
                solid = [box[((box[:, 2:] - box[:, :2]) > SMALLEST).all(dim=1)] for box in refined]
                threshold = self.spec.stages[number]
                regions = [match(box, target, threshold) for box, target in zip(solid, targets, strict=True)]
        return losses

    def detect(self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """Detections of each image: scores are means over the stages, boxes the last stage's."""
        levels = [level.float() for level in levels]
        boxes, scores = tuple(proposals), []
        for stage in self.stages:
            logits, deltas = stage(self.pool(levels, boxes, BOX_SIZE))
            scores.append(logits.softmax(dim=-1))
            boxes = stage.refine(deltas, boxes, sizes)
        mean = torch.stack(scores).mean(dim=0)[:, 1:].split([len(box) for box in boxes])
        suppress = soft_nms if self.spec.nms == "soft" else nms
        limits = (self.spec.nms_threshold, self.spec.min_score, self.spec.max_detections)
        picks = [suppress(box, score, *limits) for box, score in zip(boxes, mean, strict=True)]
        found = [box[pick.index] for box, pick in zip(boxes, picks, strict=True)]
        labels = torch.cat([pick.labels for pick in picks])
        logits = self.mask_head(self.pool(levels, found, MASK_SIZE)).float()
        masks = logits[torch.arange(len(labels), device=labels.device), labels - 1].sigmoid()
        split = masks.split([len(box) for box in found])
        return [Detections(b, pick.labels, pick.scores, m) for b, pick, m in zip(found, picks, split, strict=True)]


class RegionPooler:
    """Pools each region from the level that suits its size, with aligned RoIAlign and adaptive sampling. torchvision's
    own is not aligned, and infers the scales from the first batch, wrongly for images smaller than the canvas.
    ``strides`` are powers of 2, finest first; regions of ``size`` pixels a side have the level of ``stride``."""

    def __init__(self, strides: Sequence[int], size: int, stride: int) -> None:
        levels = [int(math.log2(edge)) for edge in strides]
        assert [2**level for level in levels] == list(strides)
        self.strides = tuple(strides)
        self.mapper = LevelMapper(levels[0], levels[-1], size, int(math.log2(stride)))

    def __call__(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
        """[R, D, side, side] of maps [B, D, h, w] and boxes [R_b, 4] of each image, in pixels."""
        regions, level = convert_boxes_to_roi_format(list(boxes)), self.mapper(list(boxes))
        pooled = levels[0].new_zeros(len(regions), levels[0].shape[1], side, side)
        for place, (values, stride) in enumerate(zip(levels, self.strides, strict=False)):
            rows = (level == place).nonzero()[:, 0]
            pooled[rows] = roi_align(values, regions[rows], side, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled


class BoxStage(nn.Module):
    """One stage of the cascade: classes of the regions, and refined boxes, the same for all classes. The scale of its
    deltas (x, y, width, height) grows with its ``number``, which counts from 1."""

    def __init__(self, spec: DetModelSpec, num_classes: int, number: int) -> None:
        super().__init__()
        self.coder = BoxCoder((10.0 * number, 10.0 * number, 5.0 * number, 5.0 * number))
        shape, convolutions = (spec.channels, BOX_SIZE, BOX_SIZE), [spec.channels] * spec.box_convs
        self.head = FastRCNNConvFCHead(shape, convolutions, [spec.box_width], norm_layer=LayerNorm2d)
        self.classes = nn.Linear(spec.box_width, num_classes + 1)
        self.deltas = nn.Linear(spec.box_width, 4)
        for layer, std in ((self.classes, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1] and deltas [R, 4], in float32, of [R, D, 7, 7]."""
        x = self.head(pooled)
        return self.classes(x).float(), self.deltas(x).float()

    @torch.no_grad()
    def refine(self, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[Size]) -> tuple[Tensor, ...]:
        """The boxes [R_b, 4] of each image moved by their deltas and clipped to the image, without gradient."""
        moved = self.coder.decode_single(deltas, torch.cat(list(boxes))).split([len(box) for box in boxes])
        return tuple(clip_boxes_to_image(box, size) for box, size in zip(moved, sizes, strict=True))

    def loss(self, logits: Tensor, deltas: Tensor, regions: Regions) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the regions, and L1 of the deltas of those on an object over the number of all."""
        count, positive = mean_over_processes(len(logits), logits.device), regions.labels > 0
        wanted = self.coder.encode_single(regions.truth[positive], regions.boxes[positive])
        classes = F.cross_entropy(logits, regions.labels, reduction="sum")
        return classes / count, F.l1_loss(deltas[positive], wanted, reduction="sum") / count


def _mask_head(spec: DetModelSpec, num_classes: int) -> nn.Sequential:
    """Regions [R, D, 14, 14] to mask logits [R, K, 28, 28]."""
    upsample = nn.ConvTranspose2d(spec.channels, spec.channels, 2, 2)
    nn.init.kaiming_normal_(upsample.weight, mode="fan_out", nonlinearity="relu")
    logits = nn.Conv2d(spec.channels, num_classes, 1)
    nn.init.normal_(logits.weight, std=0.001)
    for layer in (upsample, logits):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    convolutions = MaskRCNNHeads(spec.channels, [spec.channels] * spec.mask_convs, 1, norm_layer=LayerNorm2d)
    return nn.Sequential(convolutions, upsample, nn.ReLU(), logits)


def mean_over_processes(count: int, device: torch.device) -> float:
    """Mean of a number over processes, above 0. Losses over it average to that of one process with all the images."""
    if not distributed.is_initialized():
        return max(count, 1)
    total = torch.tensor(float(count), device=device)
    distributed.all_reduce(total)
    return max(total.item(), 1) / distributed.get_world_size()


def match(boxes: Tensor, target: Target, threshold: float) -> Regions:
    """Give each box [R, 4] the object that it overlaps most, or the background below ``threshold``."""
    objects = target["boxes"].to(boxes)
    if not len(objects):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return Regions(boxes, nothing, nothing, torch.zeros_like(boxes))
    overlap, matched = box_iou(objects, boxes).max(dim=0)
    labels = torch.where(overlap >= threshold, target["labels"][matched], 0)
    return Regions(boxes, labels, matched, objects[matched])


@dataclass(frozen=True, slots=True)
class Picks:
    """Remaining detections by falling score: rows of the boxes [M], labels [M] from 1 to K, suppressed scores [M]."""

    index: Tensor
    labels: Tensor
    scores: Tensor


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, threshold: float, min_score: float, limit: int) -> Picks:
    """Plain suppression: of two boxes of a class with an IoU above ``threshold``, the higher score stays; scores up to
    ``min_score`` are dropped before. Arguments as of ``soft_nms``."""
    index, column = (scores > min_score).nonzero(as_tuple=True)
    values = scores[index, column]
    kept = batched_nms(boxes[index].float(), values.float(), column, threshold)[:limit]
    return Picks(index[kept], column[kept] + 1, values[kept])


@torch.no_grad()
def soft_nms(boxes: Tensor, scores: Tensor, threshold: float, min_score: float, limit: int) -> Picks:
    """Linear soft suppression (Bodla et al., 2017) of boxes [R, 4] with scores [R, K], not negative: a picked box
    multiplies scores by 1 - IoU where the IoU is above ``threshold``; the ``limit`` highest above ``min_score`` remain.
    One matrix of overlaps serves all classes, in float32, since float16 is off by half a pixel above 1024. Each step
    picks one box of every class, in falling order: the ``limit`` best are among the first ``limit`` of each class."""
    index = (scores > min_score).any(dim=1).nonzero()[:, 0]
    overlap = box_iou(boxes[index].float(), boxes[index].float())
    factors = torch.where(overlap > threshold, 1 - overlap, 1.0)
    left = scores[index].float().t().contiguous()  # [K, R]
    steps, columns = min(limit, len(index)), torch.arange(left.shape[0], device=left.device)
    rows, picked = index.new_empty(steps, len(left)), left.new_empty(steps, len(left))
    for step in range(steps):
        picked[step], rows[step] = left.max(dim=1)
        left *= factors[rows[step]]
        left[columns, rows[step]] = 0.0
    order = picked.flatten().argsort(descending=True, stable=True)[:limit]
    values = picked.flatten()[order]
    order, values = order[values > min_score], values[values > min_score]
    return Picks(index[rows.flatten()[order]], columns.repeat(steps)[order] + 1, values.to(scores.dtype))


RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors of each place."""


class Anchors(nn.Module):
    """Boxes of one size and three shapes around each place of every level, in float32. One a level: ``sizes``, the
    square root of the area in pixels, and ``strides``, pixels between neighbours."""

    def __init__(self, sizes: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(zip(sizes, strides, strict=True))

    def forward(self, canvas: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """[anchors, 4] an image, level after level; all images of a batch have the same."""
        root = torch.tensor(RATIOS, device=maps[0].device).sqrt()
        anchors = []
        for (size, stride), values in zip(self.levels, maps, strict=True):
            half = torch.stack((torch.full_like(root, size) / root, size * root), dim=1) / 2
            places = (stride * torch.arange(edge, device=root.device) for edge in values.shape[-2:])
            y, x = torch.meshgrid(*places, indexing="ij")
            centre = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
            anchors.append((centre + torch.cat((-half, half), dim=1)).view(-1, 4))
        return [torch.cat(anchors)] * len(canvas.image_sizes)


class _Head(RPNHead):
    """Two 3 x 3 convolutions shared by all levels; logits and deltas in float32. The convolutions start by their width,
    as in the other heads: torchvision's standard deviation of 0.01 suits 256 channels alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, len(RATIOS), conv_depth=2)
        for layer in self.conv.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: list[Tensor]) -> Any:
        return tuple([level.float() for level in levels] for levels in super().forward(x))


class Sampler:
    """Chooses up to ``count`` boxes of an image, at most the share ``positive`` of them on objects, by the image's own
    seed: neither the rest of the batch nor the process that has the image changes the choice."""

    def __init__(self, count: int, positive: float) -> None:
        self.count, self.most = count, int(count * positive)

    def __call__(self, labels: Tensor, target: Target) -> Tensor:
        """Which boxes [R], by their labels [R]: objects from 1, background 0, below 0 never chosen."""
        seed, device = target.get("seed"), labels.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        order = torch.rand(labels.shape, generator=generator, device=device)
        positive, negative = ((labels >= 1).nonzero()[:, 0], (labels == 0).nonzero()[:, 0])
        positive = positive[order[positive].argsort()[: self.most]]
        negative = negative[order[negative].argsort()[: self.count - len(positive)]]
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        chosen[torch.cat((positive, negative))] = True
        return chosen


class ProposalNetwork(RegionProposalNetwork):
    """Maps to proposals; in training also ``loss_objectness`` and ``loss_rpn_box_reg``. Unlike torchvision's own, its
    anchors are not rounded to pixels and take their strides from the pyramid; its losses, EVA-02's, are L1 and BCE over
    a fixed number of samples, drawn by the image's own seed; boxes are computed in float32 under any autocast."""

    def __init__(self, spec: DetModelSpec, strides: Sequence[int]) -> None:
        before, after = ({"training": spec.proposals_train[i], "testing": spec.proposals_test[i]} for i in (0, 1))
        anchors, head = Anchors(spec.anchor_sizes, strides), _Head(spec.channels)
        # IoU of objects and of background, samples and the share of objects, proposals, IoU of suppression.
        super().__init__(anchors, head, 0.7, 0.3, spec.rpn_samples, 0.5, before, after, 0.7)
        self.sampler, self.targets = Sampler(spec.rpn_samples, 0.5), list[Any]()

    def propose(
        self, canvas: ImageList, levels: Sequence[Tensor], targets: Sequence[Target] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals [R, 4] an image, without gradient, and in training the losses."""
        self.targets = list(targets or ())  # torchvision does not pass them on to the loss
        boxes, losses = self(canvas, dict(enumerate(levels)), targets)
        return [box.detach() for box in boxes], losses

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """BCE of the sampled anchors and L1 of the positive ones, both over the number that sampling aims at."""
        sampled = torch.cat([self.sampler(*pair) for pair in zip(labels, self.targets, strict=True)])
        positive, expected = sampled & (torch.cat(labels) >= 1), self.sampler.count * len(labels)
        truth = torch.cat(labels)[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth, reduction="sum")
        box_loss = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return objectness_loss / expected, box_loss / expected
