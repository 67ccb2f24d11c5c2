"""Measurements as records."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from cropr.bench.device import Unsupported
from cropr.bench.timing import Tell, no_progress
from cropr.records import make_record
from cropr.specs import Spec
from cropr.training.distributed import reuse_freed_memory


def recorded(kind: str) -> Callable[..., Any]:
    """Decorator: a function that measures what a spec describes, on a device by torch's name, returns a record.

    What it calls ``provenance`` joins that of the record. Where the device cannot run it, the record has no metrics,
    and ``unsupported`` says why. Raises: ValueError: an impossible model, schedule or reducer, or no such device.
    """

    def decorate(find: Callable[[Any, str, Tell], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @wraps(find)
        def measure(spec: Spec, device: str = "cpu", tick: Tell = no_progress) -> dict[str, Any]:
            started = time.time()
            reused = device == "cpu" and reuse_freed_memory()
            try:
                found = find(spec, device, tick)
            except Unsupported as error:
                found = {"metrics": {}, "unsupported": str(error)}
            origin = {"device": device, "freed_memory_reused": reused, **found.pop("provenance", {})}
            return make_record(kind, spec, started, found, **origin)

        return measure

    return decorate
