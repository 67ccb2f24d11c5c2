"""Masks of a detector, given box by box, as regions of the image, in COCO's run-length encoding.

M detections of an image of H x W pixels, s side of the mask that the head gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F


def encode_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Run-length codes, in COCO's JSON form, of masks that lie in boxes.

    A pixel belongs to the object if the mask, interpolated at the pixel's centre, is at least 0.5; outside of the box
    the mask is 0, which rounds corners, as in detectron2.
    torchvision's ``paste_masks_in_image`` rounds boxes to whole pixels first, which costs accuracy on small objects,
    and holds all masks at once at the size of the image: 0.9 GB for 100 of them at 1536 pixels.

    Args:
        masks: [M, s, s], probabilities, each relative to its box [4]: left, top, right, bottom in pixels of the image.
        size: H and W.
    """
    masks, boxes = masks.float().cpu(), boxes.float().cpu()
    canvas = np.zeros(size, np.uint8, order="F")
    codes = []
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = (_pixels(float(box[axis]), float(box[axis + 2]), size[1 - axis]) for axis in (1, 0))
        region = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        canvas[region] = paste(mask, box, rows, columns).ge(0.5).numpy()
        code = coco_mask.encode(canvas)
        canvas[region] = 0
        codes.append({"size": list(size), "counts": code["counts"].decode()})
    return codes


def paste(mask: Tensor, box: Tensor, rows: range, columns: range) -> Tensor:
    """A mask [s, s] at the centres of pixels: [rows, columns], bilinear, 0 outside of the box [4]."""
    if not rows or not columns:
        return mask.new_zeros(len(rows), len(columns))
    y, x = (
        (torch.arange(pixels.start, pixels.stop) + 0.5 - box[axis]) / (box[axis + 2] - box[axis]) * 2 - 1
        for axis, pixels in ((1, rows), (0, columns))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


def _pixels(start: float, end: float, limit: int) -> range:
    """Pixels of the image whose centre lies in [start, end], and at most one more at each end."""
    return range(min(max(int(np.floor(start)), 0), limit), min(max(int(np.ceil(end)), 0), limit))
