"""How verbs read a specification: a file, JSON on the command line, or flags; and errors that a user can act on."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cropr.cli.pruning_flags import pruning
from cropr.pruning.methods import FUSIONS, REDUCERS
from cropr.specs import Spec, check
from cropr.training.specs import TrainSpec

Kind = TypeVar("Kind", bound=Spec)

FLAGS = (
    "model",
    "reducer",
    "rate",
    "schedule",
    "fusion",
    "drop_path",
    "epochs",
    "batch_size",
    "accumulate",
    "lr",
    "image_size",
    "precision",
    "pretrained",
)
"""What ``add_flags`` adds: each stands for a part of a spec."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that make up a spec without a file."""
    model = parser.add_argument_group("model and pruning")
    model.add_argument("--model", metavar="NAME", help="timm model, such as vit_small_patch16_224")
    model.add_argument("--reducer", choices=sorted(REDUCERS), help="what chooses the tokens (default cropr)")
    model.add_argument("--rate", type=int, metavar="R", help="patch tokens pruned after every block (default 8)")
    model.add_argument("--schedule", metavar="JSON", help='another schedule, such as \'{"stages": {"at": {"6": 50}}}\'')
    model.add_argument("--fusion", choices=FUSIONS, help="how pruned tokens come back (default llf)")
    model.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth (default 0.1)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, metavar="N", help="default 20")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="images per step over all devices (default 64)")
    recipe.add_argument("--accumulate", type=int, metavar="N", help="micro-batches per step, to save memory")
    recipe.add_argument("--lr", type=float, metavar="LR", help="peak learning rate (default 1e-3 per 256 images)")
    recipe.add_argument("--image-size", type=int, metavar="PX", help="default: the model's own")
    recipe.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default bf16 on a GPU, else fp32")
    recipe.add_argument("--pretrained", action="store_true", help="start from timm's weights of this model")


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
        place[last] = _literal(value)
    return check(kind, values, "spec")


def spec_from_flags(args: argparse.Namespace, classes: int, images: int, on_gpu: bool) -> TrainSpec:
    """The spec that the flags describe: a recipe to fine-tune a model on a folder of images.

    Args:
        args: with the flags of ``add_flags``, ``init`` and ``set``.
        classes: class folders of the data.
        images: training images; the default batch is not larger.
        on_gpu: decides the default precision.

    Raises:
        ValueError: flags that do not go together, or a value that is not allowed.
    """
    if not args.model:
        raise ValueError("name a model with --model (for example vit_small_patch16_224) or a spec with --spec")
    if args.pretrained and args.init:
        raise ValueError(f"--pretrained and --init {args.init}: give one of them")
    batch = args.batch_size if args.batch_size is not None else min(64, images)
    recipe = {
        "epochs": 20,
        "batch_size": batch,
        "warmup_epochs": 1 if args.epochs is None or args.epochs > 1 else 0,
        "precision": "bf16" if on_gpu else "fp32",
        "clip_grad": 1.0,
        **given(args, "accumulate", "precision"),
        **({} if args.epochs is None else {"epochs": int(args.epochs) if args.epochs.is_integer() else args.epochs}),
        **({} if args.lr is None or batch < 1 else {"base_lr": args.lr * 256 / batch}),
    }
    values = {
        "model": {"name": args.model, "drop_path": 0.1, **given(args, "drop_path")},
        "prune": pruning(args),
        "data": {
            **_input_of(args.model),
            **given(args, "image_size"),
            "num_classes": classes,
            "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "smoothing": 0.1},
        },
        "recipe": recipe,
        "init": "timm" if args.pretrained else initial_id(args.init) if args.init else "random",
    }
    return make_spec(values, args.set)


def initial_id(path: Path) -> str:
    """What names initial weights in a spec: the id of the run that made them, else a digest of the file."""
    from cropr.records import RECORD, read_record
    from cropr.training.checkpoint import WEIGHTS

    path = path / WEIGHTS if path.is_dir() else path
    if (path.parent / RECORD).exists():
        return str(read_record(path.parent)["id"])
    if not path.is_file():
        raise FileNotFoundError(f"--init {path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Flags that the user gave, of those named, with their values."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def require_lone_spec(args: argparse.Namespace, flags: Iterable[str], instead: str = "") -> None:
    """``--spec`` comes without the flags that stand for parts of a spec; ``instead`` says what else there is.

    Raises:
        ValueError: it does not.
    """
    if args.spec and (found := given(args, *flags)):
        names = ", ".join("--" + name.replace("_", "-") for name in found)
        raise ValueError(f"--spec and {names}: the spec says it all{instead}")


def _input_of(model: str) -> dict[str, Any]:
    """Image size, normalisation and evaluation crop that a timm model was made for."""
    import timm

    if not timm.is_model(model):
        close = timm.list_models(f"*{model.split('.')[0].split('_patch')[0]}*")[:8]
        raise ValueError(f"--model {model}: timm has no such model; close to it: {', '.join(close) or 'none'}")
    if (config := timm.get_pretrained_cfg(model)) is None:
        return {}
    usual = config.interpolation in ("bicubic", "bilinear")
    return {
        "image_size": config.input_size[-1],
        "mean": list(config.mean),
        "std": list(config.std),
        "crop_pct": config.crop_pct,
        "interpolation": config.interpolation if usual else "bicubic",
    }


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


def _literal(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
