"""Flags of the verbs, and the specifications that they make up: from a file, from JSON, or from flags.

``add_fields`` makes flags of the fields of a specification: name, type, choices, default and help come from the field.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from cropr.pruning.methods import FUSIONS, REDUCERS
from cropr.specs import Spec, check
from cropr.training.specs import TrainSpec

Kind = TypeVar("Kind", bound=Spec)
PRUNING = ("model", "reducer", "rate", "schedule", "fusion")
"""Names of the flags that ``add_pruning_flags`` adds."""
TEXTS = {
    "image_size": "pixels a side of the images",
    "batch_size": "images per forward pass",
    "precision": "a cast of the models, or autocast: amp_*",
    "attention": "attention kernel to force; auto: torch chooses",
    "rounds": "timed rounds of all models",
    "warmup": "untimed passes before them; 2 to read memory",
    "targets": "speed-ups to reach, one or several",
}
"""Help of flags whose field has no docstring."""

# Flags --------------------------------------------------------------------------------------------------------------


def add_fields(
    group: argparse._ActionsContainer,
    spec: type[Spec],
    names: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """A flag for each field that holds a number, a word, a switch, or several numbers or words.

    Args:
        spec: its fields. The docstring below a field is the help of its flag, else ``TEXTS``.
        names: these fields only; all by default.
        defaults: field -> default for the help, where a verb has its own.
    """
    for name, field in spec.model_fields.items():
        options = _options(field.annotation)
        if options is None or (names is not None and name not in names):
            continue
        text = field.description or TEXTS.get(name, name.replace("_", " "))
        text = " ".join(text.replace("`", "").split()).removesuffix(".")
        text = text[0].lower() + text[1:]
        default = (defaults or {}).get(name, None if field.is_required() else field.default)
        if isinstance(default, tuple | list):
            default = " ".join(map(str, default))
        if default is not None and "action" not in options:
            text += f" (default {default})"
        group.add_argument("--" + name.replace("_", "-"), help=text.replace("%", "%%"), **options)


def _options(annotation: Any) -> dict[str, Any] | None:
    """Arguments of ``add_argument`` for values of a type; None for types that a flag cannot hold."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return {"type": _number, "metavar": "X"} if set(kinds) == {int, float} else _options(kinds[0])
    if get_origin(annotation) in (tuple, list):
        inner, *others = get_args(annotation)
        options = _options(inner)
        several = get_origin(annotation) is list or others == [Ellipsis]
        return options and {**options, "nargs": "+" if several else 1 + len(others)}
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
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
    group.add_argument("--reducer", choices=list(REDUCERS), help="how tokens are chosen (default cropr)")
    if schedule:
        group.add_argument("--rate", type=int, metavar="R", help="patch tokens pruned after every block (default 8)")
        group.add_argument(
            "--schedule", metavar="JSON", help='another schedule, such as \'{"stages": {"at": {"6": 50}}}\''
        )
    group.add_argument("--fusion", choices=list(FUSIONS), help="how pruned tokens come back (default llf)")
    return group


def add_machine_flags(parser: argparse._ActionsContainer) -> None:
    """``--device`` and ``--threads``."""
    parser.add_argument("--device", help="cpu, cuda; to measure also cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Flags that the user gave, of those named, with their values."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def add_measuring_flags(parser: argparse.ArgumentParser, kind: type[Spec], schedule: bool = True) -> None:
    """What every verb that measures has; ``spec_from_flags`` reads it."""
    text = f"a {kind.__name__} as JSON or YAML file, or as JSON; instead of flags"
    parser.add_argument("--spec", metavar="FILE", help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    add_pruning_flags(parser, schedule)
    how = parser.add_argument_group("measurement")
    add_fields(how, kind)
    add_machine_flags(how)


def spec_from_flags(args: argparse.Namespace, kind: type[Kind], together: Collection[str] = ()) -> Kind:
    """The specification of a measurement that ``--spec`` or the flags describe; ``together``: flags that go with both.

    Raises:
        ValueError: flags that do not go together, or a value that is not allowed.
    """
    values = given(args, kind.model_fields)
    if args.spec:
        require_lone_spec(args, ({*PRUNING, *values} - {*together}))
        return make_spec({**read_values(args.spec), **given(args, together)}, kind=kind)
    return make_spec({**values, "model": {"name": require_model(args)}, "prune": pruning(args)}, kind=kind)


def require_lone_spec(args: argparse.Namespace, names: Iterable[str], fix: str = "") -> None:
    """Refuse ``--spec`` together with flags that stand for parts of a specification.

    Raises:
        ValueError: they are given together; ``fix`` ends the message.
    """
    if args.spec and (found := given(args, names)):
        flags = ", ".join("--" + name.replace("_", "-") for name in found)
        raise ValueError(f"--spec and {flags}: the spec says it all{fix}")


def pruning(args: argparse.Namespace) -> dict[str, Any]:
    """Reducer, schedule and fusion of a ``PruneSpec``, of the flags of ``add_pruning_flags``.

    Raises:
        ValueError: flags that do not go together, or a schedule that is neither JSON nor YAML.
    """
    reducer = args.reducer or "cropr"
    pruned = reducer != "none"
    values = {"reducer": reducer, "fusion": args.fusion or ("llf" if pruned else "none")}
    if not hasattr(args, "schedule"):
        return values
    if args.schedule and args.rate is not None:
        raise ValueError(f"--rate {args.rate} and --schedule {args.schedule}: give one of them")
    if not pruned and (args.rate or args.schedule):
        raise ValueError("--reducer none prunes nothing; leave --rate and --schedule out")
    rate = 8 if args.rate is None else args.rate
    schedule = parse(args.schedule, "--schedule") if args.schedule else {"constant": {"rate": rate * pruned}}
    return {**values, "schedule": schedule}


def require_model(args: argparse.Namespace, instead: str = "a spec with --spec") -> str:
    """The name that ``--model`` gave.

    Raises:
        ValueError: it is missing; ``instead`` says what else there is.
    """
    if not args.model:
        raise ValueError(f"name a model with --model (for example vit_large_patch16_224) or {instead}")
    return str(args.model)


def require_known(name: str) -> str:
    """The name of a model, if timm has it.

    Raises:
        ValueError: it does not; with models of similar names.
    """
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_patch')[0]}*")[:8]
        raise ValueError(f"--model {name}: timm has no such model; close to it: {', '.join(close) or 'none'}")
    return name


# Specifications -----------------------------------------------------------------------------------------------------


def read_spec(
    text: str,
    overrides: Iterable[str] = (),
    kind: type[Kind] = TrainSpec,  # type: ignore[assignment]
) -> Kind:
    """A spec from a JSON or YAML file, or from JSON itself; ``overrides`` are ``recipe.epochs=3`` and the like.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or YAML, or a value that is not allowed: key, value and what is.
    """
    return make_spec(read_values(text), overrides, kind)


def read_values(text: str) -> dict[str, Any]:
    """Keys and values of a spec, unchecked, from a JSON or YAML file, or from JSON itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or YAML.
    """
    if text.lstrip().startswith("{"):
        return parse(text, "--spec")
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"--spec {text}: no such file, and not JSON (it would begin with {{)")
    values = parse(path.read_text(encoding="utf-8"), text)
    return values.get("spec", values)  # a record.json holds its spec


def make_spec(
    values: Mapping[str, Any],
    overrides: Iterable[str] = (),
    kind: type[Kind] = TrainSpec,  # type: ignore[assignment]
) -> Kind:
    """Validate a spec.

    Raises:
        ValueError: key, value and what is allowed, a line each.
    """
    values = copy.deepcopy(dict(values))
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


def trained_run(folder: Path) -> tuple[TrainSpec, Path, int]:
    """Specification, weights and seed of a finished training run.

    Raises:
        FileNotFoundError: no such directory, or no record in it.
        ValueError: a record of something else.
    """
    from cropr.records import read_record
    from cropr.training.checkpoint import WEIGHTS

    if not folder.is_dir():
        raise FileNotFoundError(f"--run {folder}: no such directory")
    record = read_record(folder)
    if record["kind"] != "train":
        raise ValueError(f"--run {folder}: holds a record of kind {record['kind']}, not of a training run")
    return make_spec(record["spec"]), folder / WEIGHTS, record["seed"]


def parse(text: str, where: str) -> dict[str, Any]:
    """Keys and values of YAML or JSON; ``where`` it stands is for the error.

    Raises:
        ValueError: it is neither, or holds something else.
    """
    import yaml

    try:
        values = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is neither JSON nor YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, found {type(values).__name__}")
    return values
