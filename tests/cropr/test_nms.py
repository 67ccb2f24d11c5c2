"""Suppression against the plain loops that define it."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from cropr.tasks.detection.cascade import nms, soft_nms


def crowded(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in clusters, and scores."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 60
    boxes = torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=random) * 40), dim=1)
    return boxes, torch.rand(count, classes, generator=random) ** 3


def plain_soft_nms(boxes, scores, threshold, min_score):
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
            if (iou := float(overlap[best, row])) > threshold:
                alive[row] *= 1 - iou
    return picks


def check(picks, expected):
    """``expected``: [(score, label, row)] by falling score."""
    assert picks.labels.tolist() == [label for _, label, _ in expected]
    assert picks.index.tolist() == [row for _, _, row in expected]
    torch.testing.assert_close(picks.scores, torch.tensor([score for score, _, _ in expected]))


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("limit", [7, 1000])
def test_soft_nms_equals_the_plain_loop(threshold, limit):
    boxes, scores = crowded(60, 5)
    expected = [
        (score, column + 1, row)
        for column in range(5)
        for row, score in plain_soft_nms(boxes, scores[:, column], threshold, 0.05)
    ]
    assert len(expected) > 6
    picks = soft_nms(boxes, scores, threshold=threshold, min_score=0.05, limit=limit)
    check(picks, sorted(expected, reverse=True)[:limit])


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
    check(nms(boxes, scores, 0.4, 0.05, 20), sorted(expected, reverse=True)[:20])


@pytest.mark.parametrize("suppress", [nms, soft_nms])
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_is_left_of_nothing(suppress, count):
    """No box, and no box with a score."""
    boxes, _ = crowded(count, 1)
    picks = suppress(boxes, torch.zeros(count, 4), 0.5, 0.05, 100)
    assert len(picks.index) == len(picks.labels) == len(picks.scores) == 0
    assert picks.index.dtype == picks.labels.dtype == torch.int64


@pytest.mark.parametrize("suppress", [nms, soft_nms])
def test_a_copy_is_dropped_within_its_class_alone(suppress):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    picks = suppress(boxes, torch.tensor([[0.9, 0.0], [0.7, 0.8], [0.3, 0.0]]), 0.5, 0.05, 100)
    assert (picks.index.tolist(), picks.labels.tolist()) == ([0, 1, 2], [1, 2, 1])
