"""Evaluate trained weights on the validation images of a folder.

examples:
  python -m cropr evaluate --run runs/3f2a91c07d/seed0 --data photos
  python -m cropr evaluate --run runs/3f2a91c07d/seed0 --data photos --deployed     folded queries, no training weights
  python -m cropr evaluate --spec spec.yaml --weights weights.safetensors --data imagenet --out result.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cropr.commands.spec_flags import make_spec, read_spec
from cropr.records import provenance, read_record, write_record
from cropr.specs import TrainSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="directory of a finished training run")
    parser.add_argument("--spec", metavar="FILE", help="a TrainSpec, with --weights instead of --run")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, training form")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="holds train/<class>/* and val/<class>/*"
    )
    parser.add_argument("--deployed", action="store_true", help="evaluate the inference form")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record there")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--seed", type=int, metavar="N", help="of random reducers (default: the run's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images (default 0)")


def run(args: argparse.Namespace) -> None:
    """Evaluate, print a table, write a record if asked to."""
    started = time.time()
    spec, weights, seed = _what(args)

    from cropr.data.imagenet import EvalBatches, load_splits
    from cropr.model import build_model
    from cropr.tasks.classification import evaluate, object_map
    from cropr.training.checkpoint import load_weights
    from cropr.training.distributed import start
    from cropr.training.run import patch_grid, verify_data

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be 1 or more")
    with start(args.device, args.threads) as world:
        splits = load_splits(args.data, spec.data.num_classes)
        fingerprint = verify_data(args.data, splits, spec.data)
        model = build_model(spec.model, spec.prune, spec.data.num_classes, spec.data.image_size)
        load_weights(model, weights)
        # As it was trained; the CPU has no fp16.
        precision = "fp32" if (world.device.type, spec.recipe.precision) == ("cpu", "fp16") else spec.recipe.precision
        batches = EvalBatches(
            splits[1], spec.data, args.batch_size, rank=world.rank, world=world.size, workers=args.workers
        )
        result = evaluate(
            (model.deploy() if args.deployed else model).to(world.device),
            batches,
            objects=object_map(batches.paths, spec.data, patch_grid(model)),
            device=world.device,
            total=world.sum,
            precision=precision,
            seed=seed,
        )
        if not world.leads:
            return
        record = {
            "kind": "evaluate",
            "id": spec.digest(),
            "spec": spec.model_dump(mode="json"),
            "seed": seed,
            "metrics": {**result.metrics, "deployed": int(args.deployed)},
            "tokens": list(model.token_trace),
            "series": {"relevance": result.relevance},
            "provenance": provenance(
                started, device=str(world.device), precision=precision, data_fingerprint=fingerprint
            ),
        }
    if args.out:
        write_record(args.out, record)
    _show(record, weights)


def _what(args: argparse.Namespace) -> tuple[TrainSpec, Path, int]:
    """Spec, weights and seed."""
    if args.run_dir and (args.spec or args.weights):
        raise ValueError("--run says which spec and weights; leave --spec and --weights out")
    if args.run_dir:
        from cropr.training.checkpoint import WEIGHTS

        record = read_record(args.run_dir) if args.run_dir.is_dir() else None
        if record is None:
            raise FileNotFoundError(f"--run {args.run_dir}: no such directory")
        if record["kind"] != "train":
            raise ValueError(f"--run {args.run_dir}: holds a record of kind {record['kind']}, not of a training run")
        seed = record["seed"] if args.seed is None else args.seed
        return make_spec(record["spec"]), args.run_dir / WEIGHTS, seed
    if not (args.spec and args.weights):
        raise ValueError("name what to evaluate: --run DIR, or --spec FILE with --weights FILE")
    return read_spec(args.spec), args.weights, args.seed or 0


def _show(record: dict, weights: Path) -> None:
    console = Console()
    console.print(str(weights), soft_wrap=True, highlight=False)
    table = Table("quantity", "value")
    metrics = record["metrics"]
    table.add_row("top-1", f"{metrics['top1']:.2f} %")
    table.add_row("top-5", f"{metrics['top5']:.2f} %")
    table.add_row("loss", f"{metrics['loss']:.4f}")
    table.add_row("images", str(metrics["val_images"]))
    table.add_row("tokens", ", ".join(map(str, record["tokens"])))
    console.print(table)
    if relevance := record["series"]["relevance"]:
        blocks = Table(
            "block", "kept patches on the object", "object's patches kept", title="where the kept tokens lie"
        )
        for row in relevance:
            blocks.add_row(str(row["block"]), f"{row['kept_on_object']:.1f} %", f"{row['object_kept']:.1f} %")
        console.print(blocks)
