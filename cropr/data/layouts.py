"""Scenes on disk, in the layouts of ImageNet, ADE20k and COCO 2017: the very ones that the loaders of those sets read.

    write(ScenesSpec(), "results/laptop/data/imagenet")
    write(ScenesSpec(objects=(1, 2)), "results/laptop/data/ade20k", "ade20k")

One spec gives the same images in every layout. Files do not depend on the number of processes that write them.
No torch is imported here.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cropr.data.scenes import CLASSES, INCOMPLETE, SPLITS, Array, Instance, Scene, Split, compose, fingerprint, verify
from cropr.records import RECORD, provenance, read_record, write_record
from cropr.specs import ScenesSpec

PARALLEL_FROM = 1_000
"""Scenes from which starting worker processes (about 2 s) pays."""
CHUNK = 200
"""Scenes that a worker writes at a time."""

ADE_SPLITS: dict[Split, str] = {"train": "training", "val": "validation"}

Entry = dict[str, Any]
"""What a layout notes about a scene for its index."""


class Layout(ABC):
    """How scenes become files."""

    tops: ClassVar[tuple[str, ...]]
    """Folders below the root; they are removed before a set is written."""
    classes: ClassVar[int] = CLASSES

    @abstractmethod
    def folders(self) -> Iterator[str]:
        """All folders below the root that hold files."""

    @abstractmethod
    def save(self, scene: Scene, split: Split, index: int, root: Path) -> tuple[int, Entry]:
        """Write one scene; returns its bytes and what ``finish`` must know of it."""

    def finish(self, root: Path, split: Split, entries: list[Entry]) -> int:
        """Write the index of a split, if the layout has one; returns its bytes. ``entries``: in the order of scenes."""
        return 0


class ImageNet(Layout):
    """Class folders, and beside them the truth of the validation images.

    <root>/train/digit_<label>/<index>.png      RGB
    <root>/val/digit_<label>/<index>.png
    <root>/truth/val/digit_<label>/<index>.png  grey: the masks of ``Scene.mask``
    """

    tops = (*SPLITS, "truth")

    def folders(self) -> Iterator[str]:
        """See ``Layout``."""
        for label in range(CLASSES):
            yield from (f"{parent}/digit_{label}" for parent in (*SPLITS, "truth/val"))

    def save(self, scene: Scene, split: Split, index: int, root: Path) -> tuple[int, Entry]:
        """See ``Layout``."""
        name = f"{split}/digit_{scene.label}/{index:06d}.png"
        if split == "val":
            _save(scene.mask, root / "truth" / name)
        return _save(scene.image, root / name), {}


class ADE20k(Layout):
    """Images beside maps of labels: 1 is the background, 2 + d digit d (``Scene.semantic``). No pixel is 0, which in
    ADE20k means that it is not labelled.

    <root>/ADEChallengeData2016/images/{training,validation}/<index>.png       RGB
    <root>/ADEChallengeData2016/annotations/{training,validation}/<index>.png  grey
    """

    tops = ("ADEChallengeData2016",)
    classes = CLASSES + 1

    def folders(self) -> Iterator[str]:
        """See ``Layout``."""
        for split in SPLITS:
            yield from (f"ADEChallengeData2016/{kind}/{ADE_SPLITS[split]}" for kind in ("images", "annotations"))

    def save(self, scene: Scene, split: Split, index: int, root: Path) -> tuple[int, Entry]:
        """See ``Layout``."""
        name, top = f"{ADE_SPLITS[split]}/{index:06d}.png", root / "ADEChallengeData2016"
        return _save(scene.image, top / "images" / name) + _save(scene.semantic, top / "annotations" / name), {}


class COCO(Layout):
    """Images, and a file of instances a split. Scenes without a digit are images without annotations.

    <root>/{train,val}2017/<index>.png
    <root>/annotations/instances_{train,val}2017.json

    Masks are uncompressed run-length codes, which pycocotools reads as it reads polygons. There are no crowd regions.
    """

    tops = ("train2017", "val2017", "annotations")
    categories = (1, 2, 3, 5, 7, 8, 11, 13, 17, 18)
    """Ids of the digits: with gaps, as in the public files."""

    def folders(self) -> Iterator[str]:
        """See ``Layout``."""
        yield from self.tops

    def save(self, scene: Scene, split: Split, index: int, root: Path) -> tuple[int, Entry]:
        """See ``Layout``; the entry is the image and its annotations, which have no ids yet."""
        height, width, _ = scene.image.shape
        name = f"{index:012d}.png"
        entry = {
            "image": {"id": index, "file_name": name, "height": height, "width": width},
            "annotations": [self._annotation(instance, index) for instance in scene.instances],
        }
        return _save(scene.image, root / f"{split}2017" / name), entry

    def _annotation(self, instance: Instance, image: int) -> Entry:
        left, top, right, bottom = instance.box
        return {
            "image_id": image,
            "category_id": self.categories[instance.label],
            "bbox": [left, top, right - left, bottom - top],
            "area": int(instance.region.sum()),
            "segmentation": {"size": list(instance.region.shape), "counts": run_lengths(instance.region)},
            "iscrowd": 0,
        }

    def finish(self, root: Path, split: Split, entries: list[Entry]) -> int:
        """The file of instances. Ids of annotations count from 1: pycocotools takes a match with 0 for none."""
        annotations = [annotation for entry in entries for annotation in entry["annotations"]]
        content = {
            "info": {"description": "Generated scenes of handwritten digits"},
            "images": [entry["image"] for entry in entries],
            "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
            "categories": [
                {"id": category, "name": f"digit_{label}", "supercategory": "digit"}
                for label, category in enumerate(self.categories)
            ],
        }
        return (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


LAYOUTS: dict[str, Layout] = {"imagenet": ImageNet(), "ade20k": ADE20k(), "coco": COCO()}


def run_lengths(region: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed code of a mask [H, W]: lengths of runs down the columns, of 0 and 1 in turn from 0 on."""
    runs = [(value, len(list(run))) for value, run in groupby(region.ravel(order="F").tolist())]
    return [0] * bool(runs[0][0]) + [length for _, length in runs]


def write(
    spec: ScenesSpec,
    root: str | Path,
    layout: str = "imagenet",
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a set, and ``record.json`` last. A set written earlier, finished or not, whatever its layout, is replaced.

    Args:
        layout: key of ``LAYOUTS``.
        workers: processes; small sets are written by this one.
        progress: called with the number of scenes that were written since the last call.

    Raises:
        ValueError: impossible spec, or ``root`` holds something that is not a set of scenes.
    """
    started, root, form = time.time(), Path(root), LAYOUTS[layout]
    verify(spec)
    if layout == "imagenet" and spec.objects[0] < 1:
        raise ValueError(f"scenes: objects {spec.objects}: an image without a digit has no class; begin at 1")
    _clear(root)
    for folder in form.folders():
        (root / folder).mkdir(parents=True)
    counts: dict[Split, int] = {"train": spec.train, "val": spec.val}
    chunks = [
        (spec, layout, split, range(start, min(start + CHUNK, count)), root)
        for split, count in counts.items()
        for start in range(0, count, CHUNK)
    ]
    size = 0
    entries: dict[Split, list[Entry]] = {split: [] for split in SPLITS}
    written = _run(chunks, workers if spec.train + spec.val >= PARALLEL_FROM else 1)
    for (_, _, split, indices, _), (some, found) in zip(chunks, written, strict=True):
        size += some
        entries[split] += found
        if progress:
            progress(len(indices))
    size += sum(form.finish(root, split, entries[split]) for split in SPLITS)
    metrics = {"train_images": spec.train, "val_images": spec.val, "classes": form.classes, "megabytes": size / 1e6}
    record = {
        "kind": "data",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "layout": layout,
        "seed": spec.seed,
        "metrics": metrics,
        "tokens": [],
        "series": {},
        "provenance": provenance(started, data_fingerprint=fingerprint(spec)),
    }
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
    for name in {top for form in LAYOUTS.values() for top in form.tops}:
        shutil.rmtree(root / name, ignore_errors=True)


_Chunk = tuple[ScenesSpec, str, Split, range, Path]


def _run(chunks: list[_Chunk], workers: int) -> Iterator[tuple[int, list[Entry]]]:
    if workers <= 1:
        yield from map(_write_chunk, chunks)
        return
    # Spawned, since forking a process in which torch runs threads can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_chunk, chunks)


def _write_chunk(chunk: _Chunk) -> tuple[int, list[Entry]]:
    """Write some scenes; returns their bytes and entries."""
    spec, layout, split, indices, root = chunk
    saved = [LAYOUTS[layout].save(compose(spec, split, index), split, index, root) for index in indices]
    return sum(size for size, _ in saved), [entry for _, entry in saved]


def _save(pixels: Array, path: Path) -> int:
    """PNG; returns its bytes. Lossless, so that every machine trains on the same pixels; level 1 reads as fast as
    JPEG."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return path.write_bytes(file.getbuffer())
