"""Scores of semantic segmentation of C classes, all from pixels counted by class in each image."""

from __future__ import annotations

import torch
from torch import Tensor

from cropr.data.ade20k import IGNORE


def count_pixels(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each image and class that are right, labelled, and predicted: [B, 3, C] int64, of two tensors [B, ...]
    of any integer type. Pixels whose label is ``IGNORE`` count nowhere."""
    assert prediction.shape == labels.shape, (prediction.shape, labels.shape)
    known, images = labels != IGNORE, len(labels)
    first = torch.arange(images, device=labels.device).view(-1, *[1] * (labels.ndim - 1)) * num_classes
    chosen = ((labels, known & (prediction == labels)), (labels, known), (prediction, known))
    places = [(first + values.long())[which] for values, which in chosen]
    counts = [torch.bincount(place, minlength=images * num_classes).view(images, num_classes) for place in places]
    return torch.stack(counts, dim=1)


def scores(counts: Tensor) -> tuple[dict[str, float], list[float | None]]:
    """Scores in percent from ``count_pixels``, summed over images to [3, C]; as mmseg defines them.

    Returns:
        ``miou``: mean IoU over the classes that are labelled or predicted somewhere; ``macc``: mean, over the labelled
        classes, of the share of their pixels that are right; ``aacc``: share of all labelled pixels that are right.
        And the IoU of each class: None for one that is neither labelled nor predicted, 0 for one only predicted.

    Raises:
        ValueError: there is no labelled pixel.
    """
    counts = counts.double().cpu()
    right, labelled, predicted = counts
    if not (total := labelled.sum()):
        raise ValueError("no pixel of the validation set is labelled; see `python -m cropr data check --layout ade20k`")
    iou = 100 * right / (labelled + predicted - right)  # 0 / 0 for absent classes
    accuracy = 100 * right / labelled
    means = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": 100 * right.sum() / total}
    return {name: mean.item() for name, mean in means.items()}, [None if x != x else x for x in iou.tolist()]
