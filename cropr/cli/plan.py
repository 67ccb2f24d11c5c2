"""Find the schedules that reach target speed-ups on this device.

Without --verify, a target is a ratio of multiply-adds. With --verify, schedules are measured and corrected until the
measured speed-up is within 3 % of the target, or the reason is given why no schedule reaches it.

examples:
  python -m cropr plan --model vit_large_patch16_224 --targets 1.5
  python -m cropr plan --model vit_base_patch16_224 --targets 1.2 1.5 2 2.5 3 --verify --out plans
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

_SIMPLE = ("image_size", "batch_size", "precision", "align", "targets", "rounds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--spec", metavar="FILE", help="a PlanSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    add_model_flags(parser)
    what = parser.add_argument_group("target")
    what.add_argument("--targets", type=float, nargs="+", metavar="X", help="one or several (default 1.5)")
    what.add_argument("--align", type=int, metavar="N", help="token counts are multiples of this (default 1: any)")
    how = parser.add_argument_group("measurement")
    how.add_argument("--verify", action="store_true", help="measure the schedules and correct them")
    how.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass (default 4)")
    how.add_argument("--precision", choices=get_args(Precision), help="a cast, or autocast: amp_* (default fp32)")
    how.add_argument("--rounds", type=int, metavar="N", help="readings of every clock (default 7)")
    add_device_flags(how)


def run(args: argparse.Namespace) -> None:
    """Plan, measure if asked to, print a table, write the record."""
    spec = _spec(args)
    device = choose_device(args)

    from cropr.bench.plan import measure

    with progress(1 + spec.verify * (spec.rounds + 2 + len(spec.targets))) as tick:
        record = measure(spec, device, tick)
    if args.out is not None:
        write_record(args.out / RECORD, record)
    show(record, Console())


def show(record: dict[str, Any], console: Console) -> None:
    """Print a record."""
    spec = record["spec"]
    title = (
        f"{spec['model']['name']}, {spec['prune']['reducer']}, fusion {spec['prune']['fusion']}, {spec['precision']}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("target", "schedule", "MAC ratio", "measured speed-up"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for cell in record["cells"]:
        found = cell["metrics"]
        measured = "{speedup:.3f} [{speedup_low:.3f}, {speedup_high:.3f}]".format(**found) if found else "-"
        ratio = "-" if cell["predicted"] is None else f"{cell['predicted']:.3f}"
        table.add_row(f"{cell['target']:g}", cell["schedule"] or "-", ratio, measured)
    console.print(table)
    for cell in record["cells"]:
        if cell["reason"]:
            console.print(f"target {cell['target']:g}: {cell['reason']}", soft_wrap=True, highlight=False)


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
