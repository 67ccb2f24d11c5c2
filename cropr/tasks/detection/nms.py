"""Choice of the detections of an image: soft and plain non-maximum suppression, class by class.

All classes have the same boxes, as class-agnostic regression gives them, so that one matrix of overlaps is enough.
Overlaps are computed in float32: float16 is off by half a pixel above 1024.

R boxes of an image, K classes without background, M remaining detections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou


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
    """Linear soft suppression (Bodla et al., 2017): a picked box multiplies scores of overlapping boxes by 1 - IoU.

    Each of ``limit`` steps picks one box of every class, with a few operations on [K, R] instead of a loop over up to
    K R boxes. Within a class scores are picked in falling order, so that the ``limit`` best of the image are among the
    first ``limit`` of each class.

    Args:
        boxes: [R, 4], left, top, right, bottom.
        scores: [R, K], one a class, without background; not negative.
        threshold: IoU above which scores are multiplied.
        min_score: 0 or more; a box is dropped when its score is no larger.
        limit: number of detections, those with the highest scores.
    """
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
