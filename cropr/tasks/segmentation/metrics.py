"""Scores of semantic segmentation, all from one confusion matrix that sums over images and processes.

    counts = confusion(prediction, labels, num_classes)     # add up over batches
    result = scores(counts)
    result.miou, result.iou

C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cropr.data.ade20k import IGNORE


@dataclass(frozen=True, slots=True)
class Scores:
    """In percent."""

    miou: float
    """Mean of ``iou`` over the classes that are labelled or predicted somewhere."""
    mean_accuracy: float
    """Mean, over the classes that are labelled somewhere, of the share of their pixels that are right."""
    pixel_accuracy: float
    """Share of the labelled pixels that are right."""
    iou: tuple[float | None, ...]
    """Intersection over union of each class over the whole set: None for a class that is neither labelled nor
    predicted, 0 for one that is only predicted."""


def confusion(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by label (row) and prediction (column): [C, C] int64.

    Args:
        prediction: classes, of any shape and integer type.
        labels: classes or ``IGNORE``, of the same shape. Pixels with ``IGNORE`` count nowhere.
    """
    assert prediction.shape == labels.shape, (prediction.shape, labels.shape)
    known = labels != IGNORE
    pairs = labels[known].long() * num_classes + prediction[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(counts: Tensor) -> Scores:
    """Scores from the sum of all ``confusion`` matrices [C, C]; as mmseg defines them.

    Raises:
        ValueError: there is no labelled pixel.
    """
    counts = counts.double().cpu()
    if not (total := counts.sum()):
        raise ValueError("no pixel of the validation set is labelled; see `python -m cropr data check --layout ade20k`")
    right, labelled, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou = 100 * right / (labelled + predicted - right)  # 0 / 0 for absent classes
    accuracy = 100 * right / labelled
    return Scores(
        miou=iou.nanmean().item(),
        mean_accuracy=accuracy.nanmean().item(),
        pixel_accuracy=(100 * right.sum() / total).item(),
        iou=tuple(None if value != value else value for value in iou.tolist()),
    )
