"""COCO's annotation files (``instances_*.json``): reading, checking, and compact storage.

A wrong id, size, box or segmentation is a finding that names the file and the id; all findings of a file come at once.
Left out are crowd regions and, counted, instances without area (box outside of the image, polygons below three points).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

Segmentation = list[list[float]] | dict[str, Any]
"""Polygons, or RLE with ``size`` and ``counts`` (compressed to text, or a list of run lengths)."""
FAR = 10
"""How far out a polygon may reach, in units of the longer side of its image."""
LARGEST = 1e300


class CocoImage(NamedTuple):
    """An image of an annotation file; ``file`` is relative to the folder of the split."""

    id: int
    file: str
    height: int
    width: int


class Instance(NamedTuple):
    """An object that is no crowd and has an area. Labels count the categories from 1 in the order of their ids; the box
    is left, top, right, bottom in pixels, within the image."""

    id: int
    label: int
    box: tuple[float, float, float, float]
    segmentation: Segmentation


@dataclass(frozen=True, slots=True)
class Annotations:
    """One annotation file: images by ascending id, categories (id and name, the label of entry k is k + 1) likewise,
    the number of instances without area, the others by the id of their image."""

    path: Path
    images: tuple[CocoImage, ...]
    categories: tuple[tuple[int, str], ...]
    skipped: int
    instances: "Packed" = field(repr=False)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category of label k + 1 at position k."""
        return tuple(number for number, _ in self.categories)


class Packed:
    """Instances by image, in the order of the file, as text in one array: COCO's 860,000 as Python objects take
    gigabytes, and every worker process that reads them gets a copy, since reading changes their reference counts."""

    def __init__(self, instances: Mapping[int, Sequence[Instance]]) -> None:
        texts = [json.dumps(group, separators=(",", ":")).encode() for group in instances.values()]
        self._text = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)])
        self._place = {image: (position, len(group)) for position, (image, group) in enumerate(instances.items())}

    def count(self, image: int) -> int:
        """Number of instances, without reading them."""
        return self._place.get(image, (0, 0))[1]

    def __getitem__(self, image: int) -> list[Instance]:
        if not self.count(image):
            return []
        position = self._place[image][0]
        group = json.loads(self._text[self._ends[position] : self._ends[position + 1]].tobytes())
        return [Instance(number, label, tuple(box), segmentation) for number, label, box, segmentation in group]


def read_annotations(path: Path, content: Mapping[str, Any] | None = None) -> tuple[Annotations, list[str]]:
    """A file's content, and what is wrong with it, a line a finding; the content is of use if there is none. Raises
    what ``read_content`` raises, which may have read it before."""
    content = read_content(path) if content is None else content
    problems: list[str] = []
    kinds = {"categories": "category", "images": "image", "annotations": "annotation"}
    categories, images, annotations = (_by_id(key, content[key], problems) for key in kinds)
    if not problems:
        problems += [f"lists no {kind}" for key, kind in kinds.items() if not content[key]]
    wrong_images = {number: _wrong_image(entry) for number, entry in images.items()}
    problems += [f"image {number}: {wrong}" for number, wrong in wrong_images.items() if wrong]
    sound = {number: entry for number, entry in images.items() if not wrong_images[number]}
    by_id = {n: CocoImage(n, entry["file_name"], entry["height"], entry["width"]) for n, entry in sound.items()}
    labels = {number: label for label, number in enumerate(sorted(categories), start=1)}
    packed, skipped = dict[int, list[Instance]](), 0
    for number, entry in annotations.items():
        if wrong := _wrong(entry, images, labels):
            problems.append(f"annotation {number}: {wrong}")
        if wrong or (image := by_id.get(entry["image_id"])) is None or entry["iscrowd"]:
            continue
        if (instance := _instance(entry, image, labels)) is None:
            skipped += 1
        else:
            packed.setdefault(image.id, []).append(instance)
    named = tuple((number, str(categories[number].get("name", number))) for number in labels)
    result = Annotations(path, tuple(sorted(by_id.values())), named, skipped, Packed(packed))
    return result, [f"{path}: {problem}" for problem in problems]


def read_content(path: Path) -> dict[str, Any]:
    """The JSON of an annotation file. Raises FileNotFoundError: no such file; ValueError: empty, not JSON, or without
    ``images``, ``annotations`` and ``categories``."""
    try:
        text = path.read_bytes().strip()
        content = json.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; COCO's annotations belong there") from None
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}" if text else "the file is empty; it should hold COCO's annotations as JSON"
        raise ValueError(f"{path}: {reason}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: no list {key!r}; a COCO file of instances has images, annotations, categories")
    return content


def _by_id(what: str, entries: Iterable[Any], problems: list[str]) -> dict[int, dict[str, Any]]:
    """Entries by id. An id that is no whole number, or that an earlier entry has, is a problem."""
    result: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int:
            problems.append(f"{what}[{position}]: its id is {number!r}, not a whole number")
        elif number in result:
            problems.append(f"{what}[{position}]: id {number} was there before")
        else:
            result[number] = entry
    return result


def _wrong_image(entry: Mapping[str, Any]) -> str | None:
    name, *sides = (entry.get(key) for key in ("file_name", "height", "width"))
    if not isinstance(name, str) or not name:
        return f"file_name is {name!r}, not a name"
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return f"file_name is {name!r}, which leads out of the folder of images"
    if not all(type(side) is int and side > 0 for side in sides):
        return f"height {sides[0]!r} and width {sides[1]!r} are not positive whole numbers"
    return None


def _wrong(entry: Mapping[str, Any], images: Mapping[int, Mapping[str, Any]], labels: Mapping[int, int]) -> str | None:
    """What is wrong with an annotation, None if nothing is."""
    for key, allowed, what in (("image_id", images, "images"), ("category_id", labels, "categories")):
        if type(number := entry.get(key)) is not int or number not in allowed:
            return f"{key} {number!r} is not among the {what}"
    if wrong := wrong_box(entry.get("bbox")):
        return wrong
    if entry.get("iscrowd") not in (0, 1):
        return f"iscrowd is {entry.get('iscrowd')!r}, not 0 or 1"
    if not is_number(entry.get("area")):
        return f"area is {entry.get('area')!r}, not a number; evaluation by size needs it"
    return _wrong_segmentation(entry.get("segmentation"), images[entry["image_id"]])


def _wrong_segmentation(segmentation: Any, image: Mapping[str, Any]) -> str | None:
    """What is wrong with it. pycocotools' C code checks nothing and reads and writes outside of its arrays."""
    size: list[Any] = [image.get("height"), image.get("width")]
    if not all(type(side) is int and side > 0 for side in size):
        return None  # a finding of the image
    if isinstance(segmentation, list):
        if any(not isinstance(part, list) or len(part) % 2 for part in segmentation):
            return "segmentation: a polygon is a list of x, y, x, y, ..."
        far = FAR * max(size)
        inside = all(type(value) in (int, float) and abs(value) <= far for part in segmentation for value in part)
        return None if inside else f"segmentation: a polygon has a value that is no number up to {far}"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "segmentation is neither a list of polygons nor RLE with size and counts"
    if segmentation["size"] != size:
        return f"segmentation has size {segmentation['size']}, its image {size}"
    return wrong_runs(segmentation["counts"], size)


def wrong_runs(counts: Any, size: Sequence[int]) -> str | None:
    """Why the ``counts`` of RLE, a list or compressed to text, are no mask of height and width; None if they are."""
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or any(type(run) is not int or run < 0 for run in runs):
        return "segmentation: counts are neither whole numbers from 0 nor such numbers compressed to text"
    total = sum(runs)
    return None if total == math.prod(size) else f"segmentation: counts add up to {total}, not {size[0]} x {size[1]}"


def _decompress(text: str) -> list[int] | None:
    """Run lengths from COCO's text: groups of 5 bits from the lowest, each with a bit that says whether another
    follows, 48 added to make a letter; from the fourth number on, the difference to the last but one."""
    runs, value, shift = list[int](), 0, 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value, shift = value | (code & 31) << shift, shift + 5
        if not code & 32:
            value -= (code & 16) << shift - 4  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _instance(entry: Mapping[str, Any], image: CocoImage, labels: Mapping[int, int]) -> Instance | None:
    """None for one without area."""
    x, y, width, height = entry["bbox"]
    left, right = (min(max(value, 0), image.width) for value in (x, x + width))
    top, bottom = (min(max(value, 0), image.height) for value in (y, y + height))
    segmentation = entry["segmentation"]
    if isinstance(segmentation, list):
        # pycocotools would read four numbers as a box.
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    if right <= left or bottom <= top or not segmentation:
        return None
    return Instance(entry["id"], labels[entry["category_id"]], (left, top, right, bottom), segmentation)


def wrong_box(box: Any) -> str | None:
    """Why a value is no ``bbox``, None if it is one."""
    right = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    return None if right else f"bbox is {box!r}, not four numbers (left, top, width, height)"


def is_number(value: Any) -> bool:
    """A finite number; True and False are none."""
    return type(value) in (int, float) and abs(value) <= LARGEST  # false for NaN
