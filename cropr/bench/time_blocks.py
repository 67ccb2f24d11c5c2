"""Latency of one Transformer block over token counts: what does a count cost that is not a multiple of 8 or more?

Measured on the host's own blocks, through the adapter, as they run within a pruned model: rotary rows are gathered
where the host has them. Several blocks of the model run after each other, since the weights of one alone would stay in
the processor's cache, which those of a whole model do not.

B batch, P prefix tokens, N patch tokens, C channels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cropr.bench.attention import with_attention_kernel
from cropr.bench.device import check, weights_dtype
from cropr.bench.models import build_on_meta, random_weights
from cropr.bench.specs import BlocksSpec
from cropr.bench.timing import Tell, iqr, no_progress, time_passes
from cropr.pruning.backbones import Backbone
from cropr.pruning.flops import Cost
from cropr.pruning.tokens import Tokens
from cropr.specs import PruneSpec

DEPTH = 4
"""Blocks that run after each other."""


def block_cells(spec: BlocksSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """A cell a count: ``seconds`` (round by round) and ``metrics`` (``block_s``, ``block_s_iqr``, ``block_gmacs`` of an
    image); arguments and errors as of ``cropr.bench.microbench.measure``."""
    series = time_blocks(spec, device, tell)
    cost = Cost(build_on_meta(spec.model, PruneSpec(), spec.image_size).backbone)
    cells = []
    for count, seconds in series.items():
        spread = {"block_s": float(np.median(seconds)), "block_s_iqr": iqr(np.asarray(seconds))}
        cells.append({"seconds": seconds, "metrics": spread | {"block_gmacs": cost.block(1, count) / 1e9}})
    return cells


def time_blocks(spec: BlocksSpec, device: str = "cpu", tell: Tell = no_progress) -> dict[int, list[float]]:
    """Seconds of one block by token count (prefix included), a reading a round; all counts take turns in every round.

    Raises:
        Unsupported: the device cannot run this precision.
        ValueError: no token besides the prefix.
    """
    check(spec.precision, device)
    counts = sorted(set(spec.tokens))
    backbone = _backbone(spec, max(counts), device)
    if counts[0] <= backbone.prefix:
        raise ValueError(f"{counts[0]} tokens: the model has {backbone.prefix} prefix tokens; ask for more than that")
    with torch.inference_mode():
        passes = {}
        for count in counts:
            forward = partial(_forward, backbone, *_input(backbone, count, spec.batch_size, device))
            passes[count] = with_attention_kernel(spec.attention, spec.precision, device, forward)
        readings = time_passes(passes, spec.rounds, device, tell)
    return {count: [value / backbone.depth for value in values] for count, values in readings.items()}


def _forward(backbone: Backbone, tokens: Tokens, position: Any) -> Tensor:
    """All blocks in a row."""
    for block in range(1, backbone.depth + 1):
        tokens = backbone.run(block, tokens, position)
    return tokens.x


def _input(backbone: Backbone, count: int, batch_size: int, device: str) -> tuple[Tokens, Any]:
    """Tokens [B, count, C] of noise, the first patches of the grid, and the host's positions."""
    dtype = next(backbone.parameters()).dtype
    size = backbone.host.patch_embed.img_size
    _, position = backbone.embed(torch.zeros(1, 3, *size, device=device, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, count, backbone.dim, generator=generator).to(device, dtype)
    index = torch.arange(count - backbone.prefix, device=device).expand(batch_size, -1)
    return Tokens(x, index, backbone.prefix), position


def _backbone(spec: BlocksSpec, most: int, device: str) -> Backbone:
    """The adapter around the first blocks, its image large enough for ``most`` tokens."""
    model = spec.model.model_copy(update={"args": spec.model.args | {"depth": DEPTH}})
    patch = build_on_meta(model, PruneSpec(), spec.image_size).backbone.host.patch_embed.patch_size[0]
    backbone = build_on_meta(model, PruneSpec(), (math.isqrt(most - 1) + 1) * patch).backbone
    random_weights(backbone, device, weights_dtype(spec.precision))
    return backbone.requires_grad_(False).eval()
