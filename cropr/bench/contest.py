"""Forward passes that are timed against each other in one process.

Each case is tried first: does the device have the precision and the attention kernel, are the outputs finite, how much
memory does a pass take? Those that the device can run then take turns, round by round; the others say why not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cropr.bench.attention import run_forced, under
from cropr.bench.device import Unsupported, check, first_line, synchronize
from cropr.bench.memory import working_memory
from cropr.bench.timing import MIN_SAMPLE_S, Run, Tell, clock, interleave, say_nothing, warm_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One forward pass and how it is run."""

    name: str
    """For the progress bar."""
    model: nn.Module
    """In eval mode, on the device, in the precision's dtype."""
    images: Tensor
    """What it is given: [B, 3, H, W], or of parts of a model, features."""
    precision: str = "fp32"
    attention: str = "auto"
    compile: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of a case."""

    seconds: list[float] = field(default_factory=list)
    """Of one forward pass, a reading a round; empty where the device cannot run it."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Attention kernels that ran: name -> calls."""
    working_memory_mb: float | None = None
    """Peak of memory during a pass over what was in use before it. None where the system keeps no count, and for a slow
    model with a single warm-up pass: the first one does not count."""
    unsupported: str | None = None
    """Why the device cannot run it."""


def contest(cases: Sequence[Case], rounds: int, warmup: int, device: str, tell: Tell = say_nothing) -> list[Outcome]:
    """Try every case, then time those that run, in turn in every round.

    Args:
        cases: with images of the batch size that is wanted.
        rounds: readings a case.
        warmup: untimed passes of each case before them.
        device: torch's name of the device.
        tell: called with a word on what comes next.

    Raises:
        torch.OutOfMemoryError: the device has not the memory for these batches.
        ValueError: there is no such device.
    """
    outcomes = [Outcome() for _ in cases]
    runs: dict[int, Run] = {}
    with torch.inference_mode():
        for number, (case, outcome) in enumerate(zip(cases, outcomes, strict=True)):
            tell(f"warm up {case.name}")
            try:
                runs[number] = _prepare(case, outcome, warmup, device)
            except Unsupported as error:
                outcome.unsupported = str(error)
        readings = interleave([partial(clock, run, device) for run in runs.values()], rounds if runs else 0, tell)
    for number, seconds in zip(runs, readings, strict=True):
        outcomes[number].seconds = seconds
    return outcomes


def _prepare(case: Case, outcome: Outcome, warmup: int, device: str) -> Run:
    """Warm a case up; ``outcome`` learns its kernels and its memory.

    Raises:
        Unsupported: the device cannot run it.
    """
    check(case.precision, device)
    model: Any = case.model
    if case.compile:
        model = torch.compile(case.model, fullgraph=True, dynamic=False)

    forward = under(case.attention, case.precision, device, partial(model, case.images))
    with _refusals():
        begin = time.perf_counter()
        logits, outcome.kernels = run_forced(forward, case.attention, case.compile)
        synchronize(device)
        seconds = time.perf_counter() - begin
    if not logits.isfinite().all():
        raise Unsupported(
            f"{type(case.model).__name__} gives non-finite logits in {case.precision}; use another precision"
        )
    if warmup > 1 or seconds < 10 * MIN_SAMPLE_S:
        # Not in the first pass: what torch's libraries then set up for these shapes stays, and is no work of a pass.
        begin = time.perf_counter()
        _, outcome.working_memory_mb = working_memory(forward, device)
        synchronize(device)
        warmup, seconds = max(1, warmup - 1), time.perf_counter() - begin
    return warm_up(forward, warmup, device, seconds)


@contextmanager
def _refusals() -> Iterator[None]:
    """Errors of the compiler, and of operators that a device lacks, become reasons."""
    try:
        yield
    except NotImplementedError as error:
        raise Unsupported(f"torch has no such operator here: {first_line(error)}") from None
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise Unsupported(f"torch.compile: {first_line(error)}") from None
        raise
