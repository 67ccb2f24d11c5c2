"""Scenes on disk, in the layouts of ImageNet, ADE20k and COCO 2017.

    write(ScenesSpec(), "results/laptop/data/imagenet")
    write(ScenesSpec(objects=(1, 2)), "results/laptop/data/ade20k", "ade20k")

One spec gives the same images in every layout. Files do not depend on the number of processes that write them.
No torch is imported here.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cropr.data.scenes import CLASSES, INCOMPLETE, SPLITS, Array, Scene, Split, compose, fingerprint, verify
from cropr.records import RECORD, make_record, read_record, write_record
from cropr.specs import ScenesSpec

PARALLEL_FROM = 1_000
"""Scenes from which starting worker processes (about 2 s) pays."""
CHUNK = 200
"""Scenes that a worker writes at a time."""

TOPS = ("train", "val", "truth", "ADEChallengeData2016", "train2017", "val2017", "annotations")
"""Folders of all layouts, which are removed before a set is written."""
Entry = dict[str, Any]
"""What the index of a layout holds of a scene."""
Chunk = tuple[ScenesSpec, str, Split, range, Path]

CATEGORIES = (1, 2, 3, 5, 7, 8, 11, 13, 17, 18)
"""COCO ids of the digits: with gaps, as in the public files."""


def _imagenet(scene: Scene, split: Split, index: int, root: Path) -> Entry:
    """Class folders, and beside them the truth of the validation images, grey: the masks of ``Scene.mask``.

    <root>/{train,val}/digit_<label>/<index>.png
    <root>/truth/val/digit_<label>/<index>.png
    """
    name = f"{split}/digit_{scene.label}/{index:06d}.png"
    if split == "val":
        _save(scene.mask, root / "truth" / name)
    _save(scene.image, root / name)
    return {}


def _ade20k(scene: Scene, split: Split, index: int, root: Path) -> Entry:
    """Images beside grey maps of labels, ``Scene.semantic``: 1 is the background, 2 + d digit d.

    <root>/ADEChallengeData2016/{images,annotations}/{training,validation}/<index>.png
    """
    name, top = f"{'training' if split == 'train' else 'validation'}/{index:06d}.png", root / "ADEChallengeData2016"
    _save(scene.image, top / "images" / name)
    _save(scene.semantic, top / "annotations" / name)
    return {}


def _coco(scene: Scene, split: Split, index: int, root: Path) -> Entry:
    """Images, and a file of instances a split. Scenes without a digit are images without annotations.

    <root>/{train,val}2017/<index>.png
    <root>/annotations/instances_{train,val}2017.json

    Masks are uncompressed run-length codes, which pycocotools reads as it reads polygons. There are no crowd regions.
    The entry is the image and its annotations, which have no ids yet.
    """
    height, width, _ = scene.image.shape
    name = f"{index:012d}.png"
    annotations = [
        {
            "image_id": index,
            "category_id": CATEGORIES[instance.label],
            "bbox": [left, top, right - left, bottom - top],
            "area": int(instance.region.sum()),
            "segmentation": {"size": [height, width], "counts": run_lengths(instance.region)},
            "iscrowd": 0,
        }
        for instance in scene.instances
        for left, top, right, bottom in [instance.box]
    ]
    image = {"id": index, "file_name": name, "height": height, "width": width}
    _save(scene.image, root / f"{split}2017" / name)
    return {"image": image, "annotations": annotations}


def _coco_index(root: Path, split: Split, entries: list[Entry]) -> None:
    """Write the file of instances. Ids begin at 1: pycocotools takes a match with 0 for none."""
    annotations = [annotation for entry in entries for annotation in entry["annotations"]]
    names = [{"id": number, "name": f"digit_{k}", "supercategory": "digit"} for k, number in enumerate(CATEGORIES)]
    content = {
        "info": {"description": "Generated scenes of handwritten digits"},
        "images": [entry["image"] for entry in entries],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": names,
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


LAYOUTS = {"imagenet": _imagenet, "ade20k": _ade20k, "coco": _coco}
"""Writer of one scene by layout: returns the scene's entry in the index."""


def run_lengths(region: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed code of a mask [H, W]: lengths of runs down the columns, of 0 and 1 in turn from 0 on."""
    runs = [(value, len(list(run))) for value, run in groupby(region.ravel(order="F").tolist())]
    return [0] * bool(runs[0][0]) + [length for _, length in runs]


def write(
    spec: ScenesSpec,
    root: str | Path,
    layout: str = "imagenet",
    workers: int = 2,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Write a set, and ``record.json`` last. A set written earlier, finished or not, whatever its layout, is replaced.

    Args:
        layout: key of ``LAYOUTS``.
        workers: processes; small sets are written by this one.
        progress: called with the number of scenes that were written since the last call.

    Raises:
        ValueError: impossible spec, or ``root`` holds something that is not a set of scenes.
    """
    started, root = time.time(), Path(root)
    verify(spec)
    if layout == "imagenet" and spec.objects[0] < 1:
        raise ValueError(f"scenes: objects {spec.objects}: an image without a digit has no class; begin at 1")
    _clear(root)
    chunks = [
        (spec, layout, split, range(start, min(start + CHUNK, count)), root)
        for split, count in zip(SPLITS, (spec.train, spec.val), strict=True)
        for start in range(0, count, CHUNK)
    ]
    entries = dict[Split, list[Entry]](train=[], val=[])
    written = _run(chunks, workers if spec.train + spec.val >= PARALLEL_FROM else 1)
    for (_, _, split, indices, _), found in zip(chunks, written, strict=True):
        entries[split] += found
        progress(len(indices))
    if layout == "coco":
        for split in SPLITS:
            _coco_index(root, split, entries[split])
    classes = CLASSES + (layout == "ade20k")  # and the background
    size = sum(file.stat().st_size for name in TOPS for file in (root / name).rglob("*") if file.is_file())
    metrics = {"train_images": spec.train, "val_images": spec.val, "classes": classes, "megabytes": size / 1e6}
    result = {"layout": layout, "seed": spec.seed, "metrics": metrics, "tokens": [], "series": {}}
    record = make_record("data", spec, started, result, data_fingerprint=fingerprint(spec))
    write_record(root / RECORD, record)
    (root / INCOMPLETE).unlink()


def _clear(root: Path) -> None:
    """Make room: remove an earlier set of scenes, refuse anything else, mark what follows as unfinished."""
    record, mark = root / RECORD, root / INCOMPLETE
    ours = mark.exists() or (record.exists() and read_record(record).get("kind") == "data")
    if root.exists() and any(root.iterdir()) and not ours:
        raise ValueError(f"{root} is not empty and holds no set of scenes; choose another directory or empty it")
    root.mkdir(parents=True, exist_ok=True)
    mark.write_text("This data set is being written, or its writing was interrupted. Write it again.\n")
    record.unlink(missing_ok=True)
    for name in TOPS:
        shutil.rmtree(root / name, ignore_errors=True)


def _run(chunks: list[Chunk], workers: int) -> Iterator[list[Entry]]:
    if workers <= 1:
        yield from map(_write_chunk, chunks)
        return
    # Spawned, since forking a process in which torch runs threads can hang.
    how: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # ours to handle
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), **how) as pool:
        yield from pool.map(_write_chunk, chunks)


def _write_chunk(chunk: Chunk) -> list[Entry]:
    spec, layout, split, indices, root = chunk
    return [LAYOUTS[layout](compose(spec, split, index), split, index, root) for index in indices]


def _save(pixels: Array, path: Path) -> None:
    """PNG: lossless, so that every machine trains on the same pixels; level 1 reads as fast as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)
