"""What the verbs that measure share: flags, specification, progress, record, and what they print of it."""

import argparse
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

import cropr.cli.spec_flags as flags
from cropr.records import RECORD, write_record
from cropr.specs import Spec

_LOG = logging.getLogger(__name__)


def add_measuring_flags(parser: argparse.ArgumentParser, kind: type[Spec], schedule: bool = True) -> None:
    """Flags of a verb that measures a model by name; ``spec_from_flags`` reads them."""
    flags.add_pruning_flags(parser, schedule)
    how = parser.add_argument_group("measurement")
    flags.add_fields(how, kind)
    add_record_flags(parser, how, f"{kind.__name__}; instead of flags")


def add_record_flags(parser: argparse.ArgumentParser, how: argparse._ActionsContainer, what: str) -> None:
    """``--spec``, and the flags that ``measured`` reads."""
    parser.add_argument("--spec", metavar="FILE", help=f"a JSON or YAML file, or JSON, of a {what}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    flags.add_machine_flags(how)


def spec_from_flags(args: argparse.Namespace, kind: type[flags.Kind], together: Collection[str] = ()) -> flags.Kind:
    """The specification of a measurement that ``--spec`` or flags describe; ``together``: flags that go with both."""
    values = flags.given(args, kind.model_fields)
    if args.spec:
        flags.require_alone(args, "spec", {*flags.PRUNING, *values} - {*together})
        return flags.make_spec({**flags.read_values(args.spec), **flags.given(args, together)}, kind=kind)
    return flags.make_spec(values | flags.model_and_pruning(args), kind=kind)


def show_cells(title: str, record: Mapping[str, Any], keys: Sequence[str]) -> None:
    """A row for each cell of a record, with the ``keys`` that any cell has; below, why some could not be measured."""
    cells = record.get("cells", [])
    flat = [{**cell, **(cell.get("metrics") or {})} for cell in cells]
    shown = [key for key in keys if any(key in cell for cell in flat)]
    flags.show_table(title, [{key: cell.get(key) for key in shown} for cell in flat])
    for key, text in (("unsupported", "not measured"), ("reason", "not reached")):
        for reason in dict.fromkeys(cell[key] for cell in cells if cell.get(key)):
            flags.say(f"{text}: {reason}")
    flags.say(origin(record))


def origin(record: Mapping[str, Any]) -> str:
    """Device, threads, version of torch and duration of a record."""
    told = record["provenance"]
    return f"{told['device']}, {told['threads']} threads, torch {told['packages']['torch']}, {told['wall_s']:.0f} s"


def measured(args: argparse.Namespace, spec: Spec, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The record of a measurement with the flags ``--device``, ``--threads``, ``--out``; written if asked to.

    If it is written, it also says what the device cannot run, so that a table of several precisions is complete on any
    device; else that is an error.
    """
    import torch

    set_threads(args)
    with progress() as tick:
        record = measure(spec, args.device or ("cuda" if torch.cuda.is_available() else "cpu"), tick)
    if args.out:
        write_record(args.out / RECORD, record)
    if reason := record.get("unsupported"):
        if not args.out:
            raise ValueError(reason)
        _LOG.warning("not measured: %s", reason)
    return record


def set_threads(args: argparse.Namespace) -> None:
    """Apply ``--threads``."""
    import torch

    flags.require_positive(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


@contextmanager
def progress(*columns: ProgressColumn) -> Iterator[Callable[..., None]]:
    """A line on the terminal that says what runs and for how long. Call what it gives with the name of each step, and
    with ``completed`` or ``advance`` and ``total`` where ``columns`` show a count."""
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=None)
        yield lambda what, **counts: bar.update(task, description=what, **counts)
