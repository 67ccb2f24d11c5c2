"""Intervals over seeds and rounds, and how they are written.

Each function takes a frame of measurements and gives a frame with one line per row: ``mean`` or ``median``, ``low`` and
``high`` (NaN where the data give no interval), ``n``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
"""Coverage of every interval."""
MIN_ROUNDS = 6
"""Fewest rounds whose bootstrap interval of the median covers 95 %. The interval of n < 6 rounds is their range, which
holds the median in 1 - 2 / 2^n of all cases (3 rounds: 75 %, 5: 94 %, 6: 97 %), so that it decides no claim."""
DRAWS = 10_000


def mean_interval(frame: pd.DataFrame, metric: str, by: str | Sequence[str] = "row") -> pd.DataFrame:
    """Student-t interval of the mean over seeds, per row, in the order of the frame.

    Args:
        frame: a line per row and seed, as ``load_records`` gives it.
        metric: column; lines without a number are left out.
        by: column or columns that tell rows apart.

    Returns:
        mean, low, high, n; one seed has no bounds, since one observation says nothing about its spread.
    """
    return _per_row(frame, metric, by, "mean", _student)


def paired_difference(
    frame: pd.DataFrame, metric: str, baseline: str, by: str = "row", pair: str = "seed", ratio: bool = False
) -> pd.DataFrame:
    """Interval of the mean difference to a row, paired by seed.

    Pairing takes out what both runs of a seed share: the order of the images, the start of the weights.

    Args:
        frame: a line per row and seed.
        metric: column.
        baseline: the row that is subtracted; it gets no line itself.
        by: column that holds the rows' names.
        pair: column by which lines are paired. Seeds that only one side has are left out.
        ratio: divide by the baseline instead.

    Returns:
        mean, low, high, n per row; rows that share no seed with the baseline are left out.

    Raises:
        ValueError: no such row.
    """
    if baseline not in set(frame[by]):
        raise ValueError(f"no row {baseline!r} to compare with; there are {', '.join(map(str, frame[by].unique()))}")
    base = frame[frame[by] == baseline].set_index(pair)[metric]
    others = frame[frame[by] != baseline]
    theirs = others[pair].map(base)
    values = others[metric] / theirs if ratio else others[metric] - theirs
    return mean_interval(others.assign(**{metric: values}), metric, by)


def median_interval(frame: pd.DataFrame, metric: str, by: str | Sequence[str] = "row") -> pd.DataFrame:
    """Percentile bootstrap interval of the median over the rounds of one process, per row.

    Fewer than ``MIN_ROUNDS`` rounds give their range. Equal to the bounds in the records of ``cropr.bench``.

    Args:
        frame: a line per row and round, as ``load_speed`` and ``load_rounds`` give it.
        metric: column.
        by: column or columns that tell rows apart.
    """
    return _per_row(frame, metric, by, "median", _bootstrap)


def with_interval(frame: pd.DataFrame, digits: int = 1, signed: bool = False) -> pd.Series:
    """``89.4 [88.9, 89.9]``, or the bare number where there is no interval. All numbers of the report pass here.

    Args:
        frame: as the functions above give it.
        digits: behind the point.
        signed: with a plus before positive numbers, for differences.
    """
    centre = "mean" if "mean" in frame else "median"
    texts = [
        write(middle, digits, signed)
        + ("" if math.isnan(low) else f" [{write(low, digits, signed)}, {write(high, digits, signed)}]")
        for middle, low, high in zip(frame[centre], frame["low"], frame["high"], strict=True)
    ]
    return pd.Series(texts, index=frame.index, dtype=object)


def write(value: float, digits: int = 1, signed: bool = False) -> str:
    """One number as text, rounded half to even as Python rounds; never ``-0.0``; empty for NaN."""
    return "" if math.isnan(value) else f"{round(float(value), digits) + 0.0:{'+' if signed else ''}.{digits}f}"


def seed_bounds(values: pd.Series) -> tuple[float, float]:
    """Ends of the Student-t interval, for seaborn's ``errorbar``."""
    return _student(np.asarray(values, dtype=float))[1:]


def _per_row(frame, metric, by, centre, interval) -> pd.DataFrame:  # type: ignore[no-untyped-def]
    groups = frame.dropna(subset=[metric]).groupby(by, sort=False)[metric]
    lines = {row: (*interval(values.to_numpy(float)), len(values)) for row, values in groups}
    table = pd.DataFrame.from_dict(lines, orient="index", columns=[centre, "low", "high", "n"])
    if not isinstance(by, str):
        table.index = pd.MultiIndex.from_tuples(table.index, names=list(by))
        return table
    return table.rename_axis(by)


def _student(values: np.ndarray) -> tuple[float, float, float]:
    mean = float(values.mean())
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def _bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    picks = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.median(values)), float(low), float(high)
