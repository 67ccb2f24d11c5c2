"""Masks of a detector, given box by box, as regions of the image, in COCO's run-length encoding."""

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
        masks: [M, s, s], probabilities, each relative to its box.
        boxes: [M, 4]: left, top, right, bottom in pixels of the image.
        size: height and width of the image.
    """
    canvas = np.zeros(size, np.uint8, order="F")
    codes = []
    for mask, box in zip(masks.float().cpu(), boxes.float().cpu(), strict=True):
        # Pixels whose centre lies in the box, and at most one more at each side.
        left, top = box[:2].floor().clamp(min=0).int().tolist()
        right, bottom = box[2:].ceil().clamp(min=0).int().tolist()
        rows, columns = range(size[0])[top:bottom], range(size[1])[left:right]
        region = np.s_[rows.start : rows.stop, columns.start : columns.stop]
        if rows and columns:
            canvas[region] = _paste(mask, box, rows, columns)
        code = coco_mask.encode(canvas)
        canvas[region] = 0
        codes.append({"size": list(size), "counts": code["counts"].decode()})
    return codes


def _paste(mask: Tensor, box: Tensor, rows: range, columns: range) -> np.ndarray:
    """Where a mask [s, s] in its box [4] is at least 0.5 at the centres of pixels, [rows, columns]; bilinear."""
    y, x = (
        (torch.arange(pixels.start, pixels.stop) + 0.5 - box[axis]) / (box[axis + 2] - box[axis]) * 2 - 1
        for axis, pixels in ((1, rows), (0, columns))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0].ge(0.5).numpy()
