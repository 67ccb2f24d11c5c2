"""Find the schedule that reaches a speed-up: a constant rate or, if none does, one stage after block 3.

The prediction counts multiply-adds, so it is the same for every device. --verify measures the schedule on this device
and corrects it until the measured speed-up is within 3 % of the target, or says that the device cannot reach it. On a
GPU, plan with --align 8. Run nothing else on the machine meanwhile.

examples:
  python -m cropr plan --model vit_large_patch16_224 --targets 1.5
  python -m cropr plan --model vit_base_patch16_224 --targets 1.2 1.5 2 2.5 3 --verify --out plans
  python -m cropr plan --model vit_base_patch16_224 --targets 2 --fusion none --align 8 --precision bf16 --verify
"""

import argparse

from cropr.bench.specs import PlanSpec
from cropr.cli.spec_flags import add_measuring_flags, measured, show_cells, spec_from_flags

_KEYS = ("target", "schedule", "predicted", "speedup", "speedup_low", "speedup_high", "rounds", "reached")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_flags(parser, PlanSpec, schedule=False)


def run(args: argparse.Namespace) -> None:
    """Plan, measure if asked to, print a table, write the record if asked to."""
    spec = spec_from_flags(args, PlanSpec, together=("verify",))

    from cropr.bench.plan import measure

    record = measured(args, spec, measure)
    show_cells(f"{spec.model.name}, {spec.image_size} px; predicted: MAC ratio", record, _KEYS)
