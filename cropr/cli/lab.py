"""The throughput laboratory: one measurement a call, with a record that says of every combination what came out.

  sweep      throughput of a model and its pruned variants by precision, attention kernel and batch size
  blocks     latency of one block by token count: what a count costs that is not aligned
  profile    where the time of a forward pass goes
  scoring    tokens scored with one vector, against all queries scored and summed
  training   time of a training step, memory of training and of inference

Without --spec, the paper's ViT-L/16 and Cropr at R=8 (training: a ViT-S at R=16; scoring: EVA-02-L at 512 px, R=40).
What the device cannot run is in the record with the reason. Leave the machine alone while it runs.

examples:
  python -m cropr lab sweep --set precisions='["fp32", "amp_bf16", "bf16"]' --set attentions='["math", "flash"]'
  python -m cropr lab sweep --set model.name=vit_base_patch16_224 --set batch_sizes='[1, 8, 32, 128]'
  python -m cropr lab blocks --set tokens='[191, 192, 193, 197]' --set precision=bf16 --device cuda
  python -m cropr lab profile --set image_size=448 --out profile
  python -m cropr lab training --spec results/laptop/lab/0f2a91c07d/record.json --out again
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cropr.bench.specs import MEASURES, BlocksSpec, MicrobenchSpec, ProfileSpec, ScoringSpec, SweepSpec, TrainingSpec
from cropr.cli.bench import add_device_flags, choose_device, progress
from cropr.cli.spec_flags import make_spec, read_values
from cropr.records import RECORD, write_record

_AXES = ("variant", "precision", "attention", "batch_size")
_COLUMNS = {
    "images_per_s": ("images/s", "{:.2f}"),
    "speedup": ("speed-up", "{:.3f}x"),
    "speedup_over_mac_ratio": ("speed-up / MAC ratio", "{:.3f}"),
    "over_all_queries": ("over all queries", "{:.3f}x"),
    "gain": ("over first", "{:.2f}x"),
    "mfu": ("MFU", "{:.2f}"),
    "block_s": ("block s", "{:.5f}"),
    "total_s": ("s a pass", "{:.3f}"),
    "pruning_share": ("pruning's share", "{:.4f}"),
    "step_ms": ("ms a step", "{:.0f}"),
    "training_memory_mb": ("training MB", "{:.0f}"),
    "inference_memory_mb": ("inference MB", "{:.0f}"),
}
"""Metrics of a cell that the terminal shows: title and format. The record has more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("measure", choices=sorted(MEASURES), help="what to measure")
    parser.add_argument("--spec", metavar="FILE", help="its specification as JSON or YAML file, or as JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of it, such as batch_size=8"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    add_device_flags(parser.add_argument_group("machine"))


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, write the record if asked to."""
    spec = _spec(args)
    device = choose_device(args)
    from cropr.bench.microbench import measure

    with progress(_steps(spec)) as tick:
        record = measure(spec, device, tick)
    if args.out is not None:
        write_record(args.out / RECORD, record)
    show(record, Console())


def show(record: dict[str, Any], console: Console) -> None:
    """Print the cells of a record, then the reasons of those that could not run."""
    spec, origin, cells = record["spec"], record["provenance"], record["cells"]
    shown = [key for key in _COLUMNS if any(key in cell.get("metrics", {}) for cell in cells)]
    axes = {key: {_name(cell, key): None for cell in cells if key in cell} for key in _AXES}
    names = [key for key, values in axes.items() if len(values) > 1]
    same = [f"{key.replace('_size', '')} {next(iter(values))}" for key, values in axes.items() if len(values) == 1]
    title = ", ".join([f"{spec['measure']}: {spec['model']['name']}", f"{spec['image_size']} px", *same])
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in [*names, "tokens", *(_COLUMNS[key][0] for key in shown)]:
        table.add_column(
            column.replace("_size", ""), justify="left" if column in names else "right", no_wrap=column == "tokens"
        )
    for cell in cells:
        metrics = cell.get("metrics", {})
        tokens = cell.get("tokens", "")
        count = f"{tokens[0]} to {min(tokens)}" if isinstance(tokens, list) else str(tokens)
        numbers = [_COLUMNS[key][1].format(metrics[key]) if key in metrics else "-" for key in shown]
        table.add_row(*(_name(cell, key) for key in names), count, *numbers)
    console.print(table)
    for reason in dict.fromkeys(cell["unsupported"] for cell in cells if "unsupported" in cell):
        console.print(f"not measured: {reason}", soft_wrap=True, highlight=False)
    console.print(
        f"{origin['device']}, {origin['threads']} threads, torch {origin['packages']['torch']}, "
        f"{origin['wall_s']:.0f} s",
        soft_wrap=True,
        highlight=False,
    )


def _name(cell: dict[str, Any], key: str) -> str:
    """A cell's place on an axis; a batch that was halved for want of memory says so."""
    fitted = cell.get("metrics", {}).get("batch_size", cell.get("batch_size"))
    if key != "batch_size" or fitted == cell["batch_size"]:
        return str(cell[key])
    return f"{fitted} (out of memory with {cell['batch_size']})"


def _spec(args: argparse.Namespace) -> MicrobenchSpec:
    """The specification that the flags describe.

    Raises:
        ValueError: it is of another measurement, or holds what is not allowed.
    """
    values = read_values(args.spec) if args.spec else {}
    if values.setdefault("measure", args.measure) != args.measure:
        raise ValueError(f"lab {args.measure}: --spec is of a measurement of kind {values['measure']}")
    return make_spec(values, args.set, MEASURES[args.measure])


def _steps(spec: MicrobenchSpec) -> int:
    """How often the progress bar advances."""
    if isinstance(spec, SweepSpec):
        cells = len(spec.precisions) * len(spec.attentions) * (1 + len(spec.variants))
        return 1 + len(spec.batch_sizes) * (cells + spec.rounds)
    if isinstance(spec, BlocksSpec):
        return len(spec.tokens) + spec.rounds
    if isinstance(spec, ScoringSpec):
        return 5 + spec.rounds
    assert isinstance(spec, ProfileSpec | TrainingSpec)
    return 2 + len(spec.variants) + (spec.rounds if isinstance(spec, TrainingSpec) else 0)
