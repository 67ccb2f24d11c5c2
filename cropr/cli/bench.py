"""Measure throughput of a pruned model against the unpruned one, in one process, round by round in turn.

Weights are random, so nothing is downloaded. The output holds medians over rounds, the speed-up with a 95 % interval,
and the ratio of multiply-adds (MACs). Run nothing else on the machine meanwhile.

examples:
  python -m cropr bench --model vit_large_patch16_224 --reducer cropr --rate 8 --fusion llf
  python -m cropr bench --model vit_base_patch16_224 --schedule '{"stages": {"at": {"6": 50}}}' --fusion none
  python -m cropr bench --model vit_base_patch16_224 --precision bf16 --batch-size 8 --threads 2 --rounds 15
  python -m cropr bench --model vit_base_patch16_224 --reducer none --pruned-image-size 160    a smaller image instead
  python -m cropr bench --model vit_base_patch16_224 --reducer none                           noise of the measurement
  python -m cropr bench --model vit_base_patch16_224 --precision amp_bf16 --attention flash --batch-size 64
  python -m cropr bench --model vit_base_patch16_224 --compile --channels-last
  python -m cropr bench --spec results/laptop/bench/3f2a91c07d/record.json --out again         a row of a table again
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from cropr.bench.specs import BenchSpec
from cropr.cli.output import origin, progress, say, show_metrics
from cropr.cli.spec_flags import add_fields, add_machine_flags, add_pruning_flags, choose_device, spec_from_flags
from cropr.records import RECORD, provenance, write_record

_LOG = logging.getLogger(__name__)
TEXTS = {
    "image_size": "pixels a side of the images",
    "batch_size": "images per forward pass",
    "precision": "a cast of the models, or autocast: amp_*",
    "attention": "attention kernel to force; auto: torch chooses",
    "rounds": "timed rounds of all models",
    "warmup": "untimed passes before them; 2 to read memory",
}
"""Help of the flags of a measurement."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--spec", metavar="FILE", help="a BenchSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    add_pruning_flags(parser)
    how = parser.add_argument_group("measurement")
    add_fields(how, BenchSpec, texts=TEXTS)
    add_machine_flags(how)


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, write the record if asked to."""
    spec = spec_from_flags(args, BenchSpec)
    device = choose_device(args)

    from cropr.bench.device import Unsupported
    from cropr.bench.throughput import measure

    with progress() as tick:
        try:
            record = measure(spec, device, tick)
        except Unsupported as error:
            if args.out is None:
                raise
            # A record without numbers that gives the reason: a table of several precisions is complete on any device.
            _LOG.warning("not measured: %s", error)
            record = {
                "kind": "bench",
                "id": spec.digest(),
                "spec": spec.model_dump(mode="json"),
                "metrics": {},
                "unsupported": str(error),
                "provenance": provenance(time.time(), precision=spec.precision),
            }
    if args.out is not None:
        write_record(args.out / RECORD, record)
    if record["metrics"]:
        show(record)


def show(record: dict[str, Any]) -> None:
    """Print a record."""
    metrics, spec, told = record["metrics"], record["spec"], record["provenance"]
    batch = f"batch {metrics['batch_size']}"
    if metrics["batch_size"] != spec["batch_size"]:
        batch += f" (out of memory with {spec['batch_size']})"
    name = spec["model"]["name"] + (", encoder of a detector" if spec["detector"] else "")
    pruned = f"{spec['prune']['reducer']} + {spec['prune']['fusion']}"
    show_metrics(f"{name}, {spec['image_size']} px, {spec['precision']}, {batch}; value: {pruned}", metrics)
    if reason := told.get("heads_unsupported"):
        say(f"heads not measured: {reason}")
    say(f"tokens: {record['tokens'][0]} to {min(record['tokens'])}; attention kernels: {told['attention']}")
    say(f"{spec['rounds']} rounds on {origin(record)}")
