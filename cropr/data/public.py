"""Public sets of real images, by torchvision's downloaders, written in the layouts that the tasks read.

``fashion``: Fashion-MNIST (Zalando SE, MIT licence), 60,000 + 10,000 grey images of 28 px, 10 classes.
``pets``: Oxford-IIIT Pet (Parkhi et al., CVPR 2012; CC BY-SA 4.0), 3,680 + 3,669 photos, 37 breeds, a map for each.

Semantic maps have 1 for the background, 2 + c for class c, and 0 (not labelled) for the border of a pet. Fashion-MNIST
has a black background: every other pixel belongs to the class. Pixels of the class, with the border, are the one
instance of an image, and the truth of the validation images (``cropr.data.scenes.object_mask``).
"""

import gzip
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import FashionMNIST, OxfordIIITPet

from cropr.data.layouts import Entry, clear, coco_entry, coco_index, save
from cropr.data.loading import decode
from cropr.data.scenes import INCOMPLETE, OBJECT, SPLITS, Instance
from cropr.records import RECORD, make_record, write_record
from cropr.specs import PUBLIC, Spec

BACKGROUND, INSIDE, BORDER = 0, 1, 2
"""Values of the region of a class."""
Sample = tuple[str, int, Path | NDArray[np.uint8], NDArray[np.uint8]]
"""File name, label, image, region [H, W]."""
_FOLDERS = {"fashion": "FashionMNIST/raw", "pets": "oxford-iiit-pet"}
"""Where torchvision expects the archives, below its root."""


def write(
    name: str, out: str | Path, source: Path | None = None, progress: Callable[[int, int], object] = lambda *_: None
) -> dict[str, int]:
    """Write the set ``name`` of ``PUBLIC`` in all its layouts, below ``out``, where an earlier one is replaced; returns
    images by split. ``progress`` is called with the images of a split that are done and all.

    ``source`` is a folder that holds the archives, or torchvision's root; if None, they are downloaded into
    ``out/downloads``, and torchvision verifies their sums. Fashion-MNIST's of ``source`` are not verified:
    distributions compress the same files again. Raises ValueError: nothing to download from, a wrong sum, a file that
    is missing, or ``out`` holds something else; FileNotFoundError: no folder ``source``.
    """
    started, out = time.time(), Path(out)
    root, metrics = _root(name, out, source), dict[str, int]()
    for layout in PUBLIC[name]:
        clear(out / layout)
    for split in SPLITS:
        data = _open(name, root, split == "train")
        classes = [re.sub(r"\W+", "_", text).lower() for text in data.classes]
        entries = list[Entry]()
        for done, sample in enumerate(_samples(data), start=1):
            entries.append(_place(sample, classes, split, {layout: out / layout for layout in PUBLIC[name]}, done))
            progress(done, len(data))
        if "coco" in PUBLIC[name]:
            coco_index(out / "coco", split, entries, dict(enumerate(classes, start=1)), name)
        metrics[f"{split}_images"] = len(data)
    for layout, count in PUBLIC[name].items():
        found = {"set": name, "layout": layout, "metrics": {**metrics, "classes": count}, "tokens": [], "series": {}}
        write_record(out / layout / RECORD, make_record("data", Spec(), started, found))
        (out / layout / INCOMPLETE).unlink()
    return metrics


def _root(name: str, out: Path, source: Path | None) -> Path:
    """torchvision's root, with the files of ``source`` in it, if given."""
    root, inner = out / "downloads", Path(_FOLDERS[name])
    if source is None or (source / inner).is_dir():
        return source or root
    if not (archives := list(source.glob("*.gz"))):
        raise FileNotFoundError(f"{source}: no such folder, or it does not hold the archives of {name} (*.gz)")
    for file in archives:
        (root / inner).mkdir(parents=True, exist_ok=True)
        if name == "fashion":
            (root / inner / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            shutil.copyfile(file, root / inner / file.name)  # no link: torchvision writes over a file with a wrong sum
    return root


def _open(name: str, root: Path, training: bool) -> Any:
    """torchvision's data set, downloaded if it is not there."""
    try:
        if name == "fashion":
            return FashionMNIST(root, training, download=True)
        return OxfordIIITPet(root, "trainval" if training else "test", download=True)
    except (RuntimeError, OSError, ValueError) as error:
        what = f"{name} cannot be read or downloaded to {root}: {' '.join(str(error).split())}; without a network, get"
        fix = "archives elsewhere and name their folder (--source DIR); after an extraction that was cut off, delete"
        raise ValueError(f"{what} the {fix} {root / _FOLDERS[name]}") from None


def _samples(data: Any) -> Iterator[Sample]:
    if isinstance(data, FashionMNIST):
        for number, (image, label) in enumerate(data):
            pixels = np.asarray(image)
            yield f"{number:05d}.png", label, pixels, (pixels > 0).astype(np.uint8)
        return
    values = np.array([BORDER, INSIDE, BACKGROUND, BORDER], np.uint8)  # of the file: 1 pet, 2 background, 3 border
    for path, label, trimap in zip(data._images, data._labels, data._segs, strict=True):
        with Image.open(trimap) as file:
            yield path.name, label, path, values[np.asarray(file)]


def _place(sample: Sample, classes: list[str], split: str, roots: Mapping[str, Path], number: int) -> Entry:
    """Write a sample in all layouts; its entry in COCO's index."""
    name, label, image, region = sample
    own, folder, inside = f"{split}/{classes[label]}/{name}", "training", region != BACKGROUND
    first = roots["imagenet"] / own
    if isinstance(image, Path):
        _link(image, first)
    else:
        save(image, first)
    if split == "val":
        folder = "validation"
        save(inside * np.uint8(OBJECT), roots["imagenet"] / "truth" / own)
    top = roots["ade20k"] / "ADEChallengeData2016"
    _link(first, top / "images" / folder / name)
    save(np.array([1, label + 2, 0], np.uint8)[region], top / "annotations" / folder / name)
    if "coco" not in roots:
        return {}
    _link(first, roots["coco"] / f"{split}2017" / name)
    if decode(first).size != (size := inside.shape)[::-1]:
        raise ValueError(f"{first}: its map has {size[1]} x {size[0]} px, the image has not; get the archives again")
    regions = [(label + 1, inside, Instance(label, inside).box)] if inside.any() else []
    return coco_entry(number, name, size, regions)


def _link(file: Any, place: Path) -> None:
    """The same file at a second place, a copy where the file system has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)
