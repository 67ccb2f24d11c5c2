"""The embedded data set: procedural images whose relevant patches are known.

A scene is a crop of a natural photo, strewn with small fragments of handwritten digits, on which one whole digit lies.
The class is that digit. The fragments share its colours and contrast, and the photo is busy, so neither ink nor pixel
variance tells where the digit is: something has to recognise it. Photos are dimmed by a random factor and the number of
fragments is random, so there are easy and hard scenes, as in any real set.

    scene = compose(ScenesSpec(), "train", 0)
    write_imagenet(ScenesSpec(), "results/laptop/data/scenes")

Pixels depend on (seed, split, index) alone. Digits and photos are those that scikit-learn ships; nothing is downloaded.
No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cropr.records import RECORD, provenance, read_record, write_record
from cropr.specs import ScenesSpec

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

VERSION = 1
"""Version of the generator, part of the fingerprint: raise it with any change that alters a pixel or a mask."""
CLASSES = 10
OBJECT, DISTRACTOR = 255, 128
"""Values of the truth mask; the background is 0."""
INCOMPLETE = "INCOMPLETE"
"""Lies in the root of a set while it is being written."""

CELL = 8
"""Side of an original digit, and of the grid on which digits are placed, in pixels. The grid makes the digit easier to
learn (few phases between strokes and patches); sizes between its steps keep the strokes themselves varied."""
FRAGMENT_SCALE = (2.0, 8 / 3)
"""Enlargement of fragments: 6 to 8 pixels wide."""
INK = 0.25
"""Opacity from which a pixel counts as stroke."""
PARALLEL_FROM = 1_000
"""Scenes from which starting worker processes (about 2 s) pays."""

Array = NDArray[np.uint8]


class Scene(NamedTuple):
    """One image and its truth."""

    image: Array
    """RGB [H, W, 3]."""
    label: int
    mask: Array
    """[H, W]: 255 where the labelled digit is, 128 on strokes of fragments, 0 elsewhere. The digit's region is filled:
    its strokes, and the pixels that lie between strokes both in their row and in their column (the inside of a 0)."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the region of 255, in pixels; right and bottom are exclusive."""


def compose(spec: ScenesSpec, split: Split, index: int) -> Scene:
    """Scene ``index`` of a split; its label is ``index % 10``.

    Each call draws from a generator of its own, seeded by (``spec.seed``, split, index), so that the order and the
    process in which scenes are made change nothing. Training and validation scenes use different handwritten digits.

    Raises:
        ValueError: a digit of the largest scale does not fit into the image, or a scale is not positive.
    """
    _check(spec)
    random = np.random.default_rng(np.random.SeedSequence([spec.seed, SPLITS.index(split), index]))
    label = index % CLASSES
    digits = _digits()[split]
    canvas = _background(spec.image_size, random)
    mask = np.zeros((spec.image_size, spec.image_size), np.uint8)

    glyph = _enlarge(digits[label][random.integers(len(digits[label]))], random.uniform(*spec.scale))
    top, left = _place(glyph.shape, spec.image_size, random)
    box = slice(top, top + glyph.shape[0]), slice(left, left + glyph.shape[1])
    for _ in range(random.integers(spec.distractors + 1)):
        _add_fragment(canvas, mask, box, digits, spec, random)
    _paint(canvas[box], glyph, random)
    mask[box][_filled(glyph > INK)] = OBJECT

    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    rows, columns = (np.flatnonzero((mask == OBJECT).any(axis=axis)) for axis in (1, 0))
    tight = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return Scene(image, label, mask, tight)


def _check(spec: ScenesSpec) -> None:
    low, high = spec.scale
    if not 0 < low <= high:
        raise ValueError(f"scenes: scale {spec.scale} is not an increasing pair of positive numbers")
    if round(CELL * high) > spec.image_size:
        raise ValueError(
            f"scenes: a digit at scale {high} is {round(CELL * high)} px wide, the image {spec.image_size} px; "
            f"lower scale to at most {spec.image_size / CELL:g} or raise image_size"
        )


@cache
def _digits() -> dict[str, list[NDArray[np.float32]]]:
    """The originals as opacity in [0, 1], [n, 8, 8] per split and class: of each class every fifth is validation's."""
    datasets = _sklearn_datasets()
    bunch = datasets.load_digits()
    opacity = (bunch.images / 16).astype(np.float32)
    by_class = [opacity[bunch.target == label] for label in range(CLASSES)]
    return {
        "train": [np.delete(d, np.s_[::5], axis=0) for d in by_class],
        "val": [d[::5] for d in by_class],
    }


@cache
def _photos() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in _sklearn_datasets().load_sample_images().images]


def _sklearn_datasets():  # type: ignore[no-untyped-def]  # a module
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ValueError("scenes need scikit-learn's digits and photos: pip install 'cropr[scenes]'") from None
    return datasets


def _background(size: int, random: np.random.Generator) -> NDArray[np.float32]:
    """A crop of a photo, [size, size, 3]: from a third of its shorter side to all of it, flipped, dimmed."""
    photo = _photos()[random.integers(len(_photos()))]
    side = random.uniform(1 / 3, 1) * min(photo.size)
    left, top = random.uniform(0, photo.width - side), random.uniform(0, photo.height - side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side), 2)
    flip = [1, -1][random.integers(2)]
    return np.asarray(crop, np.float32)[:, ::flip] * np.float32(random.uniform(0, 0.8))


def _enlarge(glyph: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Bicubic, antialiased; opacity stays in [0, 1]."""
    height, width = (max(1, round(side * scale)) for side in glyph.shape)
    enlarged = _resampling(glyph.shape[0], height) @ glyph @ _resampling(glyph.shape[1], width).T
    return enlarged.clip(0, 1)


@cache
def _resampling(size: int, to: int) -> NDArray[np.float32]:
    """Matrix [to, size] that does what Pillow's bicubic filter does along one axis; much faster on small pieces."""
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    return np.asarray(identity.resize((size, to), Image.Resampling.BICUBIC))


def _place(shape: tuple[int, ...], size: int, random: np.random.Generator) -> tuple[int, int]:
    """Top and left of a piece that lies fully inside the image, on the grid."""
    top, left = (CELL * int(random.integers((size - side) // CELL + 1)) for side in shape)
    return top, left


def _add_fragment(
    canvas: NDArray[np.float32],
    mask: Array,
    keep_off: tuple[slice, slice],
    digits: list[NDArray[np.float32]],
    spec: ScenesSpec,
    random: np.random.Generator,
) -> None:
    """Paint a piece of some digit, 3 x 3 of its 8 x 8 pixels, about as large as a patch, outside the box ``keep_off``.

    A piece for which ten draws find no place is left out: the image is full.
    """
    originals = digits[random.integers(CLASSES)]
    original = originals[random.integers(len(originals))]
    # Digits fill all rows but leave the outer columns blank: cut where there is ink.
    top, left = random.integers(0, 6), random.integers(1, 5)
    piece = _enlarge(original[top : top + 3, left : left + 3], random.uniform(*FRAGMENT_SCALE))
    for _ in range(10):
        y, x = _place(piece.shape, spec.image_size, random)
        rows, columns = slice(y, y + piece.shape[0]), slice(x, x + piece.shape[1])
        if not (_overlap(rows, keep_off[0]) and _overlap(columns, keep_off[1])):
            _paint(canvas[rows, columns], piece, random)
            mask[rows, columns][piece > INK] = DISTRACTOR
            return


def _overlap(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop


def _paint(area: NDArray[np.float32], glyph: NDArray[np.float32], random: np.random.Generator) -> None:
    """Draw strokes into ``area`` in place: of one colour, 90 to 150 levels above the mean beneath."""
    colour = float(area.mean()) + random.uniform(90, 150)
    rgb = (random.uniform(-30, 30, 3) + colour).clip(0, 255).astype(np.float32)
    area += glyph[..., None] * (rgb - area)


def _filled(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that have ink at or before and at or after them, in their row as well as in their column."""

    def between(axis: int) -> NDArray[np.bool_]:
        before = np.logical_or.accumulate(ink, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(ink, axis), axis=axis), axis)
        return before & after

    return between(0) & between(1)


def fingerprint(spec: ScenesSpec) -> str:
    """Sixteen hex digits of what decides the pixels: the spec and the generator's version."""
    text = json.dumps({"spec": spec.model_dump(mode="json"), "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_imagenet(
    spec: ScenesSpec, root: str | Path, workers: int = 2, progress: Callable[[int], None] | None = None
) -> None:
    """Write the set as class folders, the truth of its validation images, and ``record.json`` last.

        <root>/train/digit_<label>/<index>.png      RGB
        <root>/val/digit_<label>/<index>.png
        <root>/truth/val/digit_<label>/<index>.png  grey: the masks of ``Scene.mask``

    A set written earlier, finished or not, is replaced. The files do not depend on ``workers``.

    Args:
        workers: processes; small sets are written by this one.
        progress: called with the number of scenes that were written since the last call.

    Raises:
        ValueError: impossible spec, or ``root`` holds something that is not a set of scenes.
    """
    started, root = time.time(), Path(root)
    _check(spec)
    _clear(root)
    counts: dict[Split, int] = {"train": spec.train, "val": spec.val}
    chunks = [
        (spec, split, range(start, min(start + 200, count)), root)
        for split, count in counts.items()
        for start in range(0, count, 200)
    ]
    for split in SPLITS:
        for label in range(CLASSES):
            (root / split / f"digit_{label}").mkdir(parents=True)
            if split == "val":
                (root / "truth" / split / f"digit_{label}").mkdir(parents=True)
    size = 0
    for done, written in _run(chunks, workers if spec.train + spec.val >= PARALLEL_FROM else 1):
        size += written
        if progress:
            progress(done)
    record = {
        "kind": "data",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "seed": spec.seed,
        "metrics": {"train_images": spec.train, "val_images": spec.val, "classes": CLASSES, "megabytes": size / 1e6},
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
    for name in (*SPLITS, "truth"):
        shutil.rmtree(root / name, ignore_errors=True)


_Chunk = tuple[ScenesSpec, Split, range, Path]


def _run(chunks: list[_Chunk], workers: int) -> Iterator[tuple[int, int]]:
    if workers <= 1:
        yield from map(_write_chunk, chunks)
        return
    # Spawned, since forking a process in which torch runs threads can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_chunk, chunks)


def _write_chunk(chunk: _Chunk) -> tuple[int, int]:
    """Write some scenes; returns their number and their bytes."""
    spec, split, indices, root = chunk
    size = 0
    for index in indices:
        scene = compose(spec, split, index)
        name = Path(split, f"digit_{scene.label}", f"{index:06d}.png")
        # Lossless, so that every machine trains on the same pixels; level 1 reads as fast as JPEG.
        file = BytesIO()
        Image.fromarray(scene.image).save(file, "png", compress_level=1)
        size += (root / name).write_bytes(file.getbuffer())
        if split == "val":
            Image.fromarray(scene.mask).save(root / "truth" / name)
    return len(indices), size


def object_mask(image_path: str | Path) -> Array | None:
    """Truth mask [H, W] of an image of a written set (values as in ``Scene.mask``); None if the set has no truth.

    ``<root>/<split>/<class>/<name>`` belongs to ``<root>/truth/<split>/<class>/<name>``. Images are resized by loaders,
    masks are not: evaluate at the size of the set.
    """
    path = Path(image_path)
    *_, split, folder, name = path.parts
    truth = path.parents[2] / "truth" / split / folder / name
    if not truth.exists():
        return None
    with Image.open(truth) as mask:
        return np.asarray(mask)


def object_patches(mask: Array, grid: tuple[int, int], threshold: float = 0.1) -> NDArray[np.bool_]:
    """Which patches lie on the labelled object, [h * w] in raster order.

    A patch counts if at least ``threshold`` of its pixels are 255. The default takes in patches that a stroke crosses
    (a stroke is about 1.5 cells wide at the smallest scale, a fifth of a patch) and leaves out those that it grazes.

    Raises:
        ValueError: the mask does not divide into the grid.
    """
    (height, width), (rows, columns) = mask.shape, grid
    if height % rows or width % columns:
        raise ValueError(f"a mask of {height} x {width} px does not divide into a grid of {rows} x {columns} patches")
    patches = (mask == OBJECT).reshape(rows, height // rows, columns, width // columns)
    return patches.mean(axis=(1, 3)).reshape(-1) >= threshold
