"""Scores of semantic segmentation, all from one confusion matrix of C classes, summed over images and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from cropr.data.ade20k import IGNORE


def confusion(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by label (row) and prediction (column), [C, C] int64, of two tensors of one shape and any integer type.
    Pixels whose label is ``IGNORE`` count nowhere."""
    assert prediction.shape == labels.shape, (prediction.shape, labels.shape)
    known = labels != IGNORE
    pairs = labels[known].long() * num_classes + prediction[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(counts: Tensor) -> tuple[dict[str, float], list[float | None]]:
    """Scores in percent from the sum of all ``confusion`` matrices [C, C]; as mmseg defines them.

    Returns:
        ``miou``: mean IoU over the classes that are labelled or predicted somewhere; ``macc``: mean, over the labelled
        classes, of the share of their pixels that are right; ``aacc``: share of all labelled pixels that are right.
        And the IoU of each class: None for one that is neither labelled nor predicted, 0 for one only predicted.

    Raises:
        ValueError: there is no labelled pixel.
    """
    counts = counts.double().cpu()
    if not (total := counts.sum()):
        raise ValueError("no pixel of the validation set is labelled; see `python -m cropr data check --layout ade20k`")
    right, labelled, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou = 100 * right / (labelled + predicted - right)  # 0 / 0 for absent classes
    accuracy = 100 * right / labelled
    means = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": 100 * right.sum() / total}
    return {name: mean.item() for name, mean in means.items()}, [None if x != x else x for x in iou.tolist()]
