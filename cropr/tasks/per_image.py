"""Results image by image: how they are joined over processes, and metrics of resampled images. No torch.

A file ``per_image.npz`` beside a record holds ``image``, the names or numbers of the n images in the order of the
validation set, and the arrays of its task, from which ``resampled`` computes a metric of any images as the evaluation
would.

D draws, n images, C classes, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cropr.records import replacing

Arrays = Mapping[str, NDArray[Any]]
FILE = "per_image.npz"
"""Name of the file in the directory of a run."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which COCO's evaluation reads precision."""


def in_order(gather: Callable[[list[Any]], list[Any]], indices: Sequence[int], arrays: Arrays) -> dict[str, Any]:
    """Arrays of all processes, in the order of the validation set.

    Args:
        gather: joins the lists of all processes.
        indices: places in the validation set of this process's images.
        arrays: a line for each of them.
    """
    parts = [part for part in gather([(list(indices), dict(arrays))]) if part[0]]
    order = np.argsort(np.concatenate([np.asarray(places) for places, _ in parts]), kind="stable")
    return {name: np.concatenate([own[name] for _, own in parts])[order] for name in parts[0][1]}


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an npz whole or not at all; equal arrays give equal bytes."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


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
    """Mean IoU over the classes that a sample labels or predicts (``cropr.tasks.segmentation.metrics``)."""
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
