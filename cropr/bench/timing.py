"""The clock, the order of rounds and the statistics of paired rounds.

What is compared runs in one process, one after the other in every round and in random order, so that what slows the
machine down for a while slows all of it, and no case always follows the same one. Warm-up is left out. Reported are
medians and interquartile ranges of rounds, and ratios, taken round by round, with an interval of their median.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import chain, groupby
from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn

from cropr.bench.device import Unsupported, largest_batch, noise, run_forced, with_attention_kernel, working_memory
from cropr.bench.statistics import median_bounds
from cropr.distributed import reuse_freed_memory
from cropr.records import make_record
from cropr.specs import Spec

MIN_SAMPLE_S = 0.1
"""A round repeats a fast pass until it lasts about so long, because the clock is coarse."""
Tell = Callable[[str], None]
"""Is called with a word on what comes next, for a progress bar."""
Clock = Callable[[], float]


def no_progress(what: str) -> None:
    """A ``Tell`` that shows nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One forward pass and how it is run."""

    name: str
    """For the progress bar."""
    model: nn.Module
    """In eval mode, on the device, in the precision's dtype."""
    shape: tuple[int, int, int]
    """Of one input: 3, H, W of an image, or of features."""
    precision: str = "fp32"
    attention: str = "auto"
    compile: bool = False
    channels_last: bool = False
    turn: Any = None
    """Neighbours in a list of cases with the same one stay neighbours in every round; None is a turn of its own."""


@dataclass(slots=True)
class Outcome:
    """What was measured of a case."""

    seconds: list[float] = field(default_factory=list)
    """Of one forward pass, a reading a round; empty where the device cannot run it."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Attention kernels that ran: name -> calls."""
    working_memory_mb: float | None = None
    """Peak of memory during a pass over what was in use before it. None where the system keeps no count, and for a slow
    model with a single warm-up pass: the first one does not count."""
    unsupported: str | None = None
    """Why the device cannot run it."""


def time_interleaved(
    cases: Sequence[Case], batch_size: int, rounds: int, warmup: int, device: str, tell: Tell = no_progress
) -> tuple[int, list[Outcome]]:
    """Try every case, then time those that run, in turn in every round; the batch size that fitted, and their outcomes.
    A case does not run where the device lacks the precision or the attention kernel, or where outputs are not finite.
    ``batch_size``, the inputs of a pass, is halved for all cases until the device has the memory for it. Each case has
    ``warmup`` untimed passes and ``rounds`` readings. Raises: ValueError: there is no such device."""

    def attempt(size: int) -> list[Outcome]:
        outcomes = [Outcome() for _ in cases]
        clocks: dict[int, Clock] = {}
        for number, case in enumerate(cases):
            tell(f"warm up {case.name}")
            try:
                clocks[number] = _prepare(case, outcomes[number], size, warmup, device)
            except Unsupported as error:
                outcomes[number].unsupported = str(error)
        turns = {number: number if case.turn is None else repr(case.turn) for number, case in enumerate(cases)}
        for number, seconds in interleave(clocks, rounds, tell, turns.get).items():
            outcomes[number].seconds = seconds
        return outcomes

    try:
        with torch.inference_mode():
            return largest_batch(batch_size, attempt)
    except Unsupported as error:
        return batch_size, [Outcome(unsupported=str(error)) for _ in cases]


def time_passes(
    forwards: Mapping[Any, Callable[[], Any]], rounds: int, device: str, tell: Tell = no_progress
) -> dict[Any, list[float]]:
    """Seconds of each pass by name, a reading a round; one warm-up pass each, then in turn."""
    clocks: dict[Any, Clock] = {}
    for name, forward in forwards.items():
        tell(f"warm up {name}")
        clocks[name] = warm_up(forward, 1, device, clock(forward, 1, device))
    return interleave(clocks, rounds, tell)


def interleave(
    clocks: Mapping[Any, Clock], rounds: int, tell: Tell = no_progress, turn: Callable[[Any], Any] = lambda name: name
) -> dict[Any, list[float]]:
    """Readings by name of clocks that take turns, in an order drawn anew for every two rounds, of which the second runs
    backwards, so that each clock has the same mean place. Neighbours with an equal ``turn`` stay neighbours."""
    seconds: dict[Any, list[float]] = {name: [] for name in clocks}
    turns, random = [list(names) for _, names in groupby(clocks, turn)], Random(0)
    order: list[Any] = []
    for number in range(rounds if clocks else 0):
        tell(f"round {number + 1} of {rounds}")
        if number % 2 == 0:
            random.shuffle(turns)
            order = list(chain(*turns))
        else:
            order.reverse()
        for name in order:
            seconds[name].append(clocks[name]())
    return seconds


def warm_up(forward: Callable[[], Any], passes: int, device: str, first: float) -> Clock:
    """Finish the warm-up of so many ``passes``, and repeat the pass in every reading until that is long enough. One
    pass ran already, in ``first`` seconds. If it was fast, one more is run, without the cost of a first time."""
    once = first
    for _ in range(max(passes - 1, int(first < 10 * MIN_SAMPLE_S))):
        once = clock(forward, 1, device)
    return partial(clock, forward, max(1, math.ceil(MIN_SAMPLE_S / once)), device)


def clock(forward: Callable[[], Any], repeats: int = 1, device: str = "cpu") -> float:
    """Seconds per pass over ``repeats`` passes: events on CUDA, else the wall clock."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            forward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        forward()
    if device.startswith("mps"):
        torch.mps.synchronize()
    return (time.perf_counter() - begin) / repeats


def speed(seconds: Sequence[float], batch_size: int) -> dict[str, float]:
    """``images_per_s``, the median over rounds, and its interquartile range."""
    values = batch_size / np.asarray(seconds)
    return {"images_per_s": float(np.median(values)), "images_per_s_iqr": iqr(values)}


def against(base_seconds: Sequence[float], seconds: Sequence[float], mac_ratio: float) -> dict[str, float]:
    """``speedup`` of paired rounds with its 95 % interval, beside the ratio of multiply-adds."""
    found = ratio("speedup", base_seconds, seconds)
    return found | {"mac_ratio": mac_ratio, "speedup_over_mac_ratio": found["speedup"] / mac_ratio}


def ratio(name: str, base_seconds: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How many times faster the second is: median of paired rounds, interquartile range, 95 % interval."""
    values = np.asarray(base_seconds) / np.asarray(seconds)
    low, high = median_bounds(values)
    return {name: float(np.median(values)), f"{name}_iqr": iqr(values), f"{name}_low": low, f"{name}_high": high}


def iqr(values: np.ndarray) -> float:
    """Interquartile range."""
    return float(np.subtract(*np.quantile(values, [0.75, 0.25])))


def _prepare(case: Case, outcome: Outcome, batch_size: int, warmup: int, device: str) -> Clock:
    """Warm a case up; its kernels and its memory are written to ``outcome``."""
    model: Any = torch.compile(case.model, fullgraph=True, dynamic=False) if case.compile else case.model
    inputs = noise(batch_size, case.shape, device, case.precision, case.channels_last)
    forward = with_attention_kernel(case.attention, case.precision, device, partial(model, inputs))
    found: list[Any] = []
    seconds = clock(lambda: found.extend(run_forced(forward, case.attention, case.compile)), 1, device)
    logits, outcome.kernels = found
    if not logits.isfinite().all():
        name = type(case.model).__name__
        raise Unsupported(f"{name} gives non-finite logits in {case.precision}; use another precision")
    if warmup > 1 or seconds < 10 * MIN_SAMPLE_S:
        # Not in the first pass: what torch's libraries then set up for these shapes stays allocated.
        found = []
        seconds = clock(lambda: found.extend(working_memory(forward, device)), 1, device)
        outcome.working_memory_mb, warmup = found[1], max(1, warmup - 1)
    return warm_up(forward, warmup, device, seconds)


def recorded(kind: str) -> Callable[..., Any]:
    """Decorator: a function that measures what a spec describes, on a device by torch's name, returns a record. What it
    calls ``provenance`` joins that of the record. Where the device cannot run it, the record has no metrics, and
    ``unsupported`` says why. Raises: ValueError: an impossible model, schedule or reducer, or no such device."""

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
