"""Public sets of real images, by torchvision's downloaders, written in the layouts that the tasks read.

    write("fashion", "data/fashion")    # data/fashion/imagenet, data/fashion/ade20k
    write("pets", "data/pets")          # and data/pets/coco

``fashion``: Fashion-MNIST (Zalando SE, MIT licence), 60,000 + 10,000 grey images of 28 px, 10 classes.
``pets``: Oxford-IIIT Pet (Parkhi et al., CVPR 2012; CC BY-SA 4.0), 3,680 + 3,669 photos, 37 breeds, a map for each.

Every layout has the same images, linked where the file system allows it. Semantic maps have 1 for the background,
2 + c for class c, and 0 (not labelled) for the border of a pet. Fashion-MNIST has no maps, but a black background:
every other pixel belongs to the class. Instances are one an image: the pixels of its class, with the border. The same
pixels are the truth of the validation images (``cropr.data.scenes.object_mask``). torchvision verifies the sums of what
it downloads.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import FashionMNIST, OxfordIIITPet

from cropr.data.layouts import Entry, clear, coco_entry, coco_index
from cropr.data.loading import decode
from cropr.data.scenes import INCOMPLETE, OBJECT, SPLITS
from cropr.records import RECORD, make_record, write_record
from cropr.specs import PUBLIC, PublicSpec

BACKGROUND, INSIDE, BORDER = 0, 1, 2
"""Values of ``Sample.region``."""
_FOLDERS = {"fashion": "FashionMNIST/raw", "pets": "oxford-iiit-pet"}
"""Where torchvision expects the archives, below its root."""


class Sample(NamedTuple):
    """An image with its file name and its class; ``region`` [H, W] says where the class is."""

    name: str
    label: int
    image: Path | Image.Image
    region: NDArray[np.uint8]


def write(
    name: str, out: str | Path, source: Path | None = None, progress: Callable[[int, int], object] = lambda *_: None
) -> dict[str, int]:
    """Write a set in all its layouts, below ``out``; one that was written earlier is replaced.

    Args:
        name: key of ``PUBLIC``.
        source: folder that holds the archives, or torchvision's root; None: they are downloaded into
            ``out/downloads``, or taken from there. Fashion-MNIST's are not verified, since distributions compress the
            same files again.
        progress: called with the images of a split that are done and all.

    Returns:
        Images by split.

    Raises:
        ValueError: nothing to download from, a wrong sum, a file that is missing; or ``out`` holds something else.
        FileNotFoundError: no folder ``source``.
    """
    started, out = time.time(), Path(out)
    root, layouts = _root(name, out, source), list(PUBLIC[name])
    for layout in layouts:
        clear(out / layout)
    counts, total = dict[str, int](), 0
    for split in SPLITS:
        data = _open(name, root, split == "train")
        classes = [re.sub(r"\W+", "_", text).lower() for text in data.classes]
        entries: list[Entry] = []
        for done, sample in enumerate(_samples(data), start=1):
            entries.append(_place(sample, classes, split, out, total + done, layouts))
            progress(done, len(data))
        if "coco" in layouts:
            coco_index(out / "coco", split, entries, dict(enumerate(classes, start=1)), name)
        counts[split] = len(data)
        total += len(data)
    for layout in layouts:
        metrics = {"train_images": counts["train"], "val_images": counts["val"], "classes": PUBLIC[name][layout]}
        found = {"layout": layout, "metrics": metrics, "tokens": [], "series": {}}
        write_record(
            out / layout / RECORD, make_record("data", PublicSpec.model_validate({"name": name}), started, found)
        )
        (out / layout / INCOMPLETE).unlink()
    return counts


def _root(name: str, out: Path, source: Path | None) -> Path:
    """torchvision's root, with the files of ``source`` in it, if given."""
    root, inner = out / "downloads", Path(_FOLDERS[name])
    if source is None:
        return root
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; it should hold the archives of {name}")
    if (source / inner).is_dir():
        return source
    for file in source.glob("*.gz"):
        if name == "pets":
            _link(file, root / inner / file.name)
        else:
            (root / inner).mkdir(parents=True, exist_ok=True)
            with gzip.open(file) as packed, (root / inner / file.stem).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return root


def _open(name: str, root: Path, training: bool) -> Any:
    """torchvision's data set, downloaded if it is not there."""
    try:
        if name == "fashion":
            return FashionMNIST(root, train=training, download=True)
        both = ["category", "segmentation"]
        return OxfordIIITPet(root, "trainval" if training else "test", target_types=both, download=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be read or downloaded to {root}: {' '.join(str(error).split())}; without a network, "
            "get the archives elsewhere and name their folder (--source DIR); if an earlier extraction was cut off, "
            f"delete {root / _FOLDERS[name]}"
        ) from None


def _samples(data: Any) -> Iterator[Sample]:
    if isinstance(data, FashionMNIST):
        for number, (image, label) in enumerate(data):
            yield Sample(f"{number:05d}.png", label, image, (np.asarray(image) > 0).astype(np.uint8))
        return
    values = np.array([BORDER, INSIDE, BACKGROUND, BORDER], np.uint8)  # of the file: 1 pet, 2 background, 3 border
    for path, label, trimap in zip(data._images, data._labels, data._segs, strict=True):
        with Image.open(trimap) as file:
            yield Sample(path.name, label, path, values[np.asarray(file)])


def _place(sample: Sample, classes: Sequence[str], split: str, out: Path, number: int, layouts: Sequence[str]) -> Entry:
    """Write a sample in all layouts; its entry in COCO's index."""
    own, label = f"{split}/{classes[sample.label]}/{sample.name}", np.uint8(sample.label + 2)
    image, first = sample.image, out / "imagenet" / own
    if isinstance(image, Path):
        _link(image, first)
    else:
        first.parent.mkdir(parents=True, exist_ok=True)
        image.save(first)
    inside = sample.region != BACKGROUND
    if split == "val":
        _save(np.where(inside, np.uint8(OBJECT), np.uint8(0)), out / "imagenet/truth" / own)
    folder = "training" if split == "train" else "validation"
    _link(first, out / "ade20k/ADEChallengeData2016/images" / folder / sample.name)
    semantic = np.array([1, label, 0], np.uint8)[sample.region]
    _save(semantic, out / "ade20k/ADEChallengeData2016/annotations" / folder / sample.name)
    if "coco" not in layouts:
        return {}
    _link(first, out / "coco" / f"{split}2017" / sample.name)
    size, (rows, columns) = inside.shape, (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if decode(first).size != size[::-1]:
        raise ValueError(f"{first}: its map has {size[1]} x {size[0]} px, the image has not; get the archives again")
    if not rows.size:
        return coco_entry(number, sample.name, size, [])
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return coco_entry(number, sample.name, size, [(sample.label + 1, inside, box)])


def _link(file: Path, place: Path) -> None:
    """The same file at a second place, a copy where the file system has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)


def _save(values: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path.with_suffix(".png"), compress_level=1)
