"""Geometry of detection images: large-scale jitter for training, the longest side for evaluation.

n instances of an image; H, W its size, h, w that of what is seen of it, S the side of the square to fill.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cropr.tasks.detection import DetDataSpec


class View(NamedTuple):
    """What is seen of an image: image uint8 [3, h, w], boxes [m, 4] float32 (left, top, right, bottom), masks uint8
    [m, h, w], and which m of the n instances have a pixel in it, [n] bool."""

    image: Tensor
    boxes: Tensor
    masks: Tensor
    kept: Tensor


class Window(NamedTuple):
    """A part of an image, in whole pixels, and the height and width to which it is resized."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]


def jitter(image: tv_tensors.Image, boxes: Tensor, masks: tv_tensors.Mask, spec: DetDataSpec) -> View:
    """Large-scale jitter: perhaps flipped, resized by a factor from ``spec.scale``, cropped to at most S x S.

    A box that the crop cuts is drawn anew around what is left of its mask: the rest of the annotated box may be larger
    than the rest of the object. Four numbers are drawn from torch's global generator, whatever they decide.

    Args:
        image: uint8 [3, H, W].
        boxes: [n, 4] float32, left, top, right, bottom, within the image.
        masks: uint8 [n, H, W].
    """
    flip, scale, down, right = torch.rand(4).tolist()
    marks = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    if flip < spec.hflip:
        image, marks, masks = F.horizontal_flip(image), F.horizontal_flip(marks), F.horizontal_flip(masks)
    low, high = spec.scale
    window = view_window(tuple(image.shape[-2:]), spec.image_size, low + scale * (high - low), (down, right))
    place = {**window._asdict(), "size": list(window.size)}
    seen = F.resized_crop_image(image.as_subclass(Tensor), **place)
    # torchvision's own choice for masks, NEAREST, takes the left upper pixel of those that fall together: at a small
    # scale masks would lie up to half a pixel to the left of and above their objects.
    parts = F.resized_crop_image(masks.as_subclass(Tensor), **place, interpolation=InterpolationMode.NEAREST_EXACT)
    kept = parts.flatten(1).any(dim=1).bool()
    ends = window.left, window.top, window.left + window.width, window.top + window.height
    beyond = (marks.as_subclass(Tensor) - torch.tensor(ends)) * torch.tensor([1, 1, -1, -1]) < 0
    cut = beyond.any(dim=1)[kept]
    fresh = F.resized_crop(marks, **place).as_subclass(Tensor)[kept]
    fresh[cut] = masks_to_boxes(parts[kept][cut]) + fresh.new_tensor([0, 0, 1, 1])
    return View(seen, fresh, parts[kept], kept)


def view_window(size: tuple[int, int], side: int, factor: float, offset: tuple[float, float]) -> Window:
    """The part of an image that is seen when it is resized and then cropped.

    The crop is taken from the file's pixels and resized afterwards: the same view, up to the rounding of the crop to
    whole pixels, without the enlarged image and its masks, which would take up to a gigabyte.

    Args:
        size: height and width H, W of the image.
        side: S, at most so many pixels are seen each way.
        factor: 1 resizes the longer side to S.
        offset: two numbers in [0, 1], where the crop lies, from top and left, where it is smaller than the image.
    """
    scale = factor * side / max(size)
    starts, lengths, seen = [], [], []
    for length, where in zip(size, offset, strict=True):
        resized = max(1, round(length * scale))
        visible = min(side, resized)
        taken = max(1, round(length * visible / resized))
        starts.append(min(round(where * (resized - visible) * length / resized), length - taken))
        lengths.append(taken)
        seen.append(visible)
    return Window(starts[0], starts[1], lengths[0], lengths[1], (seen[0], seen[1]))


def fit(image: Tensor, side: int) -> Tensor:
    """uint8 [3, H, W] -> [3, h, w], the longer of which is ``side``."""
    window = view_window((image.shape[-2], image.shape[-1]), side, 1.0, (0.0, 0.0))
    return F.resize_image(image.as_subclass(Tensor), list(window.size))
