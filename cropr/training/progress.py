"""What a running job shows and writes down: a bar or log lines, ``log.jsonl``, and how it is asked to stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS = 30
"""Between two log lines where there is no terminal."""

_LOG = logging.getLogger(__name__)


class StepLog:
    """``log.jsonl``: one line a step, each step once, also over resumptions.

    Args:
        path: the file; if None, nothing is written (all processes but the first).
        step: steps done; lines of later ones, which a killed run left, are dropped.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        path = path or Path(os.devnull)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_before(path, step) if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """All lines so far are on disk when this returns: a checkpoint is never ahead of its log."""
        os.fsync(self.file.fileno())


def _lines_before(path: Path, step: int) -> list[str]:
    """Whole lines of steps before ``step``; what a kill cut short is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if number < step:
            kept.append(line)
    return kept


class Progress(Bar):
    """A bar on a terminal, else a log line every ``SECONDS`` and at the end of each epoch; nothing without ``show``."""

    def __init__(self, total: int, done: int, steps_per_epoch: int, show: bool = True) -> None:
        self._total, self._steps, self._show, self._said = total, steps_per_epoch, show, time.monotonic()
        console = Console(stderr=True)
        text, numbers = TextColumn("{task.description}"), TextColumn("{task.fields[numbers]}")
        columns = text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), numbers
        super().__init__(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
        self._task = self.add_task("training", total=total, completed=done, numbers="")

    def step(self, line: dict[str, Any]) -> None:
        """One step was done; ``line`` is its line of the log."""
        step = line["step"] + 1
        loss = "nan" if line["loss"] is None else f"{line['loss']:.3f}"
        numbers = f"loss {loss}, {line['images_per_s']:.3g} images/s"
        self.update(self._task, completed=step, numbers=numbers)
        due = step % self._steps == 0 or time.monotonic() - self._said > SECONDS
        if self.disable and self._show and due:
            self._said = time.monotonic()
            _LOG.info("step %d of %d, epoch %d: %s", step, self._total, line["epoch"] + 1, numbers)


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop reads between two steps; a second one ends at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.requested).name if self.requested else "another process"

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        for each, handler in self._before.items():
            signal.signal(each, handler)
