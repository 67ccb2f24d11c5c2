"""What Cropr modules predict in detection: the set of classes in the image (paper, section 3: one query, sigmoid BCE).

B batch, Q queries, M Cropr modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cropr.data.coco import Target


def present_classes(targets: Sequence[Target], num_classes: int) -> Tensor:
    """[B, classes] float: 1 where an instance of the class is left in the image after cropping.

    Args:
        targets: with ``labels`` [n] from 1 to ``num_classes``; crowd regions are not among them.
        num_classes: without background.
    """
    present = torch.zeros(len(targets), num_classes, device=targets[0]["labels"].device)
    for row, target in zip(present, targets, strict=True):
        row[target["labels"] - 1] = 1.0
    return present


def auxiliary_losses(aux: Sequence[Tensor], present: Tensor) -> Tensor:
    """[M], one a Cropr module: binary cross-entropy, averaged over images, queries and classes.

    The paper gives the loss, not how it is averaged; the mean over classes keeps its size the same for any number.

    Args:
        aux: M predictions [B, Q, classes], logits.
        present: [B, classes], as from ``present_classes``. All queries have the same target.
    """
    if not aux:
        return present.new_empty(0)
    logits = torch.stack(tuple(aux)).float()
    target = present[:, None].expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(1, 2, 3))
