"""Images in class folders, as ImageNet comes: ``<root>/train/<class>/*`` and ``<root>/val/<class>/*``.

    train, val = load_splits(root, num_classes=10)
    batches = TrainBatches(train, spec, batch_size=64, seed=0)
    for images, labels in batches.epoch(3, start=17):
        ...

The transforms are timm's. All randomness is a function of (seed, epoch, index of the image), and the order of one of
(seed, epoch): neither the number of workers nor a resumption changes a sample.

B images of a batch of this process, H and W the image size of the spec.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from cropr.data.scenes import INCOMPLETE
from cropr.specs import DataSpec

SPLITS = ("train", "val")
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, slots=True)
class Split:
    """The images of one split, ordered by class and name."""

    root: Path
    name: str
    classes: tuple[str, ...]
    """Names of the class folders; the label is the position."""
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


def load_splits(root: str | Path, num_classes: int | None = None) -> tuple[Split, Split]:
    """List training and validation images. Nothing is decoded.

    Raises:
        FileNotFoundError: the root or a split is missing.
        ValueError: no class folder, a folder without image, different folders in train and val, another number of
            classes than ``num_classes``, or a set of scenes whose writing was interrupted. All of these at once.
    """
    splits, problems = survey(Path(root), num_classes)
    if problems:
        raise ValueError("; ".join(problems))
    return splits


def survey(root: Path, num_classes: int | None = None) -> tuple[tuple[Split, Split], list[str]]:
    """Both splits, and what is wrong with their folders; raises what ``load_splits`` raises beside that."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory; it should hold train/<class>/* and val/<class>/*")
    for name in SPLITS:
        if not (root / name).is_dir():
            raise FileNotFoundError(f"{root / name}: no such directory; images belong into {name}/<class>/*")
    if (root / INCOMPLETE).exists():
        raise ValueError(f"{root}: writing this set was interrupted; write it again (python -m cropr data scenes)")
    train, val = _list(root, "train"), _list(root, "val")
    problems = []
    for split in (train, val):
        folder = root / split.name
        if not split.classes:
            problems.append(f"{folder}: no class folder; images belong into {split.name}/<class>/*")
        filled = set(split.labels)
        if empty := [name for label, name in enumerate(split.classes) if label not in filled]:
            problems.append(f"{folder}: no image in {_some(empty)}; remove the folder or put images there")
    for has, lacks in ((train, val), (val, train)):
        if lacks.classes and (only := sorted(set(has.classes) - set(lacks.classes))):
            problems.append(f"{root}: classes of {has.name} that {lacks.name} lacks: {_some(only)}")
    if num_classes is not None and not problems and len(train.classes) != num_classes:
        problems.append(
            f"{root} has {len(train.classes)} classes, the settings say {num_classes}; "
            f"set num_classes to {len(train.classes)} or choose another directory"
        )
    return (train, val), problems


def _list(root: Path, name: str) -> Split:
    """Images of a split; hidden folders (``.ipynb_checkpoints``) are no classes."""
    folder = root / name
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        return Split(root, name, (), (), ())
    labels_of = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(str(folder), labels_of, IMG_EXTENSIONS, allow_empty=True)
    return Split(root, name, tuple(classes), tuple(p for p, _ in samples), tuple(label for _, label in samples))


def _some(names: list[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


class ImageError(ValueError):
    """An image cannot be read; the message begins with its path."""


def decode(path: str | Path) -> Image.Image:
    """An image in RGB and upright: other modes are converted, EXIF orientation is applied, 16 bits become 8.

    Raises:
        ImageError: the file cannot be read to its end.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would clip, and leave a white image
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            return upright.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: cannot be read as an image: {reason}") from None


def is_random(spec: DataSpec) -> bool:
    """Whether the training transform draws random numbers: all but hflip 0, scale and ratio (1, 1), nothing else on."""
    augment = spec.augment
    crops = (*augment.scale, *augment.ratio) != (1, 1, 1, 1)
    return bool(crops or augment.hflip or augment.auto_augment or augment.color_jitter or augment.erasing)


def train_transform(spec: DataSpec) -> Transform:
    """timm's training transform: RGB image -> [3, H, W], normalised.

    Where nothing is random (``is_random``), the centre is taken as in evaluation without margin, and an image of the
    right size is only normalised. Random erasing fills with noise, one box (the authors' recipe).

    Raises:
        ValueError: colour jitter beside an auto-augment policy, which timm would ignore.
    """
    augment = spec.augment
    if augment.color_jitter and augment.auto_augment:
        raise ValueError(
            f"color_jitter {augment.color_jitter} has no effect beside auto_augment {augment.auto_augment!r}; "
            "set one of them to null"
        )
    return create_transform(
        spec.image_size,
        is_training=True,
        no_aug=not is_random(spec),
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,  # type: ignore[arg-type]  # None switches it off
        auto_augment=augment.auto_augment,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=augment.erasing,
        re_mode="pixel",
        re_count=1,
    )


def eval_transform(spec: DataSpec) -> Transform:
    """timm's evaluation transform: shorter side resized to ``image_size / crop_pct``, centre crop, normalised."""
    return create_transform(
        spec.image_size,
        is_training=False,
        crop_pct=spec.crop_pct,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
    )


def mixup(spec: DataSpec) -> Mixup | None:
    """timm's mixup and cutmix, chosen per batch with equal odds where both are on; None where both are off.

    It draws from numpy's global generator, mixes an even number of images, and smooths the labels.
    """
    augment = spec.augment
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.smoothing,
        num_classes=spec.num_classes,
    )


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators seeded from ``entropy`` within, and as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would reseed the accelerators as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededFolder(Dataset[tuple[Tensor, int]]):
    """Samples (epoch, index) -> (image [3, H, W], label), random by (seed, epoch, index) alone.

    Args:
        seed: of the transform; None for one that draws nothing, which saves the time of seeding.
    """

    def __init__(self, split: Split, transform: Transform, seed: int | None) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = decode(self.split.paths[index]), self.split.labels[index]
        if self.seed is None:
            return self.transform(image), label
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


class _Guarded(Dataset[Any]):
    """Returns the error of an image that cannot be read: raised in a worker, it would come as a long traceback, and
    torch would take seconds to end the workers."""

    def __init__(self, folder: SeededFolder) -> None:
        self.folder = folder

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | ImageError:
        try:
            return self.folder[key]
        except ImageError as error:
            return error


def _collate(samples: list[Any]) -> Any:
    """A batch, or the first error."""
    errors = (sample for sample in samples if isinstance(sample, ImageError))
    return next(errors, None) or default_collate(samples)


class _Loader:
    """torch's loader over a ``SeededFolder``; workers live on between passes and global generators stay untouched."""

    def __init__(self, folder: SeededFolder, workers: int, pin_memory: bool) -> None:
        self.todo: list[list[tuple[int, int]]] = []  # batches of (epoch, index) of the next pass
        self.loader = DataLoader(
            _Guarded(folder),
            batch_sampler=self.todo,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each pass draws a seed from the global one
        )

    def run(self, todo: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        self.todo[:] = todo
        for batch in self.loader:
            if isinstance(batch, ImageError):
                raise ImageError(f"{batch}; python -m cropr data check lists all such files")
            images, labels = batch
            yield images, labels


class TrainBatches:
    """Training batches of this process, epoch by epoch.

    Args:
        split: from ``load_splits``.
        spec: transforms.
        batch_size: images per batch over all processes; each has ``batch_size / world`` of them.
        seed: of order and augmentation.
        rank, world: this process and the number of processes. Their shares make up the batch of one process alone.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: fewer images than a batch, a batch that does not divide into the processes, or an odd share of a
            batch with mixup or cutmix, which mix pairs.
    """

    def __init__(
        self,
        split: Split,
        spec: DataSpec,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < world, (rank, world)
        if len(split) < batch_size:
            raise ValueError(
                f"{split.root / split.name} has {len(split)} images, fewer than one batch of {batch_size}; "
                f"lower batch_size to at most {len(split)} or add images"
            )
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide into {world} processes; make it a multiple")
        if (spec.augment.mixup or spec.augment.cutmix) and batch_size // world % 2:
            raise ValueError(
                f"mixup and cutmix mix pairs, but a process has {batch_size // world} images of a batch; "
                f"make batch_size ({batch_size}) a multiple of {2 * world}"
            )
        self.split, self.batch_size, self.seed, self.rank, self.world = split, batch_size, seed, rank, world
        folder = SeededFolder(split, train_transform(spec), seed if is_random(spec) else None)
        self._loader = _Loader(folder, workers, pin_memory)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.split) // self.batch_size

    @property
    def dropped(self) -> int:
        """Images that every epoch leaves out, other ones each time, since they fill no batch."""
        return len(self.split) % self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Indices of all images in this epoch's order, a function of (seed, epoch)."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(len(self.split))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, 3, H, W] and labels [B] of the batches from ``start`` on; what lies before is not decoded.

        Raises:
            ImageError: an image cannot be read.
        """
        order = self.order(epoch)
        batches = (order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(start, len(self)))
        return self._loader.run([[(epoch, int(i)) for i in batch[self.rank :: self.world]] for batch in batches])


class EvalBatches:
    """This process's part of a split: images [B, 3, H, W] and labels [B], in order, each image once, none left out.

    Over all processes every image is seen exactly once, so that counts can be summed.
    """

    def __init__(
        self,
        split: Split,
        spec: DataSpec,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < world, (rank, world)
        self.indices = range(rank, len(split), world)
        self.paths = split.paths[rank::world]
        """Files of the images, in the order in which they come."""
        self.batch_size = batch_size
        self._loader = _Loader(SeededFolder(split, eval_transform(spec), None), workers, pin_memory)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(0, len(self.indices), self.batch_size)
        return self._loader.run([[(0, i) for i in self.indices[s : s + self.batch_size]] for s in starts])
