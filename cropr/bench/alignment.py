"""Latency of one block over token counts: what does a count cost that is not a multiple of 8 or more?"""

from __future__ import annotations

from typing import Any

import numpy as np

from cropr.bench.blocks import block_series
from cropr.bench.device import Unsupported
from cropr.bench.flops import block_dims, block_macs
from cropr.bench.models import hosted
from cropr.bench.specs import BlocksSpec
from cropr.bench.timing import Tell, iqr
from cropr.specs import PruneSpec


def block_cells(spec: BlocksSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure one block at every token count, in turn in every round; arguments and errors as of
    ``cropr.bench.lab.measure``.

    Returns:
        One a count: ``tokens``, ``precision``, ``attention``, ``batch_size``, and either
        ``seconds`` (round by round) with ``metrics`` (``block_s``, its ``block_s_iqr``, ``block_gmacs`` of one image),
        or ``unsupported`` with the reason.
    """
    common = {"precision": spec.precision, "attention": spec.attention, "batch_size": spec.batch_size}
    try:
        series = block_series(
            spec.model,
            spec.tokens,
            spec.batch_size,
            spec.precision,
            device,
            spec.rounds,
            spec.attention,
            tell,
        )
    except Unsupported as error:
        return [{"tokens": count, **common, "unsupported": str(error)} for count in sorted(spec.tokens)]
    dims = block_dims(hosted(spec.model, PruneSpec(), spec.image_size).backbone.host.blocks[0])
    return [
        {
            "tokens": count,
            **common,
            "seconds": seconds,
            "metrics": {
                "block_s": float(np.median(seconds)),
                "block_s_iqr": iqr(np.asarray(seconds)),
                "block_gmacs": block_macs(count, dims) / 1e9,
            },
        }
        for count, seconds in series.items()
    ]
