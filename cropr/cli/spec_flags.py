"""What verbs share: flags, the specifications that they make up, what is printed, and how a measurement is recorded.

Name, type, choices, default and help of most flags come from the field of a specification and its docstring.
"""

import argparse
import copy
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cropr.pruning.methods import FUSIONS, REDUCERS
from cropr.records import RECORD, read_record, write_record
from cropr.specs import Spec, check, load_yaml
from cropr.tasks import TASKS, TrainSpec

Kind = TypeVar("Kind", bound=Spec)
PRUNING = ("model", "patch_size", "depth", "reducer", "rate", "schedule", "fusion")
"""Names of the flags that ``add_pruning_flags`` adds."""
LAYOUTS = tuple(task.layout for task in TASKS.values())
_LOG = logging.getLogger(__name__)


def add_fields(
    group: argparse._ActionsContainer, spec: type[Spec], names: Iterable[str] | None = None, **defaults: Any
) -> None:
    """A flag for each field, or those named, that holds a number, a word, a switch, or several numbers or words;
    ``defaults`` are for the help, where a verb has its own."""
    for name in names or spec.model_fields:
        field = spec.model_fields[name]
        if (options := _options(field.annotation)) is None:
            continue
        text = " ".join((field.description or name.replace("_", " ")).replace("`", "").split()).removesuffix(".")
        default = defaults.get(name, None if field.is_required() else field.default)
        if default is not None and "action" not in options:
            several = isinstance(default, tuple | list)
            text += f" (default {' '.join(map(str, default)) if several else default})"
        group.add_argument(flag(name), help=(text[0].lower() + text[1:]).replace("%", "%%"), **options)


def _options(annotation: Any) -> dict[str, Any] | None:
    """Arguments of ``add_argument`` for values of a type; None for types that a flag cannot hold."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        kinds = [part for part in parts if part is not NoneType]
        return {"type": _number, "metavar": "X"} if set(kinds) == {int, float} else _options(kinds[0])
    if kind in (tuple, list):
        options = _options(parts[0])
        return options and {**options, "nargs": "+" if kind is list or Ellipsis in parts else len(parts)}
    if kind is Annotated:
        return _options(parts[0])
    if kind is Literal:
        return {"choices": parts}
    if annotation is bool:
        return {"action": "store_true"}
    letters = {int: "N", float: "X", str: "TEXT"}
    return {"type": annotation, "metavar": letters[annotation]} if annotation in letters else None


def _number(text: str) -> int | float:
    """Whole numbers as int: digests of specifications tell 3 from 3.0."""
    value = float(text)
    return int(value) if value.is_integer() else value


def add_pruning_flags(parser: argparse.ArgumentParser, schedule: bool = True) -> argparse._ArgumentGroup:
    """The model and how it is pruned, for every verb that builds one; returns their group, for more of them."""
    group = parser.add_argument_group("model and pruning")
    group.add_argument("--model", metavar="NAME", help="timm model, such as vit_large_patch16_224")
    for name, text in (("patch_size", "pixels a side of a patch"), ("depth", "blocks")):
        group.add_argument(flag(name), type=int, metavar="N", help=f"{text} (default: the model's own)")
    group.add_argument("--reducer", choices=list(REDUCERS), help="how tokens are chosen (default cropr)")
    if schedule:
        group.add_argument("--rate", type=int, metavar="R", help="patch tokens pruned after every block (default 8)")
        group.add_argument("--schedule", metavar="JSON", help='another schedule, as \'{"stages": {"at": {"6": 50}}}\'')
    group.add_argument("--fusion", choices=list(FUSIONS), help="how pruned tokens come back (default llf)")
    return group


def add_machine_flags(parser: argparse._ActionsContainer, workers: bool = False) -> None:
    parser.add_argument("--device", help="cpu, cuda; to measure also cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default OMP_NUM_THREADS, else all)")
    if workers:
        parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (default 0)")


def add_run_flags(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """A finished training run, its seed, and the images that its model runs on."""
    text = "directory of a finished training run"
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", required=required, help=text)
    text = "its weights that were best while it trained (train --evaluate-every), not the last"
    parser.add_argument("--best", action="store_true", help=text)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the images, in the layout of the task")
    parser.add_argument("--seed", type=int, metavar="N", help="of random reducers (default: the run's)")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Flags that the user gave, of those named, with their values."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def require_alone(args: argparse.Namespace, whole: str, names: Iterable[str], fix: str = "") -> None:
    """Raises: ValueError: flags that stand for parts of ``whole``, "spec" or "run", are given beside it."""
    if found := given(args, names):
        parts = ", ".join(map(flag, found))
        raise ValueError(f"--{whole} has the values of {parts}: leave {parts} out{fix}")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises: ValueError: a flag that is given is below 1."""
    for name, value in given(args, names).items():
        if value < 1:
            raise ValueError(f"{flag(name)} {value}: must be 1 or more")


def model_and_pruning(args: argparse.Namespace, instead: str = "a spec with --spec") -> dict[str, Any]:
    """``model`` and ``prune`` of a specification, of the flags of ``add_pruning_flags``. Raises: ValueError: no model,
    and ``instead`` says what else there is; flags that do not go together; a schedule that is not JSON."""
    if not args.model:
        raise ValueError(f"name a model with --model (for example vit_large_patch16_224) or {instead}")
    reducer, pruned = args.reducer or "cropr", args.reducer != "none"
    prune = {"reducer": reducer, "fusion": args.fusion or ("llf" if pruned else "none")}
    if hasattr(args, "schedule"):
        if args.schedule and args.rate is not None:
            raise ValueError(f"--rate {args.rate} and --schedule {args.schedule}: give one of them")
        if not pruned and (args.rate or args.schedule):
            raise ValueError("--reducer none prunes nothing; leave --rate and --schedule out")
        constant = {"constant": {"rate": (8 if args.rate is None else args.rate) * pruned}}
        prune["schedule"] = load_yaml(args.schedule, "--schedule") if args.schedule else constant
    built = given(args, ("patch_size", "depth"))
    return {"model": {"name": args.model, **({"args": built} if built else {})}, "prune": prune}


def read_values(text: str) -> dict[str, Any]:
    """Keys and values of a spec, unchecked, from a JSON or YAML file, or from JSON itself."""
    if text.lstrip().startswith("{"):
        return load_yaml(text, "--spec")
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"--spec {text}: no such file, and not JSON (it would begin with {{)")
    values = load_yaml(path.read_text(encoding="utf-8"), text)
    return values.get("spec", values)  # a record.json holds its spec


def make_spec(
    values: str | Mapping[str, Any],
    overrides: Iterable[str] = (),
    kind: type[Kind] = TrainSpec,  # type: ignore[assignment]
) -> Kind:
    """A spec of keys and values, or of what ``read_values`` reads; ``overrides``: KEY=VALUE of ``--set``. Raises:
    ValueError: key, value and what is allowed, a line each."""
    values = read_values(values) if isinstance(values, str) else copy.deepcopy(dict(values))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: write KEY=VALUE, for example recipe.epochs=3")
        *parents, last = key.removeprefix("spec.").split(".")
        place: Any = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {override}: {parent} has no keys below it")
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return check(kind, values, "spec")


def trained_run(args: argparse.Namespace) -> tuple[TrainSpec, Path, int]:
    """Specification, weights and seed (if given, that of the flags) of the run that ``--run`` names."""
    from cropr.training.checkpoint import BEST, WEIGHTS

    folder: Path = args.run_dir
    if not folder.is_dir():
        raise FileNotFoundError(f"--run {folder}: no such directory")
    record = read_record(folder)
    if record.get("kind") != "train" or not {"spec", "seed"} <= record.keys():
        raise ValueError(f"--run {folder}: holds a record of kind {record.get('kind')}, not of a training run")
    asked = given(args, ("best", "seed"))
    return make_spec(record["spec"]), folder / (BEST if "best" in asked else WEIGHTS), asked.get("seed", record["seed"])


def say(text: str) -> None:
    """One line, whatever the width of the terminal."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A title and a table of rows, column -> value; all rows have the columns of the first."""
    say(title)
    columns = (name.replace("_", " ") for name in (rows[0] if rows else ()))
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(number, row.values()))
    Console().print(table)


def show_metrics(title: str, metrics: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> None:
    """A table of metrics by name. Those of the unpruned model (``base_...``) stand beside those of the pruned one, and
    the ends of an interval (``..._low``, ``..._high``) behind its middle. Metrics with a label are percentages."""
    labels, rows, paired = labels or {}, [], any(name.startswith("base_") for name in metrics)
    for name, value in metrics.items():
        if name.startswith("base_") or (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in metrics):
            continue
        text = "no such object" if value is None else number(value) + " %" * (name in labels)
        if f"{name}_low" in metrics:
            text += f" [{number(metrics[f'{name}_low'])}, {number(metrics[f'{name}_high'])}]"
        base = {"unpruned": metrics.get(f"base_{name}")} if paired else {}
        rows.append({"quantity": labels.get(name, name.replace("_", " ")), **base, "value": text})
    show_table(title, rows)


def number(value: Any) -> str:
    """A value as text: four digits, - for none, and ``197 to 19`` for the token counts of all blocks."""
    if isinstance(value, list):
        return f"{value[0]} to {min(value)}"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def add_measuring_flags(parser: argparse.ArgumentParser, kind: type[Spec], schedule: bool = True) -> None:
    """Flags of a verb that measures a model by name; ``spec_from_flags`` reads them."""
    add_pruning_flags(parser, schedule)
    how = parser.add_argument_group("measurement")
    add_fields(how, kind)
    add_record_flags(parser, how, f"{kind.__name__}; instead of flags")


def add_record_flags(parser: argparse.ArgumentParser, how: argparse._ActionsContainer, what: str) -> None:
    """``--spec``, and the flags that ``measured`` reads."""
    parser.add_argument("--spec", metavar="FILE", help=f"a JSON or YAML file, or JSON, of a {what}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    add_machine_flags(how)


def spec_from_flags(args: argparse.Namespace, kind: type[Kind], together: Collection[str] = ()) -> Kind:
    """The specification of a measurement that ``--spec`` or flags describe; ``together``: flags that go with both."""
    values = given(args, kind.model_fields)
    if args.spec:
        require_alone(args, "spec", {*PRUNING, *values} - {*together})
        return make_spec({**read_values(args.spec), **given(args, together)}, kind=kind)
    return make_spec(values | model_and_pruning(args), kind=kind)


def show_cells(title: str, record: Mapping[str, Any], keys: Sequence[str]) -> None:
    """A row for each cell of a record, with the ``keys`` that any cell has; below, why some could not be measured."""
    cells = record.get("cells", [])
    flat = [{**cell, **(cell.get("metrics") or {})} for cell in cells]
    shown = [key for key in keys if any(key in cell for cell in flat)]
    show_table(title, [{key: cell.get(key) for key in shown} for cell in flat])
    for key, text in (("unsupported", "not measured"), ("reason", "not reached")):
        for reason in dict.fromkeys(cell[key] for cell in cells if cell.get(key)):
            say(f"{text}: {reason}")
    say(origin(record))


def origin(record: Mapping[str, Any]) -> str:
    """Device, threads, version of torch and duration of a record."""
    told = record["provenance"]
    return f"{told['device']}, {told['threads']} threads, torch {told['packages']['torch']}, {told['wall_s']:.0f} s"


def measured(args: argparse.Namespace, spec: Spec, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The record of a measurement with the flags ``--device``, ``--threads``, ``--out``; written if asked to, also
    where the device cannot run it, so that a table of several precisions is complete on any device; else an error."""
    import torch

    from cropr.distributed import set_threads

    set_threads(args.threads)
    with progress() as tick:
        record = measure(spec, args.device or ("cuda" if torch.cuda.is_available() else "cpu"), tick)
    if args.out:
        write_record(args.out / RECORD, record)
    if reason := record.get("unsupported"):
        if not args.out:
            raise ValueError(reason)
        _LOG.warning("not measured: %s", reason)
    return record


@contextmanager
def progress(*columns: ProgressColumn) -> Iterator[Callable[..., None]]:
    """A line on the terminal that says what runs and for how long. Call what it gives with the name of each step, and
    with ``completed`` or ``advance`` and ``total`` where ``columns`` show a count."""
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=None)
        yield lambda what, **counts: bar.update(task, description=what, **counts)
