"""Latency of one Transformer block as a function of its token count.

Measured on the host's own blocks, through the adapter, as they run within a pruned model: rotary rows are gathered
where the host has them. Several blocks of the model run after each other, since the weights of one alone would stay in
the processor's cache, which those of a whole model do not.

B batch, P prefix tokens, N patch tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cropr.bench import models
from cropr.bench.attention import under
from cropr.bench.device import check, weights_dtype
from cropr.bench.timing import Run, Tell, clock, interleave, say_nothing, warm_up
from cropr.pruning.backbones import Backbone
from cropr.pruning.tokens import Tokens
from cropr.specs import ModelSpec, PruneSpec

DEPTH = 4
"""Blocks that run after each other."""


def block_series(
    model: ModelSpec,
    tokens: Sequence[int],
    batch_size: int = 4,
    precision: str = "fp32",
    device: str = "cpu",
    rounds: int = 5,
    attention: str = "auto",
    tell: Tell = say_nothing,
) -> dict[int, list[float]]:
    """Seconds of one block by token count, a reading a round; all counts run in turn in every round.

    Args:
        model: its first blocks are built with random weights.
        tokens: counts with prefix, as ``cropr.pruning.schedule.attended`` gives them.
        batch_size: images.
        precision: see ``cropr.bench.device``.
        device: torch's name of the device.
        rounds: readings a count.
        attention: kernel to force.
        tell: called with a word on what comes next.

    Raises:
        Unsupported: the device cannot run this precision.
        ValueError: no token besides the prefix.
    """
    check(precision, device)
    counts = sorted(set(tokens))
    backbone = _backbone(model, max(counts), device, weights_dtype(precision))
    if counts[0] <= backbone.prefix:
        raise ValueError(f"{counts[0]} tokens: the model has {backbone.prefix} prefix tokens; ask for more than that")
    with torch.inference_mode():
        runs: list[Run] = []
        for count in counts:
            tell(f"warm up {count} tokens")
            inputs = _input(backbone, count, batch_size, device)
            forward = under(attention, precision, device, partial(_forward, backbone, *inputs))
            runs.append(warm_up(forward, 1, device, clock(Run(forward, 1), device)))
        readings = interleave([partial(clock, run, device) for run in runs], rounds, tell)
    depth = min(DEPTH, backbone.depth)
    return {count: [value / depth for value in values] for count, values in zip(counts, readings, strict=True)}


def _forward(backbone: Backbone, tokens: Tokens, position: Any) -> Tensor:
    """The first blocks in a row."""
    for block in range(1, min(DEPTH, backbone.depth) + 1):
        tokens = backbone.run(block, tokens, position)
    return tokens.x


def _input(backbone: Backbone, count: int, batch_size: int, device: str) -> tuple[Tokens, Any]:
    """Tokens [B, count, C] of noise, the first patches of the grid, and the host's positions."""
    parameter = next(backbone.parameters())
    rows, columns = backbone.host.patch_embed.patch_size
    grid = backbone.host.patch_embed.grid_size
    image = torch.zeros(1, 3, grid[0] * rows, grid[1] * columns, device=device, dtype=parameter.dtype)
    _, position = backbone.embed(image)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, count, backbone.dim, generator=generator).to(device, parameter.dtype)
    index = torch.arange(count - backbone.prefix, device=device).expand(batch_size, -1)
    return Tokens(x, index, backbone.prefix), position


def _backbone(model: ModelSpec, most: int, device: str, dtype: torch.dtype) -> Backbone:
    """The adapter around the first blocks, its image large enough for ``most`` tokens."""
    spec = ModelSpec(name=model.name, args=model.args | {"depth": DEPTH})
    patch = models.hosted(spec, PruneSpec(), image_size=224).backbone.host.patch_embed.patch_size[0]
    side = math.isqrt(most - 1) + 1
    built = models.hosted(spec, PruneSpec(), side * patch).backbone
    models.random_weights(built, device, dtype)
    return built.requires_grad_(False).eval()
