"""Which boxes of an image are reported: soft non-maximum suppression, and the plain one, class by class.

All classes share their boxes, as class-agnostic regression gives them, so one matrix of overlaps serves all of them.

R boxes of an image, K classes without background, M detections that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

Decay = Literal["linear", "gaussian"]


@dataclass(frozen=True, slots=True)
class Picks:
    """Detections that are left, by falling score."""

    index: Tensor
    """[M] int64, which boxes."""
    labels: Tensor
    """[M] int64, from 1 to K."""
    scores: Tensor
    """[M], after suppression."""


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, *, threshold: float = 0.5, min_score: float = 0.05, limit: int = 100) -> Picks:
    """Plain suppression: of two boxes of one class that overlap by more than ``threshold``, the better one stays.

    Args:
        boxes: [R, 4], left, top, right, bottom.
        scores: [R, K], one a class; the background is left out.
        threshold: intersection over union.
        min_score: scores up to it are dropped before.
        limit: detections an image, the best ones.
    """
    index, column = (scores > min_score).nonzero(as_tuple=True)
    values = scores[index, column]
    # Overlaps in fp32, whatever the precision of the network: half a pixel is lost above 1024 in fp16.
    kept = batched_nms(boxes[index].float(), values.float(), column, threshold)[:limit]
    return Picks(index[kept], column[kept] + 1, values[kept])


@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    decay: Decay = "linear",
    threshold: float = 0.6,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    limit: int = 100,
) -> Picks:
    """Soft suppression (Bodla et al., 2017): the best box stays, and lowers the scores of those that it overlaps.

    All classes advance in lock-step, one box each at a time: ``limit`` steps of a few operations on [K, R] instead of
    a loop over up to K R boxes. Within a class scores are picked in falling order, so that the ``limit`` best of the
    image are among the first ``limit`` of each class.

    Args:
        boxes: [R, 4], left, top, right, bottom.
        scores: [R, K], one a class; the background is left out. Not negative.
        decay: ``linear`` multiplies by 1 - IoU above ``threshold``, ``gaussian`` by exp(-IoU^2 / ``sigma``).
        min_score: 0 or more; a box ends when its score has come down to it. EVA-02's results: linear, 0.6, 1e-3.
        limit: detections an image, the best ones.

    Raises:
        ValueError: unknown decay.
    """
    if decay not in ("linear", "gaussian"):
        raise ValueError(f"decay={decay!r}: choose linear or gaussian")
    index = (scores > min_score).any(dim=1).nonzero()[:, 0]
    overlap = box_iou(boxes[index].float(), boxes[index].float())
    if decay == "linear":
        factors = torch.where(overlap > threshold, 1 - overlap, 1.0)
    else:
        factors = torch.exp(-overlap.square() / sigma)
    left = scores[index].float().t().contiguous()  # [K, R]
    steps, columns = min(limit, len(index)), torch.arange(left.shape[0], device=left.device)
    rows = index.new_empty(steps, len(left))
    picked = left.new_empty(steps, len(left))
    for step in range(steps):
        picked[step], rows[step] = left.max(dim=1)
        left *= factors[rows[step]]
        left[columns, rows[step]] = 0.0
    order = picked.flatten().argsort(descending=True, stable=True)[:limit]
    values = picked.flatten()[order]
    order, values = order[values > min_score], values[values > min_score]
    labels = columns.repeat(steps)[order] + 1
    return Picks(index[rows.flatten()[order]], labels, values.to(scores.dtype))
