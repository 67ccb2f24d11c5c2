"""What Cropr modules learn in detection."""

from __future__ import annotations

import math

import torch

from cropr.tasks.detection.auxiliary import auxiliary_losses, present_classes


def test_present_classes():
    targets = [{"labels": torch.tensor(labels, dtype=torch.int64)} for labels in ([2, 2, 4], [], [1])]
    assert present_classes(targets, 4).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_auxiliary_losses():
    """Two modules, two images, one query, two classes; by hand. No class present is a target like any other."""
    present = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    even, sure = torch.zeros(2, 1, 2), torch.tensor([[[2.0, -2.0]], [[-2.0, -2.0]]])
    losses = auxiliary_losses((even, sure), present)
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(1 + math.exp(-2))]))
    assert auxiliary_losses((), present).shape == (0,)
