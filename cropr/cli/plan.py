"""Find the schedule that reaches a target on this device with the fewest tokens pruned.

The parts of a forward pass are timed once, as they run in it, at several token counts, and kept on disk by device,
model, precision, batch and threads. From that, latency of every schedule of three families is predicted: constant
(R tokens after every block), stages (R after a quarter, half and three quarters) and early (once, after an eighth of
the blocks). Of the first family that reaches the target, the schedule that prunes fewest is taken. --verify measures
it. Leave the machine alone while it runs, and plan with --align 8 on a GPU.

examples:
  python -m cropr plan --model vit_large_patch16_224 --targets 1.5
  python -m cropr plan --model vit_base_patch16_224 --targets 1.2 1.5 2 2.5 3 --verify --out plans
  python -m cropr plan --model vit_base_patch16_224 --quantity latency_ms --targets 40 --batch-size 1
  python -m cropr plan --model vit_base_patch16_224 --targets 2 --gpus config/published/devices.csv
  python -m cropr plan --model vit_large_patch16_224 --quantity flops --targets 0.6 --family stages --align 8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from cropr.bench.specs import PlanSpec, Precision
from cropr.cli.bench import add_device_flags, choose_device, progress
from cropr.cli.pruning_flags import add_model_flags
from cropr.cli.spec_flags import given, make_spec, read_spec, require_lone_spec
from cropr.records import RECORD, write_record

_SIMPLE = ("image_size", "batch_size", "precision", "family", "align", "quantity", "targets", "rounds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--spec", metavar="FILE", help="a PlanSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    parser.add_argument(
        "--gpus", type=Path, metavar="FILE", help="also predict the paper's speed-ups on these data sheets' GPUs"
    )
    add_model_flags(parser)
    what = parser.add_argument_group("target")
    what.add_argument("--targets", type=float, nargs="+", metavar="X", help="one or several (default 1.5)")
    what.add_argument(
        "--quantity",
        choices=["speedup", "latency_ms", "flops"],
        help="what they are: speed-up, milliseconds a batch, share of the unpruned FLOPs (default speedup)",
    )
    what.add_argument("--family", choices=["auto", "constant", "stages", "early"], help="of schedules (default auto)")
    what.add_argument("--align", type=int, metavar="N", help="token counts are multiples of this (default 1: any)")
    how = parser.add_argument_group("measurement")
    how.add_argument("--verify", action="store_true", help="also measure the plans")
    how.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass (default 4)")
    how.add_argument("--precision", choices=get_args(Precision), help="a cast, or autocast: amp_* (default fp32)")
    how.add_argument("--rounds", type=int, metavar="N", help="readings of every clock (default 7)")
    add_device_flags(how)
    how.add_argument(
        "--cache", type=Path, metavar="DIR", help="of what was timed (default CROPR_CACHE, ~/.cache/cropr)"
    )
    how.add_argument("--fresh", action="store_true", help="time blocks again, whatever is in the cache")


def run(args: argparse.Namespace) -> None:
    """Plan, measure if asked to, print a table, write the record."""
    spec = _spec(args)
    device = choose_device(args)

    from cropr.bench import planner

    steps = spec.rounds + 4 + spec.verify * (spec.rounds + 2 + len(spec.targets))
    with progress(steps) as tick:
        record = planner.run(spec, device, args.cache, args.fresh, args.gpus, tick)
    if args.out is not None:
        write_record(args.out / RECORD, record)
    show(record, Console())


def show(record: dict[str, Any], console: Console) -> None:
    """Print a record."""
    spec = record["spec"]
    fusion = "" if spec["prune"]["fusion"] == "none" else f" + {spec['prune']['fusion']}"
    title = (
        f"{spec['model']['name']}, {spec['prune']['reducer']}{fusion}, {spec['precision']}, batch {spec['batch_size']}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("target", "family", "schedule", "tokens", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column in ("family", "schedule") else "right")
    for line in record["series"]["plans"]:
        table.add_row(
            _written(spec["quantity"], line["target"]),
            line["family"],
            line["described"],
            f"{line['tokens'][0]} to {min(line['tokens'])}",
            *_values(spec["quantity"], line),
        )
    console.print(table)
    reach = ", ".join(
        f"{line['family']} {line['predicted_speedup']:.2f}x ({line['described']})" for line in record["series"]["reach"]
    )
    if record["series"]["gpus"]:
        console.print(_gpus(record["series"]["gpus"]))
    origin = record["provenance"]
    console.print(
        f"largest predicted speed-up by family: {reach}\n"
        f"{spec['rounds']} rounds on {origin['device']}, {origin['threads']} threads, "
        f"torch {origin['packages']['torch']}",
        soft_wrap=True,
        highlight=False,
    )


def _written(quantity: str, value: float) -> str:
    return {"speedup": f"{value:g}x", "latency_ms": f"{value:g} ms", "flops": f"{value:g} of the FLOPs"}[quantity]


def _values(quantity: str, line: dict[str, Any]) -> tuple[str, str, str]:
    """Predicted speed-up, and what the target is about where that is something else; measured; and by how much off."""
    predicted = f"{line['predicted_speedup']:.3f}x"
    if quantity != "speedup":
        predicted += f", {_written(quantity, float(format(line['predicted_' + quantity], '.4g')))}"
    if "measured_speedup" not in line:
        return predicted, "", ""
    low, high = line["measured_speedup_low"], line["measured_speedup_high"]
    return predicted, f"{line['measured_speedup']:.3f} ({low:.3f} to {high:.3f})", f"{line['error_percent']:+.1f} %"


def _gpus(lines: list[dict[str, Any]]) -> Table:
    """Predictions for GPUs that are not at hand."""
    table = Table(title="Predicted, not measured: roofline", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("row", "device", "speed-up", "for other efficiencies", "bound"):
        table.add_column(column, justify="left" if column in ("row", "device") else "right")
    for line in lines:
        numbers = (f"{line['speedup']:.2f}x", f"{line['low']:.2f} to {line['high']:.2f}x", f"{line['bound']:.2f}x")
        table.add_row(line["label"], line["device"], *numbers)
    return table


def _spec(args: argparse.Namespace) -> PlanSpec:
    """The spec that ``--spec`` or the flags describe."""
    require_lone_spec(args, ("model", "reducer", "fusion", *_SIMPLE))
    verify = {"verify": True} if args.verify else {}
    if args.spec:
        return make_spec(read_spec(args.spec, kind=PlanSpec).model_dump() | verify, kind=PlanSpec)
    if not args.model:
        raise ValueError("name a model with --model (for example vit_large_patch16_224) or a spec with --spec")
    values = {
        "model": {"name": args.model},
        "prune": {"reducer": args.reducer or "cropr", "fusion": args.fusion or "llf"},
        **given(args, *_SIMPLE),
    }
    return make_spec(values | verify, kind=PlanSpec)
