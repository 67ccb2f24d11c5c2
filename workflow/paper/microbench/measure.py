"""Microbenchmarks as records."""

from importlib import import_module
from typing import Any

from cropr.bench.device import Unsupported, check
from cropr.bench.timing import Tell, recorded
from workflow.paper.microbench import MicrobenchSpec


@recorded("microbench")
def measure(spec: MicrobenchSpec, device: str, tick: Tell) -> dict[str, Any]:
    """Measure what ``spec``, one of ``MEASURES``, describes; ``tick`` is called with each next step.

    Returns:
        The record. Its ``cells`` are the spec's places in their order, each with either ``metrics`` and ``seconds``, or
        ``unsupported``, the reason why the device could not run it; see the function of its kind.
    """
    module, _, name = spec.cells.partition(":")
    places = spec.places()
    try:
        if hasattr(spec, "precision"):
            check(spec.precision, device)
        results = getattr(import_module(module), name)(spec, device, tick)
    except Unsupported as error:
        results = [{"unsupported": str(error)}] * len(places)
    cells = [place | result for place, result in zip(places, results, strict=True)]
    return {"metrics": {"cells": len(cells), "measured": sum("metrics" in cell for cell in cells)}, "cells": cells}
