"""Intervals over seeds, images and rounds, and how they are written.

Each function takes a frame of measurements and gives a frame with one line per row: ``mean`` or ``median``, ``low`` and
``high`` (NaN where the data give no interval), ``n``, and ``over``: what the interval is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from cropr.bench.statistics import median_bounds

LEVEL = 0.95
"""Coverage of every interval."""
MIN_ROUNDS = 6
"""Fewest rounds whose interval (``cropr.bench.statistics``) covers 95 %; that of fewer decides no claim."""
IMAGE_DRAWS = 1_000
"""Resamples of the images, of which the variance is used, not the tails."""
MOST_SEEDS = 50
"""More are not suggested."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which COCO's evaluation reads precision."""

Arrays = Mapping[str, NDArray[Any]]
"""``per_image.npz`` beside a record: ``image``, the names or numbers of the n images in the order of the validation
set, and the arrays of its task."""


def mean_interval(
    frame: pd.DataFrame, metric: str, by: str | Sequence[str] = "row", others: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Interval of the mean of a metric, per row, in the order of the frame; see ``combine``.

    Args:
        frame: a line per row and seed, as ``load_records`` gives it; its column ``per_image`` names the files with the
            results of each image. Without them, the interval is over seeds alone.
        metric: column; lines without a number are left out.
        by: column or columns that tell rows apart.
        others: lines from which a row with one seed takes its spread (``seed_variance``); default: ``frame``.

    Returns:
        mean, low, high, n (seeds), over: what the interval is over, ``seed_sd`` (standard deviation over seeds) and
        ``image_sd`` (standard error of the mean from the choice of images).
    """
    lines = frame.dropna(subset=[metric]).copy()
    lines["_draws"] = pd.Series([draws(path, metric) for path in _files(lines)], index=lines.index, dtype=object)
    return _means(lines, metric, by, seed_variance(frame if others is None else others, metric, by))


def paired_difference(
    frame: pd.DataFrame,
    metric: str,
    baseline: str,
    by: str = "row",
    pair: str = "seed",
    ratio: bool = False,
    others: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Interval of the mean difference to a row, paired by seed and by image; see ``combine``.

    Pairing takes out what both runs of a seed share: the order of the images, the start of the weights; and what is
    easy or hard for both in an image.

    Args:
        frame: a line per row and seed, as for ``mean_interval``.
        metric: column.
        baseline: the row that is subtracted; it gets no line itself.
        by: column that holds the rows' names.
        pair: column by which lines are paired. Seeds that only one side has are left out.
        ratio: divide by the baseline instead; a row with one seed then gets an interval over images alone.
        others: as for ``mean_interval``. A difference of one seed each has twice their variance.

    Returns:
        As ``mean_interval``; rows that share no seed with the baseline are left out.

    Raises:
        ValueError: no such row.
    """
    if baseline not in set(frame[by]):
        raise ValueError(f"no row {baseline!r} to compare with; there are {', '.join(map(str, frame[by].unique()))}")
    lines = frame.assign(per_image=_files(frame))
    base = lines[lines[by] == baseline].set_index(pair)
    rest = lines[(lines[by] != baseline) & lines[pair].isin(base.index)].copy()
    against: Any = np.divide if ratio else np.subtract
    theirs = rest[pair].map(base["per_image"])
    pairs = [
        against(draws(mine, metric), draws(other, metric)) if same_images(mine, other, metric) else None
        for mine, other in zip(rest["per_image"], theirs, strict=True)
    ]
    rest["_draws"] = pd.Series(pairs, index=rest.index, dtype=object)
    rest[metric] = against(rest[metric], rest[pair].map(base[metric]))
    variance, freedom = (math.nan, 0) if ratio else seed_variance(frame if others is None else others, metric, by)
    return _means(rest.dropna(subset=[metric]), metric, by, (2 * variance, freedom))


def seed_variance(frame: pd.DataFrame, metric: str, by: str | Sequence[str] = "row") -> tuple[float, int]:
    """Pooled variance over seeds of the rows that have several, and its degrees of freedom; (NaN, 0) if none has, or if
    several columns tell rows apart. A row with one seed is given it, as in an analysis of variance: this assumes that
    seeds spread all rows alike. What both rows of a difference share by their seed is not subtracted.
    """
    seeds = frame.dropna(subset=[metric]).groupby(_key(by))[metric]
    extra = seeds.size() - 1
    freedom = int(extra.sum())
    known = freedom and isinstance(by, str)
    return (float((extra * seeds.var().fillna(0)).sum()) / freedom, freedom) if known else (math.nan, 0)


def combine(
    values: np.ndarray, images: np.ndarray | None, others: tuple[float, int] = (math.nan, 0)
) -> tuple[float, float, float, int, str, float, float]:
    """Interval of the mean of S seeds that were scored on the same n images.

    What varies is the seed and the choice of images. All seeds share the images, so that more seeds do not make the
    second part smaller. The variance of the mean is the sum of both: s^2 / S, with s the standard deviation over seeds,
    and v, the variance of the mean when the images are resampled with replacement, the same images for both rows and
    all seeds. The half width is t * sqrt(s^2 / S + v), with t at Satterthwaite's degrees of freedom
    (s^2 / S + v)^2 / ((s^2 / S)^2 / (S - 1) + v^2 / (n - 1)), of which the last term is left out: n is large.

    Why not resample seeds as well: a bootstrap of three seeds gives their range, which holds the mean of all seeds in
    75 % of all cases, not in 95 %. The price of the sum: the part of v that differs by seed is counted twice, so that
    the interval is rather too wide than too narrow.

    Args:
        values: [S], the metric or difference of each seed.
        images: [S, draws], the same of resampled images; None if there are none.
        others: s^2 for a single seed, from other rows, and its degrees of freedom (``seed_variance``).

    Returns:
        mean, low, high, seeds, what the interval is over, s, sqrt(v). Where s is not known, one seed without images has
        no bounds; one seed with images has an interval that says nothing of other seeds.
    """
    count, mean = len(values), float(values.mean())
    variance, freedom = (float(values.var(ddof=1)), count - 1) if count > 1 else others
    spread, by_seed = math.sqrt(variance), variance / count if freedom else 0.0
    by_image = float(images.mean(axis=0).var(ddof=1)) if images is not None else 0.0
    seeds = "seeds" if count > 1 else "other rows' seeds"
    over = " and ".join([*[seeds] * (freedom > 0), *["images"] * (images is not None)])
    if not over:
        return mean, math.nan, math.nan, count, "", spread, math.nan
    half = half_width(by_seed, freedom, by_image)
    return mean, mean - half, mean + half, count, over, spread, math.sqrt(by_image) if images is not None else math.nan


def half_width(by_seed: float, freedom: int, by_image: float) -> float:
    """Half the interval whose mean has the variances ``by_seed`` (with its degrees of freedom) and ``by_image``."""
    total = by_seed + by_image
    joint = freedom * (total / by_seed) ** 2 if by_seed else math.inf
    return float(stats.t.ppf((1 + LEVEL) / 2, joint)) * math.sqrt(total)


def seeds_needed(line: pd.Series, threshold: float) -> str:
    """How many seeds, or images, would decide an undecided comparison if its mean and spread stayed as they are."""
    gap, by_image = abs(line["mean"] - threshold), np.nan_to_num(line["image_sd"]) ** 2
    if math.isnan(line["seed_sd"]):
        return "one seed; its spread is not known: 3 seeds show it"
    for seeds in range(int(line["n"]) + 1, MOST_SEEDS + 1):
        if half_width(line["seed_sd"] ** 2 / seeds, seeds - 1, by_image) < gap:
            return f"{seeds} seeds at the present spread would decide it"
    alone = half_width(0.0, 0, by_image)
    if alone < gap:
        return f"more than {MOST_SEEDS} seeds would be needed at the present spread"
    factor = f"{(alone / gap) ** 2:.1f}" if gap else "many"
    return f"no number of seeds decides it: over {factor} times as many validation images are needed"


def rounds_needed(line: pd.Series, threshold: float) -> str:
    """The same for a speed: an interval of a median narrows with the root of the number of rounds."""
    gap, half = abs(line["median"] - threshold), max(line["high"] - line["median"], line["median"] - line["low"])
    if not gap:
        return "the median equals the threshold; another device may decide it"
    rounds = math.ceil(line["n"] * (half / gap) ** 2)
    return f"about {max(rounds, int(line['n']) + 1)} rounds at the present spread would decide it, or a steadier device"


def mcnemar(frame: pd.DataFrame, baseline: str, by: str = "row") -> pd.DataFrame:
    """Exact McNemar test of top-1 against a row, seed by seed: a check of ``paired_difference``.

    Returns:
        row, seed, ``won`` and ``lost`` (images that only the row, only the baseline gets right), ``p`` (two-sided), for
        the rows and seeds that have results of each image.
    """
    lines, base = [], frame[frame[by] == baseline].set_index("seed")["per_image"].to_dict()
    for row, seed, path in frame[frame[by] != baseline][[by, "seed", "per_image"]].itertuples(index=False):
        if same_images(path, base.get(seed), "top1"):
            mine, theirs = load_images(path)["correct"], load_images(base[seed])["correct"]
            won, lost = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
            p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
            lines.append((row, seed, won, lost, p))
    return pd.DataFrame(lines, columns=[by, "seed", "won", "lost", "p"])


# Images ---------------------------------------------------------------------------------------------------------------


def load_images(path: str) -> dict[str, np.ndarray]:
    """Arrays of a ``per_image.npz`` (``Arrays``), read again when the file has changed."""
    return _load_images(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _load_images(path: str, changed: int) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def draws(path: str | None, metric: str) -> np.ndarray | None:
    """The metric of ``IMAGE_DRAWS`` resamples of the images, the same resamples for all files with as many images."""
    return _draws(path, metric, Path(path).stat().st_mtime_ns) if isinstance(path, str) else None


@lru_cache(maxsize=256)
def _draws(path: str, metric: str, changed: int) -> np.ndarray | None:
    arrays, generator, parts = load_images(path), np.random.default_rng(0), []
    count = len(arrays["image"])
    for _ in range(0, IMAGE_DRAWS, 100):
        picks = generator.integers(count, size=(100, count)) + count * np.arange(100)[:, None]
        part = resampled(arrays, metric, np.bincount(picks.ravel(), minlength=100 * count).reshape(100, count))
        if part is None:
            return None
        parts.append(part)
    return np.concatenate(parts)


def same_images(mine: str | None, other: str | None, metric: str) -> bool:
    """Whether two files have that metric of the same images."""
    if draws(mine, metric) is None or draws(other, metric) is None:
        return False
    return bool(np.array_equal(load_images(str(mine))["image"], load_images(str(other))["image"]))


def _files(frame: pd.DataFrame) -> pd.Series:
    """Files with the results of each image; None where there is none."""
    return frame["per_image"] if "per_image" in frame else pd.Series(None, index=frame.index, dtype=object)


def _means(lines: pd.DataFrame, metric: str, by: str | Sequence[str], others: tuple[float, int]) -> pd.DataFrame:
    """``combine`` of each row; images count if all its seeds have them, and the same."""
    found = {}
    for row, own in lines.groupby(_key(by), sort=False):
        parts = list(own["_draws"])
        images = np.stack(parts) if all(part is not None for part in parts) else None
        found[row] = combine(own[metric].to_numpy(float), images, others)
    columns = ["mean", "low", "high", "n", "over", "seed_sd", "image_sd"]
    return _indexed(pd.DataFrame.from_dict(found, orient="index", columns=columns), by)


def median_interval(frame: pd.DataFrame, metric: str, by: str | Sequence[str] = "row") -> pd.DataFrame:
    """Interval of the median over the rounds of one process, per row, as in the records of ``cropr.bench``.

    Args:
        frame: a line per row and round, as ``load_speed`` and ``load_rounds`` give it.
        metric: column.
        by: column or columns that tell rows apart.
    """
    groups = frame.dropna(subset=[metric]).groupby(_key(by), sort=False)[metric]
    found = {row: (values.median(), *median_bounds(values.to_numpy()), len(values), "rounds") for row, values in groups}
    return _indexed(pd.DataFrame.from_dict(found, orient="index", columns=["median", "low", "high", "n", "over"]), by)


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
    return combine(np.asarray(values, dtype=float), None)[1:3]


def _key(by: str | Sequence[str]) -> Any:
    return by if isinstance(by, str) else list(by)


def _indexed(table: pd.DataFrame, by: str | Sequence[str]) -> pd.DataFrame:
    if isinstance(by, str):
        return table.rename_axis(by)
    table.index = pd.MultiIndex.from_tuples(table.index, names=list(by))
    return table


# Metrics of resampled images. D draws, n images, C classes, T IoU thresholds.


def resampled(images: Arrays, metric: str, counts: NDArray[Any]) -> NDArray[np.float64] | None:
    """A metric in percent of D samples of the images, [D]; None where the arrays do not give that metric.

    Args:
        images: arrays of ``per_image.npz``.
        metric: as in the record.
        counts: [D, n], how often each image is in each sample.
    """
    needs, compute = _METRICS.get(metric, ("", None))
    return compute(images, counts.astype(np.float64)) if compute and needs in images else None


def _share(name: str, images: Arrays, counts: NDArray[Any]) -> NDArray[Any]:
    """Percentage of right images."""
    return 100 * (counts @ images[name]) / counts.sum(axis=1)


def _object_kept(images: Arrays, counts: NDArray[Any]) -> NDArray[Any]:
    """Share of the object's patches alive after the last module, mean over the images that show an object."""
    last = images["object_kept"][:, -1].astype(np.float64)
    shown = ~np.isnan(last)
    return 100 * (counts[:, shown] @ last[shown]) / counts[:, shown].sum(axis=1)


def _miou(images: Arrays, counts: NDArray[Any]) -> NDArray[Any]:
    """Mean IoU over the classes that a sample labels or predicts (``cropr.tasks.segmentation.run``)."""
    pixels = images["pixels"].astype(np.float64)  # [n, 3, C]
    right, labelled, predicted = (counts @ pixels[:, part] for part in range(3))
    with np.errstate(invalid="ignore"):
        iou: NDArray[Any] = 100 * right / (labelled + predicted - right)
    return np.nanmean(iou, axis=1)


def _ap(kind: str, images: Arrays, counts: NDArray[Any]) -> NDArray[Any]:
    """COCO's AP at area ``all``: mean over IoU thresholds, recalls, and the categories that a sample has."""
    image, category, score, hit, ignored = (
        images[f"{kind}_{name}"] for name in ("image", "category", "score", "hit", "ignored")
    )
    objects = counts @ images[f"{kind}_objects"].astype(np.float64)  # [D, C]
    found = np.full(objects.shape, np.nan)
    for c in range(objects.shape[1]):
        (own,) = np.nonzero(category == c)
        own = own[np.argsort(-score[own], kind="stable")]
        weights, there = counts[:, image[own]], objects[:, c] > 0
        values = [_precision(weights[there], objects[there, c], hit[own, t], ignored[own, t])
                  for t in range(hit.shape[1])]  # fmt: skip
        found[there, c] = np.mean(values, axis=0)
    return 100 * np.nanmean(found, axis=1)


def _precision(weights: NDArray[Any], objects: NDArray[Any], hit: NDArray[Any], ignored: NDArray[Any]) -> NDArray[Any]:
    """Mean of the interpolated precision over ``RECALLS``, [D], of one category at one IoU threshold.

    Precision falls between hits, so that it is computed at hits alone: each gives its precision, or that of a later hit
    if that is higher, to the recalls between the hit before it and its own. An image that is drawn twice has its
    detections twice, one after the other, which changes no such maximum.

    Args:
        weights: [D, detections], how often the image of each is drawn; by descending score.
        objects: [D], objects to be found.
        hit: [detections], which found an object.
        ignored: [detections], which count neither as right nor as wrong.
    """
    right = hit & ~ignored
    if not right.any():
        return np.zeros(len(weights))
    true = np.cumsum(weights[:, right], axis=1)
    all_of_them = np.cumsum(weights * ~ignored, axis=1)[:, right]
    precision = true / (all_of_them + np.spacing(1))
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(RECALLS, true / objects[:, None], side="right")
    share: NDArray[Any] = (highest * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    return share


_METRICS: dict[str, tuple[str, Callable[[Arrays, NDArray[Any]], NDArray[Any]]]] = {
    "top1": ("correct", partial(_share, "correct")),
    "object_kept": ("object_kept", _object_kept),
    "miou": ("pixels", _miou),
    "box_ap": ("box_score", partial(_ap, "box")),
    "mask_ap": ("mask_score", partial(_ap, "mask")),
}
"""Metric -> an array that it needs, function."""
