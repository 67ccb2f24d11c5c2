"""Find the constant schedule that reaches a speed-up.

The prediction counts multiply-adds, so it is the same for every device. --verify measures the schedule on this device
and corrects it until the measured speed-up is within 3 % of the target, or says that the device cannot reach it. On a
GPU, plan with --align 8. Run nothing else on the machine meanwhile.

examples:
  python -m cropr plan --model vit_large_patch16_224 --targets 1.5
  python -m cropr plan --model vit_base_patch16_224 --targets 1.2 1.5 2 2.5 3 --verify --out plans
  python -m cropr plan --model vit_base_patch16_224 --targets 2 --fusion none --align 8 --precision bf16 --verify
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cropr.bench.specs import PlanSpec
from cropr.cli.bench import TEXTS
from cropr.cli.output import origin, progress, say, show_cells
from cropr.cli.spec_flags import add_fields, add_machine_flags, add_pruning_flags, choose_device, spec_from_flags
from cropr.records import RECORD, write_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--spec", metavar="FILE", help="a PlanSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    add_pruning_flags(parser, schedule=False)
    what = parser.add_argument_group("target and measurement")
    add_fields(what, PlanSpec, texts={"targets": "speed-ups to reach, one or several", **TEXTS})
    add_machine_flags(what)


def run(args: argparse.Namespace) -> None:
    """Plan, measure if asked to, print a table, write the record if asked to."""
    spec = spec_from_flags(args, PlanSpec, together=("verify",))
    device = choose_device(args)

    from cropr.bench.plan import measure

    with progress() as tick:
        record = measure(spec, device, tick)
    if args.out is not None:
        write_record(args.out / RECORD, record)
    keys = ("target", "schedule", "predicted", "speedup", "speedup_low", "speedup_high", "rounds", "reached")
    show_cells(f"{spec.model.name}, {spec.image_size} px; predicted: MAC ratio", record["cells"], keys)
    say(origin(record))
