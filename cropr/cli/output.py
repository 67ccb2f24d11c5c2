"""What verbs write to the terminal: lines and tables on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cropr.records import RECORD, provenance, write_record
from cropr.specs import Spec

_LOG = logging.getLogger(__name__)


def say(text: str) -> None:
    """One line, whatever the width of the terminal."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def show_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A title and a table of rows, column -> text; all rows have the columns of the first."""
    say(title)
    table = Table(*(rows[0] if rows else ()), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def show_metrics(title: str, metrics: Mapping[str, float], labels: Mapping[str, str] | None = None) -> None:
    """A table of metrics by name. Those of the unpruned model (``base_...``) stand beside those of the pruned one, and
    the ends of an interval (``..._low``, ``..._high``) behind its middle. Metrics with a label are percentages."""
    labels, rows = labels or {}, []
    paired = any(name.startswith("base_") for name in metrics)
    for name, value in metrics.items():
        if name.startswith("base_") or (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in metrics):
            continue
        text = number(value) + (" %" if name in labels else "")
        if f"{name}_low" in metrics:
            text += f" [{number(metrics[f'{name}_low'])}, {number(metrics[f'{name}_high'])}]"
        base = {"unpruned": number(metrics.get(f"base_{name}"))} if paired else {}
        rows.append({"quantity": labels.get(name, name.replace("_", " ")), **base, "value": text})
    show_table(title, rows)


def show_cells(title: str, cells: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """A row for each cell of a record: those of the ``keys`` that any cell or its metrics have. Below, the reasons of
    cells that could not be measured."""
    flat = [{**cell, **(cell.get("metrics") or {})} for cell in cells]
    shown = [key for key in keys if any(key in cell for cell in flat)]
    show_table(title, [{key.replace("_", " "): number(cell.get(key)) for key in shown} for cell in flat])
    for key, text in (("unsupported", "not measured"), ("reason", "not reached")):
        for reason in dict.fromkeys(cell[key] for cell in cells if cell.get(key)):
            say(f"{text}: {reason}")


def number(value: Any) -> str:
    """A value as text: four digits, - for none, and ``197 to 19`` for the token counts of all blocks."""
    if isinstance(value, list):
        return f"{value[0]} to {min(value)}"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def origin(record: Mapping[str, Any]) -> str:
    """Device, threads, version of torch and duration of a record."""
    told = record["provenance"]
    return f"{told['device']}, {told['threads']} threads, torch {told['packages']['torch']}, {told['wall_s']:.0f} s"


def measured(args: argparse.Namespace, spec: Spec, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The record of a measurement with the flags ``--device``, ``--threads``, ``--out``; written if asked to.

    Where the device cannot run it, a record that is written has no metrics and gives the reason as ``unsupported``: so
    a table of several precisions is complete on any device.

    Raises:
        ValueError: an impossible spec or number of threads; what the device cannot run, if no record is written.
    """
    import torch

    from cropr.bench.device import Unsupported

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: must be 1 or more")
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    try:
        with progress() as tick:
            record = measure(spec, device, tick)
    except Unsupported as error:
        if args.out is None:
            raise
        _LOG.warning("not measured: %s", error)
        told = provenance(started, precision=getattr(spec, "precision", None))
        kind = type(spec).__name__.removesuffix("Spec").lower()
        record = {"kind": kind, "id": spec.digest(), "spec": spec.model_dump(mode="json"), "metrics": {}}
        record |= {"unsupported": str(error), "provenance": told}
    if args.out is not None:
        write_record(args.out / RECORD, record)
    return record


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what runs and for how long; call what it gives with the name of each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=None)
        yield lambda what: bar.update(task, description=what)
