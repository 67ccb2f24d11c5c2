"""Suppression against the plain loops that define it."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from cropr.tasks.detection.nms import nms, soft_nms


def crowded(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in clusters, and scores."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 60
    boxes = torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=random) * 40), dim=1)
    return boxes, torch.rand(count, classes, generator=random) ** 3


def plain_soft_nms(boxes, scores, decay, threshold, sigma, min_score):
    """One class, box by box, as the method is written down: [(row, score)]."""
    alive = {row: float(score) for row, score in enumerate(scores)}
    overlap = box_iou(boxes, boxes)
    picks = []
    while alive:
        best = max(alive, key=alive.__getitem__)
        score = alive.pop(best)
        if score <= min_score:
            break
        picks.append((best, score))
        for row in alive:
            iou = float(overlap[best, row])
            if decay == "gaussian":
                alive[row] *= math.exp(-(iou**2) / sigma)
            elif iou > threshold:
                alive[row] *= 1 - iou
    return picks


@pytest.mark.parametrize(("decay", "threshold"), [("linear", 0.3), ("linear", 0.6), ("gaussian", 0.5)])
@pytest.mark.parametrize("limit", [7, 1000])
def test_soft_nms_equals_the_plain_loop(decay, threshold, limit):
    boxes, scores = crowded(60, 5)
    expected = sorted(
        (
            (score, column + 1, row)
            for column in range(5)
            for row, score in plain_soft_nms(boxes, scores[:, column], decay, threshold, 0.4, 0.05)
        ),
        reverse=True,
    )[:limit]
    picks = soft_nms(boxes, scores, decay=decay, threshold=threshold, sigma=0.4, min_score=0.05, limit=limit)
    assert len(expected) == len(picks.scores) > 6
    assert picks.labels.tolist() == [label for _, label, _ in expected]
    assert picks.index.tolist() == [row for _, _, row in expected]
    torch.testing.assert_close(picks.scores, torch.tensor([score for score, _, _ in expected]))


def test_a_second_copy_of_a_box_is_gone():
    """Linear: an overlap of 1 leaves nothing; Gaussian: exp(-1 / sigma)."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    scores = torch.tensor([[0.9], [0.8], [0.3]])
    assert soft_nms(boxes, scores).index.tolist() == [0, 2]
    soft = soft_nms(boxes, scores, decay="gaussian", sigma=1.0)
    assert soft.index.tolist() == [0, 2, 1]
    torch.testing.assert_close(soft.scores[2].item(), 0.8 * math.exp(-1))


def test_nms_equals_the_plain_loop():
    boxes, scores = crowded(60, 5)
    overlap = box_iou(boxes, boxes)
    expected = []
    for column in range(5):
        kept: list[int] = []
        for row in scores[:, column].argsort(descending=True).tolist():
            if scores[row, column] > 0.05 and all(overlap[row, other] <= 0.4 for other in kept):
                kept.append(row)
        expected += [(scores[row, column].item(), column + 1, row) for row in kept]
    expected = sorted(expected, reverse=True)[:20]
    picks = nms(boxes, scores, threshold=0.4, limit=20)
    assert picks.index.tolist() == [row for _, _, row in expected]
    assert picks.labels.tolist() == [label for _, label, _ in expected]
    assert picks.scores.tolist() == [score for score, _, _ in expected]


@pytest.mark.parametrize("suppress", [nms, soft_nms])
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_is_left_of_nothing(suppress, count):
    """No box, and no box with a score."""
    boxes, _ = crowded(count, 1)
    picks = suppress(boxes, torch.zeros(count, 4))
    assert len(picks.index) == len(picks.labels) == len(picks.scores) == 0
    assert picks.index.dtype == picks.labels.dtype == torch.int64


@pytest.mark.parametrize("suppress", [nms, soft_nms])
def test_classes_do_not_suppress_each_other(suppress):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    picks = suppress(boxes, torch.tensor([[0.9, 0.0], [0.0, 0.8]]))
    assert (picks.index.tolist(), picks.labels.tolist()) == ([0, 1], [1, 2])


def test_soft_nms_refuses_another_decay():
    with pytest.raises(ValueError, match="'exponential': choose linear or gaussian"):
        soft_nms(torch.zeros(1, 4), torch.ones(1, 1), decay="exponential")
