"""What the verbs that measure share: flags, specification, progress, record, and what they print of it."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import cropr.cli.spec_flags as flags
from cropr.records import RECORD, make_record, write_record
from cropr.specs import Spec

_LOG = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=Spec)


def add_measuring_flags(parser: argparse.ArgumentParser, kind: type[Spec], schedule: bool = True) -> None:
    """What every verb that measures has; ``spec_from_flags`` reads it."""
    flags.add_pruning_flags(parser, schedule)
    how = parser.add_argument_group("measurement")
    flags.add_fields(how, kind)
    add_record_flags(parser, how, f"{kind.__name__}; instead of flags")


def add_record_flags(parser: argparse.ArgumentParser, how: argparse._ActionsContainer, what: str) -> None:
    """``--spec``, ``--out`` and the flags that ``measured`` reads."""
    parser.add_argument("--spec", metavar="FILE", help=f"a JSON or YAML file, or JSON, of a {what}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    flags.add_machine_flags(how)


def spec_from_flags(args: argparse.Namespace, kind: type[Kind], together: Collection[str] = ()) -> Kind:
    """The specification of a measurement that ``--spec`` or the flags describe; ``together``: flags that go with both.

    Raises:
        ValueError: flags that do not go together, or a value that is not allowed.
    """
    values = flags.given(args, kind.model_fields)
    if args.spec:
        flags.require_lone_spec(args, ({*flags.PRUNING, *values} - {*together}))
        return flags.make_spec({**flags.read_values(args.spec), **flags.given(args, together)}, kind=kind)
    values |= {"model": {"name": flags.require_model(args)}, "prune": flags.pruning(args)}
    return flags.make_spec(values, kind=kind)


def show_cells(title: str, record: Mapping[str, Any], keys: Sequence[str]) -> None:
    """A row for each cell of a record: those of the ``keys`` that any cell or its metrics have. Below, the reasons of
    cells that could not be measured."""
    cells = record.get("cells", [])
    flat = [{**cell, **(cell.get("metrics") or {})} for cell in cells]
    shown = [key for key in keys if any(key in cell for cell in flat)]
    flags.show_table(title, [{key.replace("_", " "): flags.number(cell.get(key)) for key in shown} for cell in flat])
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

    Where the device cannot run it, a record that is written has no metrics and gives the reason as ``unsupported``: so
    a table of several precisions is complete on any device.

    Raises:
        ValueError: an impossible spec or number of threads; what the device cannot run, if no record is written.
    """
    import torch

    from cropr.bench.device import Unsupported

    set_threads(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    try:
        with progress() as tick:
            record = measure(spec, device, tick)
    except Unsupported as error:
        if args.out is None:
            raise
        _LOG.warning("not measured: %s", error)
        kind = type(spec).__name__.removesuffix("Spec").lower()
        record = make_record(kind, spec, started, {"metrics": {}, "unsupported": str(error)})
    if args.out is not None:
        write_record(args.out / RECORD, record)
    return record


def set_threads(args: argparse.Namespace) -> None:
    """Apply ``--threads``. Raises: ValueError: it is below 1."""
    import torch

    require_positive(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises: ValueError: a flag that is given is below 1."""
    for name, value in flags.given(args, names).items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what runs and for how long; call what it gives with the name of each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=None)
        yield lambda what: bar.update(task, description=what)
