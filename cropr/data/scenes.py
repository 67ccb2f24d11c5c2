"""The embedded data set: procedural images whose relevant patches are known.

A scene is a crop of a natural photo on which handwritten digits lie: one, unless the spec asks for more or none. They
are the objects: the first gives the class of the image, all of them its semantic map and its instances. Around them lie
distractors, which are handwritten digits whose four quadrants are shuffled: as large, as bright and as busy as a digit,
so that neither ink nor pixel variance tells where a digit is. Photos are dimmed by a random factor and the number of
distractors is random, so there are easy and hard scenes, as in any real set.

Pixels depend on (seed, split, index) alone. Digits and photos are those that scikit-learn ships; nothing is downloaded.
``cropr.data.layouts`` writes scenes to disk.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cropr.specs import ScenesSpec

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
VERSION = 2
"""Version of the generator, part of the fingerprint: raise it with any change that alters a pixel or a mask."""
CLASSES = 10
OBJECT, DISTRACTOR = 255, 128
"""Values of the truth mask; the background is 0."""
INCOMPLETE = "INCOMPLETE"
"""Lies in the root of a set while it is being written."""
CELL = 8
"""Side of an original digit, and of the grid on which digits are placed, in pixels. The grid makes the digit easier to
learn (few phases between strokes and patches); sizes between its steps keep the strokes themselves varied."""
DIMMED = (0.3, 0.8)
"""Range of the factor by which a photo's brightness is multiplied; strokes lie 90 to 150 levels above it."""
INK = 0.25
"""Opacity from which a pixel counts as stroke."""

Array = NDArray[np.uint8]
Glyph = NDArray[np.float32]
Area = tuple[slice, slice]
"""Rows and columns."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One digit of a scene."""

    label: int
    region: NDArray[np.bool_]
    """[H, W]: its strokes, and what lies between strokes in both row and column. Regions of a scene do not overlap."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the region, in pixels; right and bottom are exclusive."""
        rows, columns = (np.flatnonzero(self.region.any(axis=axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, slots=True)
class Scene:
    """One image and its truth."""

    image: Array
    """RGB [H, W, 3]."""
    mask: Array
    """[H, W]: 255 in the regions of the digits, 128 on strokes of distractors, 0 elsewhere."""
    instances: tuple[Instance, ...]
    """The digits; the first one is the label of the image."""

    @property
    def label(self) -> int:
        """Class of the image, for scenes that have a digit."""
        return self.instances[0].label

    @property
    def semantic(self) -> Array:
        """[H, W], as in ADE20k's files: 1 for the background, distractors included, and 2 + d in the region of digit d.
        There is no 0, which would mean that a pixel is not labelled."""
        labels = np.ones(self.mask.shape, np.uint8)
        for instance in self.instances:
            labels[instance.region] = 2 + instance.label
        return labels


def compose(spec: ScenesSpec, split: Split, index: int) -> Scene:
    """Scene ``index`` of a split, by a generator of its own, seeded by (``spec.seed``, split, index). The label of
    the first digit is ``index % 10``. Training and validation scenes use different handwritten digits."""
    random = np.random.default_rng(np.random.SeedSequence([spec.seed, SPLITS.index(split), index]))
    digits = _digits()[split]
    canvas = _background(spec.image_size, random)
    mask = np.zeros((spec.image_size, spec.image_size), np.uint8)
    low, high = spec.objects
    count = low if low == high else int(random.integers(low, high + 1))
    labels, glyphs, areas = list[int](), list[Glyph](), list[Area]()
    for number in range(count):
        labels.append(int(random.integers(CLASSES)) if number else index % CLASSES)
        originals = digits[labels[-1]]
        glyphs.append(_enlarge(originals[random.integers(len(originals))], random.uniform(*spec.scale)))
        areas = _add_area(areas, glyphs, spec, random)
    for _ in range(random.integers(spec.distractors[0], spec.distractors[1] + 1)):
        _add_distractor(canvas, mask, areas, digits, spec, random)
    instances = []
    for label, glyph, area in zip(labels, glyphs, areas, strict=True):
        _paint(canvas[area], glyph, random)
        region = np.zeros(mask.shape, np.bool_)
        region[area] = _filled(glyph > INK)
        mask[region] = OBJECT
        instances.append(Instance(label, region))
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), mask, tuple(instances))


@cache
def _digits() -> dict[str, list[Glyph]]:
    """The originals as opacity in [0, 1], [n, 8, 8] per split and class: of each class every fifth is validation's."""
    bunch = _sklearn_datasets().load_digits()
    opacity = (bunch.images / 16).astype(np.float32)
    by_class = [opacity[bunch.target == label] for label in range(CLASSES)]
    return {"train": [np.delete(d, np.s_[::5], axis=0) for d in by_class], "val": [d[::5] for d in by_class]}


@cache
def _photos() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in _sklearn_datasets().load_sample_images().images]


def _sklearn_datasets() -> Any:
    try:
        return import_module("sklearn.datasets")
    except ModuleNotFoundError:
        raise ValueError("scenes need scikit-learn's digits and photos: pip install scikit-learn") from None


def _background(size: int, random: np.random.Generator) -> Glyph:
    """A crop of a photo, [size, size, 3]: from a third of its shorter side to all of it, flipped, dimmed."""
    photo = _photos()[random.integers(len(_photos()))]
    side = random.uniform(1 / 3, 1) * min(photo.size)
    left, top = random.uniform(0, photo.width - side), random.uniform(0, photo.height - side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side), 2)
    flip = [1, -1][random.integers(2)]
    return np.asarray(crop, np.float32)[:, ::flip] * np.float32(random.uniform(*DIMMED))


def _enlarge(glyph: Glyph, scale: float) -> Glyph:
    """Bicubic, antialiased; opacity stays in [0, 1]."""
    height, width = (max(1, round(side * scale)) for side in glyph.shape)
    enlarged = _resampling(glyph.shape[0], height) @ glyph @ _resampling(glyph.shape[1], width).T
    return enlarged.clip(0, 1)


@cache
def _resampling(size: int, to: int) -> Glyph:
    """Matrix [to, size] that does what Pillow's bicubic filter does along one axis; much faster on small pieces."""
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    return np.asarray(identity.resize((size, to), Image.Resampling.BICUBIC))


def _add_area(areas: list[Area], glyphs: list[Glyph], spec: ScenesSpec, random: np.random.Generator) -> list[Area]:
    """Areas of all glyphs, of which the last has none yet: one of the free places on the grid. Where there is none, all
    digits move to a regular lattice, which has room for them (``ScenesSpec.places``)."""
    shape = glyphs[-1].shape
    if not areas:
        return [_area(_place(shape, spec.image_size, random), shape)]
    rows, columns = (range(0, spec.image_size - side + 1, CELL) for side in shape)
    everywhere = (_area((top, left), shape) for top in rows for left in columns)
    if free := [area for area in everywhere if not _touches(area, areas)]:
        return [*areas, free[random.integers(len(free))]]
    corners = list(product(spec.places, repeat=2))
    chosen = random.permutation(len(corners))[: len(glyphs)]
    return [_area(corners[place], glyph.shape) for place, glyph in zip(chosen, glyphs, strict=True)]


def _place(shape: tuple[int, ...], size: int, random: np.random.Generator) -> tuple[int, int]:
    """Top and left of a piece that lies fully inside the image, on the grid."""
    top, left = (CELL * int(random.integers((size - side) // CELL + 1)) for side in shape)
    return top, left


def _area(corner: tuple[int, int], shape: tuple[int, ...]) -> Area:
    (top, left), (height, width) = corner, shape
    return slice(top, top + height), slice(left, left + width)


def _touches(area: Area, others: list[Area]) -> bool:
    """Whether it overlaps with one of the others."""
    return any(all(a.start < b.stop and b.start < a.stop for a, b in zip(area, other, strict=True)) for other in others)


def _add_distractor(
    canvas: Glyph, mask: Array, keep_off: list[Area], digits: list[Glyph], spec: ScenesSpec, random: np.random.Generator
) -> None:
    """Paint a digit with shuffled quadrants outside of ``keep_off``; distractors may lie over each other. One for which
    ten draws find no place is left out: the image is full."""
    originals = digits[random.integers(CLASSES)]
    halves = np.vsplit(originals[random.integers(len(originals))], 2)
    quadrants = [part for half in halves for part in np.hsplit(half, 2)]
    order = random.permutation(4)
    while (order == np.arange(4)).all():
        order = random.permutation(4)
    shuffled = np.block([[quadrants[order[0]], quadrants[order[1]]], [quadrants[order[2]], quadrants[order[3]]]])
    glyph = _enlarge(shuffled, random.uniform(*spec.scale))
    for _ in range(10):
        area = _area(_place(glyph.shape, spec.image_size, random), glyph.shape)
        if not _touches(area, keep_off):
            _paint(canvas[area], glyph, random)
            mask[area][glyph > INK] = DISTRACTOR
            return


def _paint(area: Glyph, glyph: Glyph, random: np.random.Generator) -> None:
    """Draw strokes into ``area`` in place: of one colour, 90 to 150 levels above the mean beneath."""
    colour = float(area.mean()) + random.uniform(90, 150)
    rgb = (random.uniform(-30, 30, 3) + colour).clip(0, 255).astype(np.float32)
    area += glyph[..., None] * (rgb - area)


def _filled(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that have ink at or before and at or after them, in their row as well as in their column."""
    reach = np.logical_or.accumulate
    down, up = reach(ink), reach(ink[::-1])[::-1]
    right, left = reach(ink, axis=1), reach(ink[:, ::-1], axis=1)[:, ::-1]
    return down & up & right & left


def fingerprint(spec: ScenesSpec) -> str:
    """Sixteen hex digits of what decides the pixels: the spec and the generator's version."""
    text = json.dumps({"spec": spec.model_dump(mode="json"), "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def object_mask(image_path: str | Path) -> Array | None:
    """Truth mask [H, W] of an image of a written set (values as in ``Scene.mask``); None if the set has no truth.
    ``<root>/<split>/<class>/<name>`` belongs to ``<root>/truth/<split>/<class>/<name>``."""
    root = Path(image_path).parents[2]
    truth = root / "truth" / Path(image_path).relative_to(root).with_suffix(".png")
    if not truth.exists():
        return None
    with Image.open(truth) as mask:
        return np.asarray(mask)


def object_patches(mask: Array, grid: tuple[int, int], threshold: float = 0.1) -> NDArray[np.bool_]:
    """Which patches lie on the labelled object, [h * w] in raster order. A patch counts if at least ``threshold`` of
    its pixels are 255: the default takes in patches that a stroke crosses and leaves out those that it grazes. Raises
    ValueError: the mask does not divide into the grid."""
    (height, width), (rows, columns) = mask.shape, grid
    if height % rows or width % columns:
        raise ValueError(f"a mask of {height} x {width} px does not divide into a grid of {rows} x {columns} patches")
    patches = (mask == OBJECT).reshape(rows, height // rows, columns, width // columns)
    return patches.mean(axis=(1, 3)).reshape(-1) >= threshold
