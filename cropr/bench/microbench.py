"""Measurements as records."""

import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from cropr.bench.device import Unsupported, check
from cropr.bench.specs import BenchSpec, MicrobenchSpec, PlanSpec
from cropr.bench.timing import Tell, no_progress
from cropr.records import make_record
from cropr.specs import Spec
from cropr.training.distributed import reuse_freed_memory


def recorded(find: Callable[[Any, str, Tell], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A function that measures what a spec describes, on a device by torch's name, as one that returns a record.

    What it calls ``provenance`` joins that of the record. Where the device cannot run it, the record has no metrics,
    and ``unsupported`` says why. Raises: ValueError: an impossible model, schedule or reducer, or no such device.
    """

    @wraps(find)
    def measure(spec: Spec, device: str = "cpu", tick: Tell = no_progress) -> dict[str, Any]:
        started = time.time()
        reused = device == "cpu" and reuse_freed_memory()
        try:
            found = find(spec, device, tick)
        except Unsupported as error:
            found = {"metrics": {}, "unsupported": str(error)}
        origin = {"device": device, "freed_memory_reused": reused, **found.pop("provenance", {})}
        kind = {BenchSpec: "bench", PlanSpec: "plan"}.get(type(spec), "microbench")
        return make_record(kind, spec, started, found, **origin)

    return measure


@recorded
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
