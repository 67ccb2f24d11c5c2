"""Scenes on disk, in the layouts of ImageNet, ADE20k and COCO 2017. One spec gives the same images in every layout.
Files do not depend on the number of processes that write them. No torch is imported here."""

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cropr.data.scenes import CLASSES, INCOMPLETE, SPLITS, Array, Scene, Split, compose, fingerprint
from cropr.records import LOCK, RECORD, make_record, read_record, write_record
from cropr.specs import ScenesSpec

PARALLEL_FROM = 1_000
"""Scenes from which starting worker processes (about 2 s) pays."""
CHUNK = 200
"""Scenes that a worker writes at a time."""
TOPS = ("train", "val", "truth", "ADEChallengeData2016", "train2017", "val2017", "annotations")
"""Folders of all layouts, which are removed before a set is written."""
SIGNATURE = "WRITTEN_BY_CROPR"
"""In every set that was written here, finished or not. Snakemake deletes the record before it repeats a job."""
Entry = dict[str, Any]
"""What the index of a layout holds of a scene."""
Region = tuple[int, NDArray[np.bool_], tuple[int, int, int, int]]
"""Category, mask [H, W] and box (left, top, right, bottom) of an instance."""
Place = tuple[Split, int]
CATEGORIES = (1, 2, 3, 5, 7, 8, 11, 13, 17, 18)
"""COCO ids of the digits: with gaps, as in the public files."""


def _imagenet(scene: Scene, split: Split, index: int, root: Path) -> Entry:
    """{train,val}/digit_<label>/<index>.png, and the masks of ``Scene.mask`` as truth/val/digit_<label>/<index>.png."""
    name = f"{split}/digit_{scene.label}/{index:06d}.png"
    if split == "val":
        save(scene.mask, root / "truth" / name)
    save(scene.image, root / name)
    return {}


def _ade20k(scene: Scene, split: Split, index: int, root: Path) -> Entry:
    """Images, and maps of ``Scene.semantic``: ADEChallengeData2016/{images,annotations}/{training,validation}."""
    name, top = f"{'training' if split == 'train' else 'validation'}/{index:06d}.png", root / "ADEChallengeData2016"
    save(scene.image, top / "images" / name)
    save(scene.semantic, top / "annotations" / name)
    return {}


def _coco(scene: Scene, split: Split, index: int, root: Path) -> Entry:
    """{train,val}2017/<index>.png, and the entry of annotations/instances_{train,val}2017.json (``coco_entry``)."""
    name = f"{index:012d}.png"
    save(scene.image, root / f"{split}2017" / name)
    regions = [(CATEGORIES[instance.label], instance.region, instance.box) for instance in scene.instances]
    return coco_entry(index, name, scene.image.shape[:2], regions)


def coco_entry(number: int, name: str, size: tuple[int, ...], regions: Sequence[Region]) -> Entry:
    """An image of a COCO file by its number, file name, height and width, and its annotations, which have no ids yet:
    masks as uncompressed run-length codes, which pycocotools reads as it reads polygons, and no crowd regions."""
    annotations = [
        {
            "image_id": number,
            "category_id": category,
            "bbox": [left, top, right - left, bottom - top],
            "area": int(region.sum()),
            "segmentation": {"size": list(size), "counts": run_lengths(region)},
            "iscrowd": 0,
        }
        for category, region, (left, top, right, bottom) in regions
    ]
    return {"image": {"id": number, "file_name": name, "height": size[0], "width": size[1]}, "annotations": annotations}


def coco_index(root: Path, split: str, entries: list[Entry], categories: Mapping[int, str], description: str) -> None:
    """Write the file of instances; ``categories``: name by id. Ids begin at 1: pycocotools takes 0 for none."""
    annotations = [annotation for entry in entries for annotation in entry["annotations"]]
    content = {
        "info": {"description": description},
        "images": [entry["image"] for entry in entries],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


LAYOUTS = {"imagenet": _imagenet, "ade20k": _ade20k, "coco": _coco}
"""Writer of one scene by layout: returns the scene's entry in the index."""


def run_lengths(region: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed code of a mask [H, W]: lengths of runs down the columns, of 0 and 1 in turn from 0 on."""
    flat = region.ravel(order="F")
    return np.diff([0, *np.flatnonzero(np.diff(flat, prepend=False)), flat.size]).tolist()


def write(
    spec: ScenesSpec,
    root: str | Path,
    layout: str = "imagenet",
    workers: int = 2,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Write a set, and ``record.json`` last. A set written earlier, finished or not, whatever its layout, is replaced.
    ``workers`` processes write large sets; ``progress`` is called with the number of scenes since its last call. Raises
    ValueError: impossible spec, or ``root`` holds something that is not a set of scenes."""
    started, root = time.time(), Path(root)
    if layout == "imagenet" and spec.objects[0] < 1:
        raise ValueError(f"scenes: objects {spec.objects}: an image without a digit has no class; begin at 1")
    clear(root)
    places = [(split, index) for split in SPLITS for index in range(getattr(spec, split))]
    entries = dict[Split, list[Entry]](train=[], val=[])
    workers = workers if len(places) >= PARALLEL_FROM else 1
    written = _run(partial(_write_one, spec, layout, root), places, workers)
    for (split, _), entry in zip(places, written, strict=True):
        entries[split].append(entry)
        progress(1)
    if layout == "coco":
        for split in SPLITS:
            digits = {number: f"digit_{k}" for k, number in enumerate(CATEGORIES)}
            coco_index(root, split, entries[split], digits, "Generated scenes of handwritten digits")
    classes = CLASSES + (layout == "ade20k")  # and the background
    size = sum(file.stat().st_size for name in TOPS for file in (root / name).rglob("*") if file.is_file())
    metrics = {"train_images": spec.train, "val_images": spec.val, "classes": classes, "megabytes": size / 1e6}
    result = {"layout": layout, "seed": spec.seed, "metrics": metrics, "tokens": [], "series": {}}
    write_record(root / RECORD, make_record("data", spec, started, result, data_fingerprint=fingerprint(spec)))
    (root / INCOMPLETE).unlink()


def clear(root: Path) -> None:
    """Make room: remove a set written earlier, refuse anything else, mark what follows as unfinished."""
    record, mark, signature = root / RECORD, root / INCOMPLETE, root / SIGNATURE
    ours = signature.exists() or mark.exists() or (record.exists() and read_record(record).get("kind") == "data")
    if root.exists() and not ours and any(entry.name != LOCK for entry in root.iterdir()):
        raise ValueError(f"{root} is not empty and holds no set written by this command; empty it or choose another")
    root.mkdir(parents=True, exist_ok=True)
    signature.touch()
    mark.write_text("This data set is being written, or its writing was interrupted. Write it again.\n")
    record.unlink(missing_ok=True)
    for name in TOPS:
        shutil.rmtree(root / name, ignore_errors=True)


def _run(write_one: Callable[[Place], Entry], places: list[Place], workers: int) -> Iterator[Entry]:
    if workers <= 1:
        yield from map(write_one, places)
        return
    # Spawned, since forking a process in which torch runs threads can hang.
    how: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # ours to handle
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), **how) as pool:
        yield from pool.map(write_one, places, chunksize=CHUNK)


def _write_one(spec: ScenesSpec, layout: str, root: Path, place: Place) -> Entry:
    return LAYOUTS[layout](compose(spec, *place), *place, root)


def save(pixels: Array, path: Path) -> None:
    """PNG: lossless, so that every machine trains on the same pixels; not compressed, so it is read twice as fast."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path.with_suffix(".png"), compress_level=0)
