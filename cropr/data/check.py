"""The whole-set check: reads every image of a folder, and what belongs to it, and lists all that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cropr.data import ade20k, imagenet
from cropr.data.loading import ImageError, decode

Progress = Callable[[int, int], None]
"""Called with the images that are done and all."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found."""

    root: Path
    classes: int | None
    """None where neither folders nor settings say it."""
    images: dict[str, int]
    """Per split."""
    problems: tuple[str, ...]
    """What is wrong with the folders."""
    bad: tuple[str, ...]
    """A line per file that cannot be used; it begins with the path."""
    notes: tuple[str, ...] = ()
    """What is passed over, and no error."""

    def raise_for_problems(self, limit: int = 20) -> None:
        """ValueError with all problems and up to ``limit`` bad files, if there are any."""
        if not (self.problems or self.bad):
            return
        lines = [*self.problems, *self.bad[:limit]]
        if len(self.bad) > limit:
            lines.append(f"and {len(self.bad) - limit} more files")
        summary = f"{self.root}: {len(self.bad)} of {sum(self.images.values())} images cannot be used"
        raise ValueError("\n  ".join([summary, *lines]))


def check(
    root: str | Path,
    num_classes: int | None = None,
    layout: str = "imagenet",
    workers: int = 4,
    progress: Progress | None = None,
) -> CheckReport:
    """Read all images of both splits.

    Args:
        num_classes: number of classes that there should be.
        layout: ``imagenet``, ``ade20k`` or ``coco``.
        workers: threads.
        progress: called with the images that are done and all.

    Raises:
        FileNotFoundError: the root or a folder is missing.
        ValueError: a set of scenes whose writing was interrupted.
    """
    return CHECKS[layout](Path(root), num_classes, workers, progress or (lambda done, total: None))


def _imagenet(root: Path, num_classes: int | None, workers: int, progress: Progress) -> CheckReport:
    splits, problems = imagenet.survey(root, num_classes)
    reads = [partial(decode, path) for split in splits for path in split.paths]
    images = {split.name: len(split) for split in splits}
    bad = _failures(reads, workers, progress)
    return CheckReport(root, len(splits[0].classes), images, tuple(problems), bad)


def _ade20k(root: Path, num_classes: int | None, workers: int, progress: Progress) -> CheckReport:
    splits, problems = ade20k.survey(root)
    classes = 255 if num_classes is None else num_classes
    reads = [partial(ade20k.read_pair, split, index, classes) for split in splits for index in range(len(split))]
    images = {split.name: len(split) for split in splits}
    return CheckReport(root, num_classes, images, tuple(problems), _failures(reads, workers, progress))


def _coco(root: Path, num_classes: int | None, workers: int, progress: Progress) -> CheckReport:
    from cropr.data import coco  # needs pycocotools

    splits, problems = coco.survey_coco(root, num_classes)
    # Images without a file are among the problems.
    places = ((split, index) for split in splits for index in range(len(split)) if split.path(index).is_file())
    bad = _failures([partial(coco.read_pair, split, index) for split, index in places], workers, progress)
    images = {split.name: len(split) for split in splits}
    skipped = {split.name: split.annotations.skipped for split in splits}
    notes = tuple(f"{count} instances of {name} have no area" for name, count in skipped.items() if count)
    return CheckReport(root, len(splits[0].annotations.categories), images, tuple(problems), bad, notes)


CHECKS = {"imagenet": _imagenet, "ade20k": _ade20k, "coco": _coco}


def _failures(reads: Sequence[Callable[[], object]], workers: int, progress: Progress) -> tuple[str, ...]:
    """Call all; returns the messages of those that raise ``ImageError``."""
    chunks = [reads[start : start + 64] for start in range(0, len(reads), 64)]
    bad: list[str] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk, errors in zip(chunks, pool.map(_failures_of, chunks), strict=True):
            bad += errors
            done += len(chunk)
            progress(done, len(reads))
    return tuple(bad)


def _failures_of(reads: Sequence[Callable[[], object]]) -> list[str]:
    errors = []
    for read in reads:
        try:
            read()
        except ImageError as error:
            errors.append(str(error))
    return errors
