"""Measure throughput of a pruned model against the unpruned one, in one process, round by round in turn.

Weights are random, so that nothing is downloaded. Printed are medians over rounds, the speed-up with a 95 % interval,
and the ratio of multiply-adds. Run nothing else on the machine meanwhile.

examples:
  python -m cropr bench --model vit_large_patch16_224 --reducer cropr --rate 8 --fusion llf
  python -m cropr bench --model vit_base_patch16_224 --schedule '{"stages": {"at": {"6": 50}}}' --fusion none
  python -m cropr bench --model vit_base_patch16_224 --precision bf16 --batch-size 8 --threads 2 --rounds 15
  python -m cropr bench --model vit_base_patch16_224 --reducer none --pruned-image-size 160    a smaller image instead
  python -m cropr bench --model vit_base_patch16_224 --reducer none                           how noisy is this machine?
  python -m cropr bench --model vit_base_patch16_224 --precision amp_bf16 --attention flash --batch-size 64
  python -m cropr bench --model vit_base_patch16_224 --compile --channels-last
  python -m cropr bench --spec results/laptop/bench/3f2a91c07d/record.json --out again         a row of a table again
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cropr.bench.specs import Attention, BenchSpec, Precision
from cropr.cli.pruning_flags import add_model_flags, add_schedule_flags, pruning
from cropr.cli.spec_flags import given, make_spec, read_spec, require_lone_spec
from cropr.records import RECORD, provenance, write_record

_LOG = logging.getLogger(__name__)
_SIMPLE = (
    "image_size", "pruned_image_size", "batch_size", "precision", "attention", "compile", "channels_last", "rounds",
    "warmup",
)  # fmt: skip
_FLAGS = ("model", "reducer", "rate", "schedule", "fusion", *_SIMPLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--spec", metavar="FILE", help="a BenchSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    model = add_model_flags(parser)
    add_schedule_flags(model)
    model.add_argument("--pruned-image-size", type=int, metavar="PX", help="of the second model, where it differs")
    how = parser.add_argument_group("measurement")
    how.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass (default 4)")
    how.add_argument(
        "--precision", choices=get_args(Precision), help="a cast of both models, or autocast: amp_* (default fp32)"
    )
    how.add_argument("--attention", choices=get_args(Attention), help="kernel to force (default auto: torch chooses)")
    how.add_argument("--compile", action="store_true", help="run both models through torch.compile")
    how.add_argument("--channels-last", action="store_true", help="memory layout of images and patch embedding")
    how.add_argument("--rounds", type=int, metavar="N", help="timed rounds of both models (default 7)")
    how.add_argument("--warmup", type=int, metavar="N", help="untimed passes before them, 2 to read memory (default 1)")
    add_device_flags(how)


def add_device_flags(group: argparse._ArgumentGroup) -> None:
    """``--device`` and ``--threads``, for all verbs that measure."""
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    group.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")


def choose_device(args: argparse.Namespace) -> str:
    """Set the number of threads that the flags name, and return the name of the device.

    Raises:
        ValueError: less than one thread.
    """
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: must be 1 or more")

    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal; call what it gives with a word on what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=steps)

        def tick(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        yield tick


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, write the record if asked to."""
    spec = _spec(args)
    device = choose_device(args)

    from cropr.bench.device import Unsupported
    from cropr.bench.throughput import measure

    with progress(spec.rounds + 4 + (spec.detector is not None)) as tick:
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
        "provenance": provenance(time.time(), precision=spec.precision),
    }


def show(record: dict[str, Any], console: Console) -> None:
    """Print a record."""
    metrics, spec, origin = record["metrics"], record["spec"], record["provenance"]
    table = Table(title=_title(spec, int(metrics["batch_size"])), title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "tokens", "images/s", "IQR", "GMAC", "MFU", "weights", "work MB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    fusion, tokens = spec["prune"]["fusion"], record["tokens"]
    pruned = spec["prune"]["reducer"] + (f" + {fusion}" if fusion != "none" else "")
    if spec["pruned_image_size"]:
        pruned += f", {spec['pruned_image_size']} px"
    rows = (("base_", "unpruned", str(metrics["base_tokens"])), ("", pruned, f"{tokens[0]} to {min(tokens)}"))
    for prefix, name, count in rows:
        memory = metrics.get(prefix + "working_memory_mb")
        table.add_row(
            name,
            count,
            f"{metrics[prefix + 'images_per_s']:.2f}",
            f"{metrics[prefix + 'images_per_s_iqr']:.2f}",
            f"{metrics[prefix + 'gmacs']:.2f}",
            f"{100 * metrics[prefix + 'mfu']:.0f} %",
            f"{metrics[prefix + 'weights_mb']:.1f}",
            "-" if memory is None else f"{memory:.1f}",
        )
    console.print(table)
    if "speedup_whole" in metrics:
        console.print(
            f"with pyramid and heads: {metrics['base_images_per_s_whole']:.3f} and {metrics['images_per_s_whole']:.3f} "
            f"images/s, speed-up {metrics['speedup_whole']:.3f}x (95 % {metrics['speedup_whole_low']:.3f} to "
            f"{metrics['speedup_whole_high']:.3f}), MAC ratio {metrics['mac_ratio_whole']:.3f}x",
            soft_wrap=True,
            highlight=False,
        )
    if reason := origin.get("heads_unsupported"):
        console.print(f"heads not measured: {reason}", soft_wrap=True, highlight=False)
    console.print(
        f"speed-up {metrics['speedup']:.3f}x (95 % {metrics['speedup_low']:.3f} to {metrics['speedup_high']:.3f}), "
        f"MAC ratio {metrics['mac_ratio']:.3f}, speed-up / MAC ratio {metrics['speedup_over_mac_ratio']:.3f}\n"
        f"attention: {_calls(origin['attention']['base'])} unpruned, {_calls(origin['attention']['pruned'])} pruned\n"
        f"{spec['rounds']} rounds on {origin['device']}, {origin['threads']} threads, "
        f"torch {origin['packages']['torch']}; a large matrix product runs at {metrics['matmul_gflops']:.0f} GFLOP/s",
        soft_wrap=True,
        highlight=False,
    )


def _calls(kernels: dict[str, int]) -> str:
    return ", ".join(f"{calls} {kernel}" for kernel, calls in kernels.items()) or "no kernel"


def _title(spec: dict[str, Any], batch_size: int) -> str:
    """Model and setting; a batch that was halved for want of memory says so."""
    batch = f"batch {batch_size}"
    if batch_size != spec["batch_size"]:
        batch += f" (out of memory with {spec['batch_size']})"
    extra = [f"{spec['attention']} attention"] if spec["attention"] != "auto" else []
    extra += [name.replace("_", " ") for name in ("compile", "channels_last") if spec[name]]
    name = spec["model"]["name"] + (", encoder of a detector" if spec["detector"] else "")
    return ", ".join([name, f"{spec['image_size']} px", spec["precision"], batch, *extra])


def _spec(args: argparse.Namespace) -> BenchSpec:
    """The spec that ``--spec`` or the flags describe."""
    require_lone_spec(args, _FLAGS)
    if args.spec:
        return read_spec(args.spec, kind=BenchSpec)
    if not args.model:
        raise ValueError("name a model with --model (for example vit_large_patch16_224) or a spec with --spec")
    values = {"model": {"name": args.model}, "prune": pruning(args), **given(args, *_SIMPLE)}
    return make_spec(values, kind=BenchSpec)
