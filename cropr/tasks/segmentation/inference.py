"""Predictions for images of any size by a model for windows of one size.

B images of one size, C classes, H and W pixels of an image, S side of a window. Images are normalised before, so that
padding with zeros is padding with the mean colour.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from cropr.tasks.segmentation import SegDataSpec

Forward = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S] to logits [B, C, S, S]."""


def predict(forward: Forward, images: Tensor, size: tuple[int, int], spec: SegDataSpec) -> Tensor:
    """Logits [B, C, H, W] for images as ``cropr.data.ade20k.EvalImages`` gives them.

    ``spec.evaluation`` is ``single`` for the authors' evaluation (pad to one window, predict, crop the padding off,
    enlarge the logits bilinearly to ``size``), or ``slide`` for ``predict_sliding``.
    """
    if spec.evaluation == "slide":
        return predict_sliding(forward, images, spec.image_size, spec.stride or spec.image_size)
    logits = _forward_padded(forward, images, spec.image_size)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def predict_sliding(forward: Forward, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits [B, C, H, W] of images [B, 3, H, W]: the mean over all windows that cover a pixel (mmseg's ``slide``).

    Windows begin every ``stride`` pixels; the last of a row or column is moved back to end with the image. Images that
    are smaller than a window are padded.

    Raises:
        ValueError: windows that leave gaps.
    """
    if stride > window:
        raise ValueError(f"stride {stride} leaves gaps between windows of {window} px; lower it to at most {window}")
    ends = (max(side - window, 0) for side in images.shape[-2:])
    tops, lefts = ([*range(0, end, stride), end] for end in ends)
    total, times = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for top, left in product(tops, lefts):
        area = (..., slice(top, top + window), slice(left, left + window))
        logits = _forward_padded(forward, images[area], window)
        if not total.ndim:
            total = logits.new_zeros((*logits.shape[:2], *images.shape[-2:]))
        total[area] += logits
        times[area[1:]] += 1
    return total / times


def _forward_padded(forward: Forward, images: Tensor, window: int) -> Tensor:
    """Logits in fp32 of images [B, 3, h, w] that are at most as large as a window."""
    height, width = images.shape[-2:]
    logits = forward(F.pad(images, (0, window - width, 0, window - height)))
    return logits[..., :height, :width].float()
