"""Tokens: nothing is lost, nothing is doubled, places stay with their values."""

from __future__ import annotations

import pytest
import torch

from cropr.pruning.tokens import Tokens, take


def _tokens(batch: int = 3, prefix: int = 2, patches: int = 12, channels: int = 5) -> Tokens:
    """Values that tell where they came from: x[b, p + n, 0] = n."""
    x = torch.randn(batch, prefix + patches, channels)
    x[:, prefix:, 0] = torch.arange(patches)
    return Tokens.full(x, prefix)


@pytest.mark.parametrize("x", [torch.randn(4, 9, 3), torch.randn(4, 10, 6)[:, 1:, ::2]], ids=["plain", "strided"])
def test_take_is_indexing(x):
    rows = torch.stack([torch.randperm(9)[:5] for _ in range(4)])
    assert torch.equal(take(x, rows), torch.stack([image[row] for image, row in zip(x, rows, strict=True)]))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_keep_and_cut_partition_the_patches_and_keep_the_prefix(prefix):
    tokens = _tokens(prefix=prefix)
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    kept, pruned = tokens.keep(order[:, :7]), tokens.cut(order[:, 7:])
    assert torch.equal(kept.x[:, :prefix], tokens.x[:, :prefix])
    assert kept.num_patches == 7
    assert pruned.num_patches == 5
    assert torch.equal(torch.cat((kept.index, pruned.index), 1).sort(1).values, tokens.index)
    for part in (kept, pruned):
        assert torch.equal(part.patches[..., 0].long(), part.index)


def test_append_then_raster_restores_the_grid():
    tokens = _tokens()
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    parts = tokens.keep(order[:, :4]).append([tokens.cut(order[:, 4:6]), tokens.cut(order[:, 6:])])
    assert torch.equal(parts.raster().x, tokens.x)
    assert torch.equal(parts.raster().index, tokens.index)
    assert tokens.append([]) is tokens


def test_take_passes_gradients_to_the_rows_taken_only():
    x = torch.randn(1, 4, 2, requires_grad=True)
    take(x, torch.tensor([[2, 0]])).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0, :, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]))
