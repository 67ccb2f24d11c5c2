"""Export a deployed model as torch.export (.pt2) and ONNX, run the ONNX file, and compare it with PyTorch.

The files have a dynamic batch and a fixed image size; inputs are normalised images, outputs the logits and the indices
of the kept patches, a block each. The ONNX file is run in onnxruntime: it must keep the same tokens and give logits
within 1e-4. Reducers that draw random numbers are refused. Needs: pip install onnx onnxscript onnxruntime

examples:
  python -m cropr export --run results/laptop/runs/3f2a91c07d/seed0 --out exported
  python -m cropr export --model vit_base_patch16_224 --rate 8 --out exported            random weights
  python -m cropr export --model vit_base_patch16_224 --rate 8 --out exported --bench    onnxruntime's speed-up, too
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cropr.bench.specs import BenchSpec
from cropr.cli.bench import progress
from cropr.cli.pruning_flags import add_model_flags, add_schedule_flags, pruning
from cropr.cli.spec_flags import make_spec
from cropr.records import RECORD, package_versions, provenance, read_record, write_record
from cropr.training.specs import TrainSpec

if TYPE_CHECKING:
    from cropr.pruning.model import DeployedViT, PrunedViT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="directory of a finished training run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model.onnx, model.pt2 and record.json")
    add_schedule_flags(add_model_flags(parser))
    how = parser.add_argument_group("check and clock")
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="images of both (default 4)")
    how.add_argument("--rounds", type=int, default=5, metavar="N", help="readings of every clock (default 5)")
    how.add_argument("--bench", action="store_true", help="also time the unpruned model in onnxruntime")
    how.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")


def run(args: argparse.Namespace) -> None:
    """Export, check, print, write the record."""
    started = time.time()
    for name in ("batch_size", "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more")

    import torch

    from cropr.bench.deployment import export
    from cropr.export import need

    need()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    spec, model = _trained(args) if args.run_dir else _random(args)
    with progress(args.rounds + 8) as tick:
        found = export(model, args.out, args.batch_size, args.rounds, args.bench, tick)
    packages = {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    record = {
        "kind": "export",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        **found,
        "tokens": list(model.model.token_trace),
        "provenance": provenance(started, precision="fp32", packages=package_versions() | packages),
    }
    write_record(args.out / RECORD, record)
    show(record, args.out, Console())


def show(record: dict[str, Any], folder: Path, console: Console) -> None:
    """Print a record."""
    metrics = record["metrics"]
    table = Table("file", "MB", title=str(folder), title_justify="left")
    table.add_row("model.onnx", f"{metrics['onnx_mb']:.1f}")
    table.add_row("model.pt2", f"{metrics['pt2_mb']:.1f}")
    console.print(table)
    tokens = record["tokens"]
    console.print(
        f"agreement: same tokens for {metrics['same_tokens']} of {metrics['images']} images, "
        f"logits within {metrics['logits_difference']:.1e}\n"
        f"graph: {tokens[0]} to {min(tokens)} tokens, {metrics['topk']} Top-K of k up to {metrics['largest_k']}, "
        f"{metrics['reducing_scatters']} scatters with a reduction\n"
        f"latency of {metrics['images']} images: onnxruntime {metrics['onnx_ms']:.1f} ms, "
        f"PyTorch {metrics['torch_ms']:.1f} ms",
        soft_wrap=True,
        highlight=False,
    )
    if "speedup" in metrics:
        console.print(
            f"speed-up in onnxruntime {metrics['speedup']:.3f}x (95 % {metrics['speedup_low']:.3f} to "
            f"{metrics['speedup_high']:.3f}), MAC ratio {metrics['mac_ratio']:.3f}, "
            f"speed-up / MAC ratio {metrics['speedup_over_mac_ratio']:.3f}",
            soft_wrap=True,
            highlight=False,
        )


def _trained(args: argparse.Namespace) -> tuple[TrainSpec, DeployedViT]:
    """The model of a training run."""
    given = [name for name in ("model", "reducer", "rate", "schedule", "fusion", "image_size") if getattr(args, name)]
    if given:
        raise ValueError(f"--run and --{given[0].replace('_', '-')}: the run says what the model is")
    if not args.run_dir.is_dir():
        raise FileNotFoundError(f"--run {args.run_dir}: no such directory")
    record = read_record(args.run_dir)
    if record["kind"] != "train":
        raise ValueError(f"--run {args.run_dir}: holds a record of kind {record['kind']}, not of a training run")
    spec: TrainSpec = make_spec(record["spec"])
    if spec.task != "classification":
        raise ValueError(f"--run {args.run_dir}: a run of {spec.task}; exported are image classifiers")

    from cropr.pruning.model import build_model
    from cropr.training.checkpoint import WEIGHTS, load_weights

    model: PrunedViT = build_model(spec.model, spec.prune, spec.data.num_classes, spec.data.image_size)
    load_weights(model, args.run_dir / WEIGHTS)
    return spec, model.deploy()


def _random(args: argparse.Namespace) -> tuple[BenchSpec, DeployedViT]:
    """A model with random weights, by name."""
    if not args.model:
        raise ValueError("name what to export: --run DIR, or --model NAME for random weights")
    size = {"image_size": args.image_size} if args.image_size is not None else {}
    spec: BenchSpec = make_spec({"model": {"name": args.model}, "prune": pruning(args), **size}, kind=BenchSpec)

    import torch

    from cropr.bench.models import build_on_meta, random_weights

    model: DeployedViT = build_on_meta(spec.model, spec.prune, spec.image_size).deploy()
    random_weights(model, "cpu", torch.float32)
    return spec, model
