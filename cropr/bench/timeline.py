"""A forward pass cut at the borders of its blocks, so that its parts are timed as they run: after one another.

Parts that are timed each by itself find other caches and another allocator than within a model, and leave out what lies
between them. Here the parts add up to the pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from cropr.bench.device import synchronize
from cropr.bench.timing import Run


def dissect(run: Run, blocks: Sequence[nn.Module], device: str) -> np.ndarray:
    """Seconds of the parts of a pass, means over the run's repeats.

    Returns:
        [2 D + 1] for D blocks: before the first block, the first block, between it and the second, the second block,
        ..., the last block, after it.
    """
    mark = _marker(device)
    passes: list[list[Any]] = []
    with _marked(blocks, lambda: passes[-1].append(mark())):
        for _ in range(run.repeats):
            passes.append([mark()])
            run.forward()
            passes[-1].append(mark())
    synchronize(device)
    return np.mean([[_between(*pair) for pair in pairwise(marks)] for marks in passes], axis=0)


@contextmanager
def _marked(blocks: Sequence[nn.Module], mark: Callable[[], None]) -> Iterator[None]:
    """Inside, ``mark`` is called before and after every block."""
    handles = [
        register(lambda *_: mark())
        for block in blocks
        for register in (block.register_forward_pre_hook, block.register_forward_hook)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _marker(device: str) -> Callable[[], Any]:
    """What takes a moment down: an event on CUDA, else the wall clock."""
    if not device.startswith("cuda"):

        def now() -> float:
            synchronize(device)
            return time.perf_counter()

        return now

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record


def _between(start: Any, end: Any) -> float:
    """Seconds."""
    return float(end - start) if isinstance(start, float) else start.elapsed_time(end) / 1e3
