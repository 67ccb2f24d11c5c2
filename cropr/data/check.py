"""The whole-set check: decodes every image of a folder and lists all that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cropr.data.imagenet import ImageError, decode, survey


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found."""

    root: Path
    classes: int
    images: dict[str, int]
    """Per split."""
    problems: tuple[str, ...]
    """What is wrong with the folders."""
    bad: tuple[str, ...]
    """A line per file that cannot be read; it begins with the path."""

    def raise_for_problems(self, limit: int = 20) -> None:
        """ValueError with all problems and up to ``limit`` bad files, if there are any."""
        if not (self.problems or self.bad):
            return
        lines = [*self.problems, *self.bad[:limit]]
        if len(self.bad) > limit:
            lines.append(f"and {len(self.bad) - limit} more files")
        summary = f"{self.root}: {len(self.bad)} of {sum(self.images.values())} images cannot be read"
        raise ValueError("\n  ".join([summary, *lines]))


def check(
    root: str | Path,
    num_classes: int | None = None,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every image of both splits.

    Args:
        num_classes: number of classes that there should be.
        workers: threads.
        progress: called with the images that are done and all.

    Raises:
        FileNotFoundError: the root or a split is missing.
        ValueError: a set of scenes whose writing was interrupted.
    """
    splits, problems = survey(Path(root), num_classes)
    paths = [path for split in splits for path in split.paths]
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    bad: list[str] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk, errors in zip(chunks, pool.map(_unreadable, chunks), strict=True):
            bad += errors
            done += len(chunk)
            if progress:
                progress(done, len(paths))
    images = {split.name: len(split) for split in splits}
    return CheckReport(Path(root), len(splits[0].classes), images, tuple(problems), tuple(bad))


def _unreadable(paths: list[str]) -> list[str]:
    errors = []
    for path in paths:
        try:
            decode(path)
        except ImageError as error:
            errors.append(str(error))
    return errors
