"""Images in class folders, as ImageNet comes: ``<root>/train/<class>/*`` and ``<root>/val/<class>/*``.

The transforms are timm's. H and W are the image size of the spec.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from cropr.data.loading import Samples, decode, require_folders, settle, some, wrong_count
from cropr.tasks.classification import TASK, DataSpec

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, slots=True)
class Split:
    """The images of one split, ordered by class and name; ``classes`` are the folders, in the order of the labels."""

    root: Path
    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


def load_splits(
    root: str | Path, num_classes: int | None = None, problems: list[str] | None = None
) -> tuple[Split, Split]:
    """List training and validation images; nothing is decoded. What is wrong joins ``problems``, if that is given.
    Raises FileNotFoundError: the root or a split is missing; ValueError: no class folder, a folder without image,
    different folders in train and val, or another number of classes than ``num_classes``; all of these at once."""
    root = Path(root)
    require_folders(root, TASK)
    train, val = (_list(root, name) for name in TASK.folders)
    found = []
    for split in (train, val):
        folder = root / split.name
        if not split.classes:
            found.append(f"{folder}: no class folder; put images into {split.name}/<class>/")
        if len(split.classes) == 1:
            found.append(f"{folder}: {split.classes[0]} is the only class; two or more are needed")
        filled = set(split.labels)
        if empty := [name for label, name in enumerate(split.classes) if label not in filled]:
            found.append(f"{folder}: no image in {some(empty, ', ')}; remove the folder or put images there")
    for has, lacks in ((train, val), (val, train)):
        if lacks.classes and (only := sorted(set(has.classes) - set(lacks.classes))):
            found.append(f"{root}: classes of {has.name} that {lacks.name} lacks: {some(only, ', ')}")
    if not found:
        found += wrong_count(f"{root}", len(train.classes), "classes", num_classes)
    return settle((train, val), found, problems)


def _list(root: Path, name: str) -> Split:
    """Images of a split; hidden folders (``.ipynb_checkpoints``) are no classes."""
    classes = sorted(p.name for p in (root / name).iterdir() if p.is_dir() and not p.name.startswith("."))
    paths = [_images(root / name / folder) for folder in classes]
    labels = (label for label, own in enumerate(paths) for _ in own)
    return Split(root, name, tuple(classes), tuple(chain(*paths)), tuple(labels))


def _images(folder: Path) -> list[str]:
    """Images in a folder and below, by name. Links are followed, but none twice and none to a folder above."""
    seen, found = set(map(str, folder.resolve().parents)), list[tuple[str, str]]()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [(place, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return [os.path.join(*pair) for pair in sorted(found)]


def is_random(spec: DataSpec) -> bool:
    """Whether the training transform draws random numbers: all but hflip 0, scale and ratio (1, 1), nothing else on."""
    augment = spec.augment
    crops = (*augment.scale, *augment.ratio) != (1, 1, 1, 1)
    return bool(crops or augment.hflip or augment.auto_augment or augment.color_jitter or augment.erasing)


def train_transform(spec: DataSpec) -> Transform:
    """timm's training transform: RGB image -> [3, H, W], normalised; without random parts (``is_random``) the centre
    crop of evaluation without its margin. Random erasing fills one box with noise (the authors' recipe). Raises
    ValueError: a policy that timm lacks, or colour jitter beside a policy, which timm would ignore."""
    augment = spec.augment
    if augment.color_jitter and augment.auto_augment:
        unused = f"color_jitter {augment.color_jitter} has no effect beside auto_augment {augment.auto_augment!r}"
        raise ValueError(f"{unused}; set one of them to null")
    options: dict[str, Any] = augment.model_dump(include={"scale", "ratio", "hflip", "color_jitter", "auto_augment"})
    options |= spec.model_dump(include={"interpolation", "mean", "std"})
    options |= {"re_prob": augment.erasing, "re_mode": "pixel", "re_count": 1}
    try:
        transform = create_transform(spec.image_size, is_training=True, no_aug=not is_random(spec), **options)
    except (AssertionError, ValueError) as error:
        policies = "such as rand-m9-mstd0.5-inc1, augmix-m3 or original"
        raise ValueError(
            f"auto_augment = {augment.auto_augment!r}: {str(error) or 'unknown policy'}; it takes timm's, {policies}"
        ) from error
    for policy in transform.transforms:
        # RandAugment and AugMix have a list of operations, AutoAugment has lists of them.
        for operation in chain(getattr(policy, "ops", []), *getattr(policy, "policy", [])):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which at full magnitude keeps no bit: Pillow 13 refuses that; before, it gave black."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def eval_transform(spec: DataSpec) -> Transform:
    """timm's evaluation transform: shorter side resized to ``image_size / crop_pct``, centre crop, normalised."""
    return create_transform(spec.image_size, **spec.model_dump(include={"crop_pct", "interpolation", "mean", "std"}))


def mixup(spec: DataSpec) -> Mixup | None:
    """timm's mixup and cutmix, chosen per batch with equal odds where both are on; None where both are off. It draws
    from numpy's global generator, mixes an even number of images, and smooths the labels."""
    augment = spec.augment
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=spec.num_classes)


class EvalImages(Samples):
    """Images [3, H, W] with the evaluation transform, and labels."""

    layout = TASK.layout

    def __init__(self, split: Split, spec: DataSpec, seed: int | None = None) -> None:
        super().__init__(split, spec, seed)
        self.transform = eval_transform(spec)

    def sample(self, index: int) -> tuple[Tensor, int]:
        return self.transform(decode(self.split.paths[index])), self.split.labels[index]


class TrainImages(EvalImages):
    """The same with the training transform; raises what ``train_transform`` raises."""

    def __init__(self, split: Split, spec: DataSpec, seed: int) -> None:
        super().__init__(split, spec, seed if is_random(spec) else None)
        self.transform = train_transform(spec)
