"""Intervals over seeds, and what they decide. numpy and scipy only.

One seed has no interval: its bounds are None, and nothing is decided by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy import stats

Outcome = Literal["holds", "contradicted", "undecided"]

_RELATION = re.compile(r"^\s*(>=|<=|>|<)\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))?\s*$")


MIN_ROUNDS = 6
"""Fewest rounds whose bootstrap interval of the median is one of 95 %: that of fewer is their range at most, which
holds the median in 1 - 2 / 2^n of all cases (3 rounds: 75 %, 5: 94 %, 6: 97 %)."""
ROUNDS = "95 % bootstrap over the rounds of one process; of fewer than six rounds, their range"
"""What brackets behind speeds mean."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; ``low`` and ``high`` are None where the data give no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int
    """Observations behind the mean: seeds, or images for ``wilson``."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"an interval has both bounds or none, got low={self.low}, high={self.high}")

    @property
    def known(self) -> bool:
        """Whether there are bounds at all."""
        return self.low is not None

    def format(self, digits: int = 1, signed: bool = False) -> str:
        """``89.4 [88.9, 89.9]``, or the bare mean where there is no interval."""

        def write(value: float) -> str:
            return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"  # never -0.0

        text = write(self.mean)
        if self.low is not None and self.high is not None:
            text += f" [{write(self.low)}, {write(self.high)}]"
        return text


@dataclass(frozen=True)
class Verdict:
    """What an interval says about a claim, and why, in one sentence part."""

    outcome: Outcome
    reason: str


class HasRelation(Protocol):
    """What ``decide`` reads of a claim: a relation such as ``>`` or ``>= -2.0``, without a number meaning 0."""

    @property
    def relation(self) -> str: ...


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student-t interval of the mean over independent observations (one a seed).

    Args:
        values: one number a seed; at least one, all finite.
        level: coverage, between 0 and 1.

    Returns:
        The interval; without bounds for a single value, since one observation says nothing about its spread.

    Raises:
        ValueError: no value, a value that is not finite, or a level outside (0, 1).
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"an interval needs a flat list of at least one value, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"an interval needs finite values, got {array.tolist()}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, must lie between 0 and 1, for example 0.95")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + level) / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size))
    return Interval(mean, mean - half, mean + half, int(array.size))


def difference_interval(
    left: Mapping[int, float] | Sequence[float], right: Mapping[int, float] | Sequence[float], level: float = 0.95
) -> Interval:
    """Interval of ``left - right``, paired by seed.

    Pairing takes out what both runs of a seed share (order of the images, start of the weights).

    Args:
        left: values by seed, or a list in the order of the seeds.
        right: the same for the row that is subtracted.
        level: coverage.

    Raises:
        ValueError: lists of unequal length, or mappings that share no seed. Seeds that only one side has are left out.
    """
    if isinstance(left, Mapping) != isinstance(right, Mapping):
        raise ValueError("give both sides by seed (mappings) or both as lists")
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        shared = sorted(left.keys() & right.keys())
        if not shared:
            raise ValueError(f"no seed in common: left has {sorted(left)}, right has {sorted(right)}")
        pairs = [(left[seed], right[seed]) for seed in shared]
    else:
        if len(left) != len(right):
            raise ValueError(f"paired lists differ in length: {len(left)} and {len(right)}; pass mappings by seed")
        pairs = list(zip(left, right, strict=True))
    return mean_interval([a - b for a, b in pairs], level)


def wilson(correct: int, total: int, level: float = 0.95) -> Interval:
    """Wilson score interval of an accuracy in percent: the sampling of the images alone, for one trained model.

    It leaves out what another seed would change, so it must be labelled as such and never decides a claim.

    Args:
        correct: images classified correctly.
        total: images evaluated, at least one.
        level: coverage.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} images is impossible; give 0 <= correct <= total, total >= 1")
    z = float(stats.norm.ppf((1 + level) / 2))
    share = correct / total
    spread = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / spread
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / spread
    return Interval(100 * share, 100 * max(0.0, centre - half), 100 * min(1.0, centre + half), total)


def parse_relation(relation: str) -> tuple[str, float]:
    """``">= -2.0"`` -> ``(">=", -2.0)``; without a number the threshold is 0.

    Raises:
        ValueError: anything but one of ``> >= < <=`` and a number.
    """
    match = _RELATION.match(relation)
    if match is None:
        raise ValueError(f"relation is {relation!r}; write one of > >= < <= and a number, for example '>= -2.0'")
    return match[1], float(match[2] or 0)


def decide(claim: HasRelation, interval: Interval) -> Verdict:
    """Does the interval of ``left - right`` lie wholly on the claimed side of the threshold?

    Args:
        claim: with a ``relation`` such as ``>`` or ``>= -2.0``, on left minus right.
        interval: of that difference.

    Returns:
        ``holds`` if the whole interval satisfies the relation, ``contradicted`` if none of it does, else
        ``undecided``; one seed decides nothing.
    """
    symbol, threshold = parse_relation(claim.relation)
    if interval.low is None or interval.high is None:
        return Verdict("undecided", "one seed: no interval")
    low, high = interval.low, interval.high
    above = low > threshold or (symbol == ">=" and low >= threshold)
    below = high < threshold or (symbol == "<=" and high <= threshold)
    if symbol in (">", ">="):
        if above:
            return Verdict("holds", f"the interval lies above {threshold:g}")
        if high < threshold or (symbol == ">" and high <= threshold):
            return Verdict("contradicted", f"the interval lies below {threshold:g}")
    else:
        if below:
            return Verdict("holds", f"the interval lies below {threshold:g}")
        if low > threshold or (symbol == "<" and low >= threshold):
            return Verdict("contradicted", f"the interval lies above {threshold:g}")
    return Verdict("undecided", f"the interval includes {threshold:g}")
