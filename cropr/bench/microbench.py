"""A microbenchmark of any kind, as a record."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from cropr.bench.device import Unsupported
from cropr.bench.specs import MicrobenchSpec
from cropr.bench.timing import Tell, no_progress
from cropr.records import make_record
from cropr.training.distributed import reuse_freed_memory


def measure(spec: MicrobenchSpec, device: str = "cpu", tick: Tell = no_progress) -> dict[str, Any]:
    """Measure what ``spec``, one of ``MEASURES``, describes, on a device by torch's name; ``tick`` is called with each
    next step.

    Returns:
        The record. Its ``cells`` are the spec's places in their order, each with either ``metrics`` and ``seconds``, or
        ``unsupported``, the reason why the device could not run it; see the function of its kind.

    Raises:
        ValueError: an impossible model, schedule or reducer, or there is no such device.
    """
    started = time.time()
    module, _, name = spec.cells.partition(":")
    reused = device == "cpu" and reuse_freed_memory()
    places = spec.places()
    try:
        results = getattr(import_module(module), name)(spec, device, tick)
    except Unsupported as error:
        results = [{"unsupported": str(error)}] * len(places)
    cells = [place | result for place, result in zip(places, results, strict=True)]
    metrics = {"cells": len(cells), "measured": sum("metrics" in cell for cell in cells)}
    found = {"metrics": metrics, "cells": cells}
    return make_record("microbench", spec, started, found, device=device, freed_memory_reused=reused)
