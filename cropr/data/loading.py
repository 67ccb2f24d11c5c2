"""From samples to batches, whatever the task: order, seeds, workers, shares of processes, errors.

All randomness of a sample is a function of (seed, epoch, index), and the order of an epoch one of (seed, epoch):
neither the number of workers nor a resumption changes a sample.

B images of a batch of this process, H and W their size.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

from cropr.data.scenes import INCOMPLETE
from cropr.distributed import ALONE, World
from cropr.tasks import Task

Splits = TypeVar("Splits")
Collate = Callable[[list[Any]], Any]
"""Makes a batch (images, targets) of a list of (image, target)."""


class ImageError(ValueError):
    """An image, or the annotation that belongs to it, cannot be used; the message begins with its path."""


def find_images(path: Path) -> list[Path]:
    """A file, or the images below a folder in the order of their names. FileNotFoundError: neither, or no image."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    if not (found := [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]):
        raise FileNotFoundError(f"{path}: no such file, and no folder with images ({', '.join(IMG_EXTENSIONS)})")
    return found


def decode(path: str | Path) -> Image.Image:
    """An image in RGB and upright: other modes are converted, EXIF orientation is applied, 16 bits become 8. Raises
    ImageError: the file cannot be read to its end."""
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
        raise unreadable(path, error) from None


def unreadable(path: str | Path, error: Exception) -> ImageError:
    """An ``ImageError`` that gives the reason in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{path}: cannot be read as an image: {reason}")


def standardise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [3, H, W] -> float32, scaled to 0 ... 1, less the mean, over the standard deviation of each colour."""
    pixels = image.as_subclass(Tensor).contiguous()  # Pillow's lie colour by colour, over which arithmetic is slow
    return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), list(mean), list(std))


def pad(image: Tensor, side: int, fill: float = 0) -> Tensor:
    """[..., h, w] -> [..., side, side]: filled on the right and at the bottom."""
    return F.pad(image, [0, 0, side - image.shape[-1], side - image.shape[-2]], fill=fill)


def some(names: Sequence[str], between: str = "; ", limit: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return between.join([*names[:limit], *more])


def require_folders(root: Path, task: Task, inner: str = "") -> Path:
    """``root``, or its folder ``inner`` if there is one, after a check that it holds the folders of a task's layout.
    Raises FileNotFoundError: the root or a folder is missing; ValueError: a set whose writing was interrupted."""
    if (root / INCOMPLETE).exists():
        raise ValueError(f"{root}: writing this set was interrupted; write it again (python -m cropr data scenes)")
    top = root / inner if (root / inner).is_dir() else root
    for folder in (top, *(top / name for name in task.folders)):
        if not folder.is_dir():
            places = ", ".join(str(top / name) for name in task.folders)
            raise FileNotFoundError(f"{folder}: no such directory; images for {task.name} lie in {places}")
    return top


def settle(splits: Splits, found: Sequence[str], problems: list[str] | None) -> Splits:
    """The splits, if nothing was found wrong or the findings can join ``problems``; else ValueError with all."""
    if problems is None and found:
        raise ValueError(some(found, "\n  "))
    if problems is not None:
        problems += found
    return splits


def wrong_count(where: str, found: int, what: str, expected: int | None) -> list[str]:
    """A finding if a set has another number of classes than the settings say."""
    if expected in (None, found):
        return []
    fix = f"set num_classes to {found} or choose another directory"
    return [f"{where} has {found} {what}, the settings say {expected}; {fix}"]


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators, seeded from ``entropy`` within, and as they were afterwards."""
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


class Samples(Dataset[tuple[Tensor, Any]], ABC):
    """Samples (epoch, index) -> (image [3, H, W], target) of a ``split`` with ``root``, ``name`` and a length. What is
    random in ``sample`` depends on (seed, epoch, index) alone; if the seed is None, nothing is."""

    layout: ClassVar[str]
    """As in ``python -m cropr data check --layout``."""

    def __init__(self, split: Any, spec: Any, seed: int | None = None) -> None:
        self.split, self.spec, self.seed = split, spec, seed

    def __len__(self) -> int:
        return len(self.split)

    @abstractmethod
    def sample(self, index: int) -> tuple[Tensor, Any]:
        """One image and its target. May draw from the global generators. Raises ImageError: a file cannot be used."""

    def kind(self, index: int) -> Hashable:
        """Evaluation puts only images of one kind into a batch; for example, those of equal size can be stacked."""
        return None

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any]:
        epoch, index = key
        if self.seed is None:
            return self.sample(index)
        with seeded(self.seed, epoch, index):
            return self.sample(index)


class TrainBatches:
    """Training batches of this process, epoch by epoch, in an order by ``seed``. ``batch_size`` counts the images of a
    batch over all processes, whose shares together are the batch of one process alone; ``how`` is as of ``Loader``.
    Raises ValueError: fewer images than a batch, or a batch that does not divide into the processes."""

    def __init__(self, samples: Samples, batch_size: int, seed: int = 0, **how: Any) -> None:
        self._loader = Loader(samples, **how)
        self.world = world = self._loader.world
        if len(samples) < batch_size:
            few = f"{samples.split.root}: {samples.split.name} has {len(samples)} images, fewer than one batch"
            raise ValueError(f"{few} of {batch_size}; lower batch_size to at most {len(samples)} or add images")
        if batch_size % world.size:
            raise ValueError(f"batch_size {batch_size} does not divide into {world.size} processes; make it a multiple")
        self.count, self.batch_size, self.seed = len(samples), batch_size, seed

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.count // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Indices of all images in this epoch's order."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(self.count)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """Images [B, 3, H, W] and targets of the batches from ``start`` on; what lies before is not decoded."""
        order, rank = self.order(epoch), self.world.rank
        batches = (order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(start, len(self)))
        return self._loader.run([[(epoch, int(i)) for i in batch[rank :: self.world.size]] for batch in batches])


class EvalBatches:
    """This process's part of a set: batches of at most ``batch_size`` images; ``how`` is as of ``Loader``. Processes
    together see each image once. Images come in order, those of one kind (``Samples.kind``) together."""

    def __init__(self, samples: Samples, batch_size: int, **how: Any) -> None:
        assert samples.seed is None, "evaluation is not random"
        self._loader = Loader(samples, **how)
        if len(samples) < self._loader.world.size:
            raise ValueError(f"{len(samples)} images for {self._loader.world.size} processes: start as many or fewer")
        kinds: dict[Hashable, list[int]] = {}
        for index in range(self._loader.world.rank, len(samples), self._loader.world.size):
            kinds.setdefault(samples.kind(index), []).append(index)
        self._batches = [own[at : at + batch_size] for own in kinds.values() for at in range(0, len(own), batch_size)]

    @property
    def indices(self) -> list[int]:
        """Of the images of this process, in the order in which they come."""
        return [index for batch in self._batches for index in batch]

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._loader.run([[(0, index) for index in batch] for batch in self._batches])


class Loader:
    """torch's loader over batches of ``Samples``; workers live on between passes, global generators stay untouched.
    ``collate`` makes a batch of samples; ``workers`` processes decode, this one if there are none."""

    def __init__(
        self, samples: Samples, collate: Collate = default_collate, world: World = ALONE, workers: int = 0
    ) -> None:
        self.layout, self.world = samples.layout, world
        self.todo: list[list[tuple[int, int]]] = []  # batches of (epoch, index) of the next pass
        self.loader = DataLoader(
            _Batches(samples, collate),
            batch_size=None,  # an entry of the sampler is a batch
            sampler=self.todo,
            collate_fn=list,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=world.device.type == "cuda",
            generator=torch.Generator(),  # else each pass draws a seed from the global one
        )

    def run(self, todo: list[list[tuple[int, int]]]) -> Iterator[tuple[Any, Any]]:
        self.todo[:] = todo
        for batch in self.loader:
            if isinstance(batch[0], ImageError):
                raise ImageError(f"{batch[0]}; python -m cropr data check --layout {self.layout} lists all such files")
            yield tuple(batch)


class _Batches(Dataset[Any]):
    """Batches by the keys of their samples. The error of an image that cannot be read is returned: raised in a worker,
    it would come as a long traceback, and torch would take seconds to end the workers."""

    def __init__(self, samples: Samples, collate: Collate) -> None:
        self.samples, self.collate = samples, collate

    def __getitem__(self, keys: list[tuple[int, int]]) -> Any:
        try:
            return self.collate([self.samples[key] for key in keys])
        except ImageError as error:
            return [error]
