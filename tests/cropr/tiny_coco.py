"""A few images in COCO's layout, with everything that the layout allows: written in a moment, and learnable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

CATEGORIES = {3: "red box", 7: "green disk", 90: "blue bar"}
"""Ids with gaps; category k + 1 in this order is the brightest in colour k."""
SIZES = ((48, 64), (64, 48), (40, 40))
"""Height and width of the images, in turn."""


def write_coco(root: Path, train: int = 6, val: int = 3, seed: int = 0) -> Path:
    """Images and annotations of both splits below ``root``: objects in polygons, compressed and uncompressed RLE, in
    turn. Each fifth image is empty, the second one has a crowd region."""
    for split, count in (("train", train), ("val", val)):
        _write_split(root, split, count, seed)
    return root


def _write_split(root: Path, split: str, count: int, seed: int) -> None:
    random, folder = np.random.default_rng([seed, len(split)]), root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for position in range(count):
        height, width = SIZES[position % len(SIZES)]
        pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
        number = 100 + 7 * position
        image = {"id": number, "file_name": f"{number:012d}.png", "height": height, "width": width, "license": 1}
        content["images"].append(image)
        for label, (category, shape) in enumerate(zip(CATEGORIES, (_box, _disk, _box), strict=True)):
            if position % 5 == 4 or (position + label) % 3 == 2:
                continue
            region, polygon = shape(height, width, label, random)
            while (pixels[region] > 60).any():  # objects do not overlap
                region, polygon = shape(height, width, label, random)
            pixels[region] = 250 * np.eye(3, dtype=np.uint8)[label]
            form, crowd = (position + label) % 3, int(position == 1 and label == 0)
            place = len(content["annotations"]) + 1, number, category
            content["annotations"].append(_annotation(*place, region, polygon, form, crowd))
        Image.fromarray(pixels).save(folder / image["file_name"])
    save(root, split, content)


def save(root: Path, split: str, content: Any) -> Path:
    """Write an annotation file; a string as it is."""
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(root: Path, split: str) -> dict[str, Any]:
    """Content of an annotation file."""
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def _annotation(
    number: int, image: int, category: int, region: np.ndarray, polygon: list[float] | None, form: int, crowd: int
) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(region.astype(np.uint8)))
    box = coco_mask.toBbox(code).tolist()
    area = int(coco_mask.area(code))
    segmentation: Any = {"size": code["size"], "counts": code["counts"].decode()}
    if polygon is not None and form == 0 and not crowd:
        segmentation = [polygon]
    elif form == 1:
        segmentation = {"size": code["size"], "counts": _runs(region)}
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd,
        "segmentation": segmentation,
    }  # fmt: skip


def _runs(region: np.ndarray) -> list[int]:
    """Uncompressed run lengths, column by column, beginning with zeros."""
    flat = region.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flat, [1 - flat[-1]]))))
    return np.diff(np.concatenate(([0], edges))).tolist()


def _box(height: int, width: int, label: int, random: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    h, w = ((10, 12), (0, 0), (6, 20))[label] + random.integers(0, 5, 2)
    top, left = random.integers(0, height - h), random.integers(0, width - w)
    region = np.zeros((height, width), bool)
    region[top : top + h, left : left + w] = True
    return region, [float(v) for v in (left, top, left + w, top, left + w, top + h, left, top + h)]


def _disk(height: int, width: int, label: int, random: np.random.Generator) -> tuple[np.ndarray, None]:
    radius = random.integers(6, 10)
    y, x = random.integers(radius, height - radius), random.integers(radius, width - radius)
    rows, columns = np.ogrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2, None
