"""The clock, the order of rounds and the statistics of paired rounds.

What is compared runs in one process, one after the other in every round and in alternating order, so that whatever
slows the machine down for a while slows all of it. Warm-up is left out; medians over rounds are reported with the
interquartile range, and ratios, taken round by round, with a bootstrap interval of their median.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cropr.bench.device import synchronize

MIN_SAMPLE_S = 0.1
"""A round repeats what is fast until it lasts about so long, for the sake of the clock."""

Reading = TypeVar("Reading")

Tell = Callable[[str], None]
"""Is called with a word on what comes next, for a progress bar."""


def say_nothing(what: str) -> None:
    """A ``Tell`` for nobody."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is timed, and how often one round repeats it."""

    forward: Callable[[], Any]
    repeats: int


def warm_up(forward: Callable[[], Any], passes: int, device: str, first: float) -> Run:
    """Finish the warm-up and find out how many passes make a round long enough.

    Args:
        forward: the pass that will be timed.
        passes: untimed passes in all, the one that ran already included.
        device: torch's name of the device.
        first: seconds of that one. If it was fast, one more is run for an estimate without the cost of a first time.
    """
    once = first
    for _ in range(max(passes - 1, int(first < 10 * MIN_SAMPLE_S))):
        once = clock(Run(forward, 1), device)
    return Run(forward, max(1, math.ceil(MIN_SAMPLE_S / once)))


def clock(run: Run, device: str = "cpu") -> float:
    """Seconds per pass, over the run's repeats: events on CUDA, else the wall clock."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(run.repeats):
            run.forward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / run.repeats
    begin = time.perf_counter()
    for _ in range(run.repeats):
        run.forward()
    synchronize(device)
    return (time.perf_counter() - begin) / run.repeats


def interleave(clocks: Sequence[Callable[[], Reading]], rounds: int, tell: Tell = say_nothing) -> list[list[Reading]]:
    """Read every clock once a round, in turn; every other round runs backwards: A B, B A, A B, ...

    Returns:
        Readings (seconds, or several parts of a pass) by clock, in the order of rounds.
    """
    seconds: list[list[Reading]] = [[] for _ in clocks]
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        order = range(len(clocks)) if number % 2 == 0 else reversed(range(len(clocks)))
        for i in order:
            seconds[i].append(clocks[i]())
    return seconds


def summary(base_seconds: Sequence[float], seconds: Sequence[float], batch_size: int, bound: float) -> dict[str, float]:
    """Medians, spreads and the speed-up of paired rounds.

    Args:
        base_seconds: per forward pass of the unpruned model, a round each.
        seconds: the same of the pruned one.
        batch_size: images per forward pass of either.
        bound: speed-up that the FLOP count allows.
    """
    return {
        **{f"base_{name}": value for name, value in speed(base_seconds, batch_size).items()},
        **speed(seconds, batch_size),
        **against(base_seconds, seconds, bound),
    }


def speed(seconds: Sequence[float], batch_size: int) -> dict[str, float]:
    """``images_per_s``, the median over rounds, and its interquartile range."""
    values = batch_size / np.asarray(seconds)
    return {"images_per_s": float(np.median(values)), "images_per_s_iqr": iqr(values)}


def against(base_seconds: Sequence[float], seconds: Sequence[float], bound: float) -> dict[str, float]:
    """``speedup`` of paired rounds with its 95 % interval, beside the bound that the FLOP count sets."""
    found = ratio("speedup", base_seconds, seconds)
    return found | {"bound": bound, "share_of_bound": found["speedup"] / bound}


def ratio(name: str, base_seconds: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How many times faster the second is: median of paired rounds, interquartile range, 95 % interval."""
    values = np.asarray(base_seconds) / np.asarray(seconds)
    low, high = bootstrap_median(values)
    return {name: float(np.median(values)), f"{name}_iqr": iqr(values), f"{name}_low": low, f"{name}_high": high}


def bootstrap_median(
    values: Sequence[float] | np.ndarray, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median: resampled with replacement, ``draws`` times."""
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    low, high = np.quantile(np.median(data[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def iqr(values: np.ndarray) -> float:
    """Interquartile range."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low)
