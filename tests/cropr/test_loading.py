"""What all tasks share about batches; more of it is tested through class folders, in tests/cropr/test_imagenet.py."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cropr.data.loading import EvalBatches, Samples, TrainBatches
from cropr.distributed import World


class Boxes(Samples):
    """Images whose side is their index, with a random number of boxes, as detection has them."""

    layout = "coco"

    def __init__(self, count: int = 10, seed: int | None = 0) -> None:
        super().__init__(range(count), None, seed)

    def sample(self, index: int) -> tuple[torch.Tensor, dict]:
        boxes = torch.rand(index, 4) + random.random() + np.random.rand() if self.seed is not None else None
        return torch.full((3, index % 3, 2), float(index)), {"id": index, "boxes": boxes}


class Kinds(Boxes):
    def kind(self, index):
        return index % 3


def lists(samples):
    return [image for image, _ in samples], [target for _, target in samples]


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_may_be_lists_and_images_of_any_size(workers):
    batches = TrainBatches(Boxes(), 4, seed=1, collate=lists, workers=workers)
    (images, targets), _ = batches.epoch(0)
    assert [target["id"] for target in targets] == batches.order(0)[:4].tolist()
    assert [image.shape[1] for image in images] == [target["id"] % 3 for target in targets]
    again = TrainBatches(Boxes(), 4, seed=1, collate=lists)
    for one, other in zip(targets, next(again.epoch(0))[1], strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
    assert not torch.equal(Boxes()[0, 3][1]["boxes"], Boxes()[1, 3][1]["boxes"])


@pytest.mark.parametrize("world", [1, 2])
def test_kinds_do_not_share_a_batch_and_none_is_lost(world):
    seen = []
    for rank in range(world):
        batches = EvalBatches(Kinds(seed=None), 2, collate=lists, world=World(rank, world))
        order = []
        for images, targets in batches:
            assert 1 <= len(images) <= 2
            assert len({image.shape for image in images}) == 1
            order += [target["id"] for target in targets]
        assert order == batches.indices
        assert len(list(batches)) == len(batches)
        seen += order
    assert sorted(seen) == list(range(10))
