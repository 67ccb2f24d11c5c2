"""Latency of one Transformer block over token counts: what does a count cost that is not a multiple of 8 or more?

Measured on the host's own blocks, through the adapter, as they run within a pruned model: rotary rows are gathered
where the host has them. Several blocks of the model run after each other, since the weights of one alone would stay in
the processor's cache, which those of a whole model do not.

B batch, P prefix tokens, N patch tokens, C channels.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cropr.bench.device import noise, weights_dtype, with_attention_kernel
from cropr.bench.models import build_on_meta, random_weights
from cropr.bench.timing import Tell, iqr, time_passes
from cropr.pruning.backbones import Backbone
from cropr.pruning.flops import Cost
from cropr.pruning.tokens import Tokens
from cropr.specs import PruneSpec
from workflow.paper.microbench import BlocksSpec

DEPTH = 4
"""Blocks that run after each other."""


def block_cells(spec: BlocksSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """A cell a count: ``seconds`` of one block (round by round; all counts take turns) and ``metrics`` (``block_s``,
    ``block_s_iqr``, ``block_gmacs`` of an image); arguments and errors as of ``microbench.measure.measure``.

    Raises:
        ValueError: no token besides the prefix.
    """
    counts, passes = sorted(spec.tokens), {}
    # The adapter around the first blocks, its image large enough for all tokens.
    model = spec.model.model_copy(update={"args": spec.model.args | {"depth": DEPTH}})
    patch = build_on_meta(model, PruneSpec(), spec.image_size).backbone.host.patch_embed.patch_size[0]
    size = (math.isqrt(counts[-1] - 1) + 1) * patch
    backbone = build_on_meta(model, PruneSpec(), size).backbone.requires_grad_(False).eval()
    random_weights(backbone, device, weights_dtype(spec.precision))
    if counts[0] <= backbone.prefix:
        raise ValueError(f"{counts[0]} tokens: the model has {backbone.prefix} prefix tokens; ask for more than that")
    with torch.inference_mode():
        _, position = backbone.embed(noise(1, (3, size, size), device, spec.precision))
        for count in counts:
            x = noise(spec.batch_size, (count, backbone.dim), device, spec.precision)
            index = torch.arange(count - backbone.prefix, device=device).expand(spec.batch_size, -1)
            forward = partial(_forward, backbone, Tokens(x, index, backbone.prefix), position)
            passes[count] = with_attention_kernel(spec.attention, spec.precision, device, forward)
        readings = time_passes(passes, spec.rounds, device, tell)
    cost, cells = Cost(backbone), []
    for count, values in readings.items():
        seconds = [value / DEPTH for value in values]
        metrics = {"block_s": float(np.median(seconds)), "block_s_iqr": iqr(np.asarray(seconds))}
        cells.append({"seconds": seconds, "metrics": metrics | {"block_gmacs": cost.block(1, count) / 1e9}})
    return cells


def _forward(backbone: Backbone, tokens: Tokens, position: Any) -> Tensor:
    """All blocks in a row."""
    for block in range(1, DEPTH + 1):
        tokens = backbone.run(block, tokens, position)
    return tokens.x
