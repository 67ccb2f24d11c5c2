"""Measure throughput of a pruned model against the unpruned one, in one process, round by round in turn.

Weights are random, so that nothing is downloaded. Printed are medians over rounds, the speed-up with a 95 % interval,
and the bound that the FLOP count sets. Leave the machine alone while it runs.

examples:
  python -m cropr bench --model vit_large_patch16_224 --reducer cropr --rate 8 --fusion llf
  python -m cropr bench --model vit_base_patch16_224 --schedule '{"stages": {"at": {"6": 50}}}' --fusion none
  python -m cropr bench --model vit_base_patch16_224 --precision bf16 --batch-size 8 --threads 2 --rounds 15
  python -m cropr bench --model vit_base_patch16_224 --reducer none --pruned-image-size 160    a smaller image instead
  python -m cropr bench --model vit_base_patch16_224 --reducer none                           how noisy is this machine?
  python -m cropr bench --spec results/laptop/bench/3f2a91c07d/record.json --out again         a row of a table again
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cropr.commands.spec_flags import explain
from cropr.records import RECORD, write_record
from cropr.specs import REDUCERS, BenchSpec

_LOG = logging.getLogger(__name__)
_SIMPLE = ("image_size", "pruned_image_size", "batch_size", "precision", "rounds", "warmup")
_FLAGS = ("model", "reducer", "rate", "schedule", "fusion", *_SIMPLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--spec", metavar="FILE", help="a BenchSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    model = parser.add_argument_group("model and pruning")
    model.add_argument("--model", metavar="NAME", help="timm model, such as vit_large_patch16_224")
    model.add_argument("--reducer", choices=sorted(REDUCERS), help="what chooses the tokens (default cropr)")
    model.add_argument("--rate", type=int, metavar="R", help="patch tokens pruned after every block (default 8)")
    model.add_argument("--schedule", metavar="JSON", help='another schedule, such as \'{"stages": {"at": {"6": 50}}}\'')
    model.add_argument("--fusion", choices=["none", "llf"], help="how pruned tokens come back (default llf)")
    model.add_argument("--image-size", type=int, metavar="PX", help="default 224")
    model.add_argument("--pruned-image-size", type=int, metavar="PX", help="of the second model, where it differs")
    how = parser.add_argument_group("measurement")
    how.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass (default 4)")
    how.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="cast of both models (default fp32)")
    how.add_argument("--rounds", type=int, metavar="N", help="timed rounds of both models (default 7)")
    how.add_argument("--warmup", type=int, metavar="N", help="untimed passes before them, of each model (default 1)")
    how.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    how.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, write the record if asked to."""
    spec = _spec(args)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: must be 1 or more")

    import torch

    from cropr.bench.throughput import Unsupported, measure

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("start", total=spec.rounds + 3)

        def tick(what: str) -> None:
            progress.update(task, description=what)
            progress.advance(task)

        try:
            record = measure(spec, device, tick)
        except Unsupported as error:
            if args.out is None:
                raise
            # A row that says why, not a gap: a table of several precisions is complete on every machine.
            _LOG.warning("not measured: %s", error)
            record = unmeasured(spec, str(error))
    if args.out is not None:
        write_record(args.out / RECORD, record)
    if record["metrics"]:
        show(record, Console())


def unmeasured(spec: BenchSpec, reason: str) -> dict[str, Any]:
    """The record of a row that this machine cannot run: no numbers, and ``unsupported`` with the reason."""
    return {
        "kind": "bench",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": {},
        "unsupported": reason,
    }


def show(record: dict[str, Any], console: Console) -> None:
    """Print a record."""
    metrics, spec, origin = record["metrics"], record["spec"], record["provenance"]
    size = spec["pruned_image_size"] or spec["image_size"]
    tokens = record["tokens"]
    title = f"{spec['model']['name']}, {spec['precision']}, batch {spec['batch_size']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "px", "tokens", "images/s", "IQR", "GMAC", "MB", "attention"):
        table.add_column(column, justify="left" if column in ("", "attention") else "right")
    fusion = spec["prune"]["fusion"]
    pruned = spec["prune"]["reducer"] + (f" + {fusion}" if fusion != "none" else "")
    rows = (
        ("base_", "unpruned", spec["image_size"], str(metrics["base_tokens"])),
        ("", pruned, size, f"{tokens[0]} to {min(tokens)}"),
    )
    for prefix, name, pixels, count in rows:
        attention = origin["attention"]["base" if prefix else "pruned"]
        table.add_row(
            name,
            str(pixels),
            count,
            f"{metrics[prefix + 'images_per_s']:.2f}",
            f"{metrics[prefix + 'images_per_s_iqr']:.2f}",
            f"{metrics[prefix + 'gmacs']:.2f}",
            f"{metrics[prefix + 'weights_mb']:.1f}",
            ", ".join(f"{calls} {kernel}" for kernel, calls in attention.items()),
        )
    console.print(table)
    console.print(
        f"speed-up {metrics['speedup']:.3f}x (95 % {metrics['speedup_low']:.3f} to {metrics['speedup_high']:.3f}), "
        f"bound {metrics['bound']:.3f}x, share of the bound {metrics['share_of_bound']:.3f}\n"
        f"{spec['rounds']} rounds on {origin['device']}, {origin['threads']} threads, "
        f"torch {origin['packages']['torch']}",
        soft_wrap=True,
        highlight=False,
    )


def _spec(args: argparse.Namespace) -> BenchSpec:
    """The spec that ``--spec`` or the flags describe."""
    given = [name for name in _FLAGS if getattr(args, name) is not None]
    if args.spec and given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--spec and {names}: the spec says it all")
    values = _read(args.spec) if args.spec else _from_flags(args)
    try:
        return BenchSpec.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, BenchSpec, "spec")) from None


def _from_flags(args: argparse.Namespace) -> dict[str, Any]:
    if not args.model:
        raise ValueError("name a model with --model (for example vit_large_patch16_224) or a spec with --spec")
    if args.schedule and args.rate is not None:
        raise ValueError(f"--rate {args.rate} and --schedule {args.schedule}: give one of them")
    reducer = args.reducer or "cropr"
    pruned = reducer != "none"
    if not pruned and (args.rate or args.schedule):
        raise ValueError("--reducer none prunes nothing; leave --rate and --schedule out")
    rate = 8 if args.rate is None else args.rate
    schedule = _parse(args.schedule, "--schedule") if args.schedule else {"constant": {"rate": rate * pruned}}
    fusion = args.fusion or ("llf" if pruned else "none")
    return {
        "model": {"name": args.model},
        "prune": {"reducer": reducer, "schedule": schedule, "fusion": fusion},
        **{name: value for name in _SIMPLE if (value := getattr(args, name)) is not None},
    }


def _read(text: str) -> dict[str, Any]:
    """Keys and values of ``--spec``: JSON, or a file that holds a spec or a record."""
    if text.lstrip().startswith("{"):
        return _parse(text, "--spec")
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"--spec {text}: no such file, and not JSON (it would begin with {{)")
    values = _parse(path.read_text(encoding="utf-8"), text)
    return values.get("spec", values)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is neither JSON nor YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, found {json.dumps(values)}")
    return values
