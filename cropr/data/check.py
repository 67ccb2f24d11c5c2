"""The whole-set check: reads every image of a folder, and what belongs to it, and lists all that cannot be used."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cropr.data import ade20k, imagenet
from cropr.data.loading import ImageError, decode, some

Progress = Callable[[int, int], None]
"""Called with the images that are done and all."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found: number of classes if folders or settings give it, images per split, what is wrong with the
    folders, a line per file that cannot be used (its path first), and what is passed over and no error."""

    root: Path
    classes: int | None
    images: dict[str, int]
    problems: tuple[str, ...]
    bad: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def raise_for_problems(self, limit: int = 20) -> None:
        """ValueError with all problems and up to ``limit`` bad files, if there are any."""
        if self.problems or self.bad:
            summary = f"{self.root}: {len(self.bad)} of {sum(self.images.values())} images cannot be used"
            lines = [summary, some(self.bad, "\n  ", limit)] if self.bad else []
            raise ValueError("\n  ".join([*lines[:1], *self.problems, *lines[1:]]))


def check(
    root: str | Path, num_classes: int | None = None, layout: str = "imagenet", progress: Progress | None = None
) -> CheckReport:
    """Read all images of both splits; ``layout`` is ``imagenet``, ``ade20k`` or ``coco``. Raises FileNotFoundError: the
    root or a folder is missing; ValueError: a set of scenes whose writing was interrupted."""
    root, notes, problems = Path(root), tuple[str, ...](), list[str]()
    splits: Iterable[Any]
    if layout == "imagenet":
        splits = imagenet.load_splits(root, num_classes, problems)
        reads: list[Callable[[], object]] = [partial(decode, path) for split in splits for path in split.paths]
        num_classes = len(splits[0].classes)
    elif layout == "ade20k":
        splits = ade20k.load_splits(root, problems)
        classes = 255 if num_classes is None else num_classes
        reads = [partial(ade20k.read_pair, split, index, classes) for split in splits for index in range(len(split))]
    else:
        from cropr.data import coco  # needs pycocotools

        splits = coco.load_coco(root, num_classes, problems)
        # Images without a file are among the problems.
        places = [(split, index) for split in splits for index in range(len(split)) if split.path(index).is_file()]
        reads = [partial(coco.read_pair, split, index) for split, index in places]
        num_classes = len(splits[0].annotations.categories)
        skipped = {split.name: split.annotations.skipped for split in splits}
        notes = tuple(f"{count} instances of {name} have no area" for name, count in skipped.items() if count)
    images, bad = {split.name: len(split) for split in splits}, list[str]()
    with ThreadPoolExecutor(4) as pool:
        for done, failure in enumerate(pool.map(_failure, reads), start=1):
            bad += failure
            if progress and (done % 256 == 0 or done == len(reads)):
                progress(done, len(reads))
    return CheckReport(root, num_classes, images, tuple(problems), tuple(bad), notes)


def _failure(read: Callable[[], object]) -> list[str]:
    """The message of an ``ImageError`` that a call raises, if it does."""
    try:
        read()
    except ImageError as error:
        return [str(error)]
    return []
