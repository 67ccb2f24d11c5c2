"""Latency of one block over token counts, as a record: what does a count cost that is not a multiple of 8 or more?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cropr.bench.blocks import block_series
from cropr.bench.device import Unsupported
from cropr.bench.flops import block_dims, block_macs
from cropr.bench.models import hosted
from cropr.bench.timing import iqr
from cropr.lab_specs import BlocksSpec
from cropr.records import provenance
from cropr.specs import PruneSpec


def measure_blocks(spec: BlocksSpec, device: str = "cpu", tick: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure one block at every token count, in turn in every round.

    Args:
        spec: model, counts, batch, precision.
        device: torch's name of the device.
        tick: called with a word on what comes next.

    Returns:
        The record: ``cells``, one a count: ``tokens``, ``precision``, ``attention``, ``batch_size``, and either
        ``seconds`` (round by round) with ``metrics`` (``block_s``, its ``block_s_iqr``, ``block_gmacs`` of one image),
        or ``unsupported`` with the reason.

    Raises:
        ValueError: an impossible model, or there is no such device.
    """
    started = time.time()
    common = {"precision": spec.precision, "attention": spec.attention, "batch_size": spec.batch_size}
    cells: list[dict[str, Any]]
    try:
        series = block_series(
            spec.model,
            spec.tokens,
            spec.batch_size,
            spec.precision,
            device,
            spec.rounds,
            spec.attention,
            tick or (lambda what: None),
        )
    except Unsupported as error:
        cells = [{"tokens": count, **common, "unsupported": str(error)} for count in sorted(spec.tokens)]
    else:
        dims = block_dims(hosted(spec.model, PruneSpec(), spec.image_size).backbone.host.blocks[0])
        cells = [
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
    return {
        "kind": "lab",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": {"cells": len(cells), "measured": sum("metrics" in cell for cell in cells)},
        "cells": cells,
        "provenance": provenance(started, device=device, precision=spec.precision),
    }
