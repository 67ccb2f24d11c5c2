"""Semantic segmentation in ADE20k's layout: ``images`` and ``annotations``, each with ``training`` and ``validation``.

The root is ``ADEChallengeData2016`` or the folder that holds it. The annotation of ``images/training/a.jpg`` is
``annotations/training/a.png``: one 8-bit channel, grey or palette, where 0 is not labelled and classes count from 1.
Maps that leave this module count classes from 0 and have ``IGNORE`` where there is no label.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cropr.data.loading import ImageError, Samples, decode, pad, require_folders, settle, some, standardise, unreadable
from cropr.tasks.segmentation import TASK, SegDataSpec

FOLDER = "ADEChallengeData2016"
SPLITS = ("training", "validation")
"""Folders below ``images`` and ``annotations``."""
IGNORE = 255
"""Label of pixels that count nowhere."""
LONGEST = 4
"""Limit of the longer side after a resize, in units of what the shorter side should have (mmseg's 2048 by 512)."""
CROPS = 10
"""Crops that are tried for one in which no class prevails."""
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Split:
    """Images of one split and their annotations, by name. The root is ``ADEChallengeData2016``."""

    root: Path
    name: str
    images: tuple[Path, ...]
    annotations: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_splits(root: str | Path, problems: list[str] | None = None) -> tuple[Split, Split]:
    """List training and validation images; nothing is decoded. What is wrong joins ``problems``, if that is given.
    Raises FileNotFoundError: the root or a folder is missing; ValueError: a split without images, or without pairs."""
    inner, found = require_folders(Path(root), TASK, FOLDER), list[str]()
    training, validation = (_list(inner, name, found) for name in SPLITS)
    return settle((training, validation), found, problems)


def _list(root: Path, name: str, problems: list[str]) -> Split:
    """Pairs of a split by name without suffix; hidden files and files of other kinds are passed over."""
    pictures, maps = root / "images" / name, root / "annotations" / name
    images, found = _files(pictures, IMG_EXTENSIONS), {file.stem: file for file in _files(maps, (".png",))}
    counts = Counter(file.stem for file in images)
    if not images:
        problems.append(f"{pictures}: no image")
    if double := sorted(file.name for file in images if counts[file.stem] > 1):
        problems.append(f"{pictures}: images that share a name: {some(double, ', ')}")
    if missing := [file.name for file in images if file.stem not in found]:
        problems.append(f"{maps}: no annotation (<name>.png) of {some(missing, ', ')}")
    if lost := [file.name for stem, file in found.items() if stem not in counts]:
        problems.append(f"{pictures}: no image of the annotations {some(lost, ', ')}")
    paired = tuple(file for file in images if file.stem in found)
    return Split(root, name, paired, tuple(found[file.stem] for file in paired))


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))


def decode_map(path: str | Path, num_classes: int) -> NDArray[np.uint8]:
    """Labels [H, W] of an annotation: classes from 0 on, ``IGNORE`` where the file has 0. Raises ImageError: the file
    cannot be read, is not one channel of 8 bits, or has a label above the number of classes."""
    try:
        with Image.open(path) as file:
            file.load()
            mode, labels = file.mode, np.asarray(file)
    except Exception as error:  # as in ``decode``
        raise unreadable(path, error) from None
    if mode not in ("L", "P"):
        raise ImageError(f"{path}: an annotation has one 8-bit channel (Pillow's L or P); this is {mode}")
    if (highest := int(labels.max())) > num_classes:
        classes = f"{num_classes} classes (labels 1 to {num_classes}, 0 for none)"
        raise ImageError(f"{path}: label {highest}, but there are {classes}; correct num_classes or the file")
    return labels - np.uint8(1)  # 0 wraps around to 255


def read_pair(split: Split, index: int, num_classes: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Image and labels [H, W] as of ``decode_map``. ImageError: a file cannot be used, or the two differ in size."""
    path, annotation = split.images[index], split.annotations[index]
    image, labels = decode(path), decode_map(annotation, num_classes)
    if image.size != (size := labels.shape[::-1]):
        sizes = f"{image.width} x {image.height} px, its annotation {annotation} {size[0]} x {size[1]} px"
        raise ImageError(f"{path}: {sizes}; they must be equal")
    return image, labels


class EvalImages(Samples):
    """Images [3, h, w] and maps [H, W] uint8; without sliding windows the longer of h, w is the spec's image size."""

    layout = TASK.layout

    def sample(self, index: int) -> Pair:
        image, labels = read_pair(self.split, index, self.spec.num_classes)
        view = eval_view if self.seed is None else train_view
        return view(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels)), self.spec)

    def kind(self, index: int) -> tuple[int, int] | None:
        """Width and height by the head of the file; None if it cannot be read, which loading it will report."""
        try:
            with Image.open(self.split.annotations[index]) as image:
                return image.size
        except Exception:  # as in ``decode``
            return None


class TrainImages(EvalImages):
    """Images [3, S, S] and maps [S, S] uint8, S the image size of the spec; as in evaluation if nothing is random."""

    def __init__(self, split: Split, spec: SegDataSpec, seed: int) -> None:
        whole = spec.scenes is not None and spec.scenes.image_size == spec.image_size  # so that crops are not random
        random = not whole or spec.resize != (1, 1) or spec.hflip > 0 or spec.photometric
        super().__init__(split, spec, seed if random else None)


def train_view(image: tv_tensors.Image, labels: tv_tensors.Mask, spec: SegDataSpec) -> Pair:
    """Resize, crop, flip, distort colours, normalise, pad: image [3, S, S] and labels [S, S]. The authors' pipeline,
    mmseg's, by torchvision, whose colour distortions differ in the last digit and whose bilinear filter is
    antialiased. Padding, at the right and the bottom, is 0 in the normalised image, ``IGNORE`` in the labels."""
    size = random_size(image, spec)
    image, labels = F.resize(image, size), F.resize(labels, size)
    crop = capped_crop(labels, spec)
    image, labels = F.crop(image, *crop), F.crop(labels, *crop)
    if spec.hflip and torch.rand(()) < spec.hflip:
        image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
    if spec.photometric:
        image = _distortion()(image)
    padded = pad(labels, spec.image_size, IGNORE).as_subclass(Tensor)
    return pad(standardise(image, spec.mean, spec.std), spec.image_size), padded


def eval_view(image: tv_tensors.Image, labels: tv_tensors.Mask, spec: SegDataSpec) -> Pair:
    """Normalised image [3, h, w], and labels [H, W] as they are; see ``EvalImages``."""
    if spec.evaluation == "single":
        image = F.resize(image, _scaled(image, spec.image_size / max(image.shape[-2:])))
    return standardise(image, spec.mean, spec.std), labels.as_subclass(Tensor)


def _scaled(image: Tensor, factor: float) -> list[int]:
    """Height and width of an image that is enlarged by a factor."""
    return [max(1, int(side * factor + 0.5)) for side in image.shape[-2:]]


def random_size(image: Tensor, spec: SegDataSpec) -> list[int]:
    """Height and width, in the image's ratio: the shorter side is random, the longer at most ``LONGEST`` times it."""
    low, high = spec.resize
    target = spec.image_size * (low + (high - low) * torch.rand(()).item())
    short, long = sorted(image.shape[-2:])
    return _scaled(image, min(target / short, LONGEST * target / long))


def capped_crop(labels: Tensor, spec: SegDataSpec) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop in which every class has less than ``cat_max_ratio`` of the labelled
    pixels, if one of ten is such; else of the last. Smaller images stay as small in that direction."""
    height, width = (min(spec.image_size, side) for side in labels.shape[-2:])
    free = labels.shape[-2] - height, labels.shape[-1] - width
    for _ in range(CROPS if spec.cat_max_ratio < 1 and any(free) else 1):
        top, left = (int(torch.randint(room + 1, ())) if room else 0 for room in free)
        crop = labels[top : top + height, left : left + width]
        counts = torch.bincount(crop.flatten(), minlength=IGNORE + 1)[:IGNORE]
        if counts.max() < spec.cat_max_ratio * counts.sum():
            break
    return top, left, height, width


@cache
def _distortion() -> v2.Transform:
    """mmseg's photometric distortion: each with odds of a half, contrast first or last. Ranges are its own: a fifth of
    the circle for the hue; brightness is scaled here, where mmseg adds up to 32 levels."""

    def sometimes(**ranges: tuple[float, float]) -> v2.Transform:
        return v2.RandomApply([v2.ColorJitter(**ranges)], p=0.5)

    contrast = sometimes(contrast=(0.5, 1.5))
    colours = [sometimes(saturation=(0.5, 1.5)), sometimes(hue=(-0.1, 0.1))]
    orders = [v2.Compose([contrast, *colours]), v2.Compose([*colours, contrast])]
    return v2.Compose([sometimes(brightness=(0.875, 1.125)), v2.RandomChoice(orders)])
