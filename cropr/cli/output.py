"""What verbs write to the terminal: lines and tables on standard output, progress on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def say(text: str) -> None:
    """One line, whatever the width of the terminal."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def show_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A table of rows, column -> text; the columns are those of the first row."""
    say(title)
    table = Table(*rows[0], box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def show_metrics(title: str, metrics: Mapping[str, float], labels: Mapping[str, str] | None = None) -> None:
    """Metrics by name. Those of the unpruned model (``base_...``) stand beside those of the pruned one, and the ends of
    an interval (``..._low``, ``..._high``) behind its middle. Metrics with a label are percentages."""
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
    for reason in dict.fromkeys(cell.get("unsupported") or cell.get("reason") for cell in cells):
        if reason:
            say(f"not measured: {reason}")


def number(value: Any) -> str:
    """A value as text: four digits, - for none, and ``197 to 19`` for the token counts of all blocks."""
    if isinstance(value, list):
        return f"{value[0]} to {min(value)}"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def origin(record: Mapping[str, Any]) -> str:
    """Device, threads, version of torch and duration of a record."""
    told = record["provenance"]
    return f"{told['device']}, {told['threads']} threads, torch {told['packages']['torch']}, {told['wall_s']:.0f} s"


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what runs and for how long; call what it gives with the name of each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=None)
        yield lambda what: bar.update(task, description=what)
