"""Measure throughput of a pruned model against the unpruned one, in one process, round by round in turn.

Weights are random, so nothing is downloaded. The output holds medians over rounds, the speed-up with a 95 % interval,
and the ratio of multiply-adds (MACs). Run nothing else on the machine meanwhile.

examples:
  python -m cropr bench --model vit_large_patch16_224 --reducer cropr --rate 8 --fusion llf
  python -m cropr bench --model vit_base_patch16_224 --schedule '{"stages": {"at": {"6": 50}}}' --fusion none
  python -m cropr bench --model vit_base_patch16_224 --precision bf16 --batch-size 8 --threads 2 --rounds 15
  python -m cropr bench --model vit_base_patch16_224 --reducer none --pruned-image-size 160   # a smaller image instead
  python -m cropr bench --model vit_base_patch16_224 --reducer none   # noise of the measurement
  python -m cropr bench --model vit_base_patch16_224 --precision amp_bf16 --attention flash --batch-size 64
  python -m cropr bench --model vit_base_patch16_224 --compile --channels-last
  python -m cropr bench --spec results/laptop/bench/3f2a91c07d/record.json --out again   # a row of a table again
"""

import argparse

from cropr.bench.specs import BenchSpec
from cropr.cli.spec_flags import add_measuring_flags, measured, number, origin, say, show_metrics, spec_from_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_flags(parser, BenchSpec)


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, write the record if asked to."""
    spec = spec_from_flags(args, BenchSpec)

    from cropr.bench.throughput import measure

    record = measured(args, spec, measure)
    if not (metrics := record["metrics"]):
        return
    batch, told = f"batch {metrics['batch_size']}", record["provenance"]
    if metrics["batch_size"] != spec.batch_size:
        batch += f" (out of memory with {spec.batch_size})"
    name = spec.model.name + (", encoder of a detector" if spec.detector else "")
    pruned = f"{spec.prune.reducer} + {spec.prune.fusion}"
    show_metrics(f"{name}, {spec.image_size} px, {spec.precision}, {batch}; value: {pruned}", metrics)
    if reason := told.get("heads_unsupported"):
        say(f"heads not measured: {reason}")
    kernels = [f"{name} {n} x {kernel}" for name, used in told["attention"].items() for kernel, n in used.items()]
    say(f"tokens: {number(record['tokens'])}; attention kernels: {', '.join(kernels) or 'none'}")
    say(f"{spec.rounds} rounds on {origin(record)}")
