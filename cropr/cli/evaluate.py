"""Evaluate trained weights on the validation images of a folder, or a file of detections against its truth.

examples:
  python -m cropr evaluate --run runs/3f2a91c07d/seed0 --data photos
  python -m cropr evaluate --run runs/3f2a91c07d/seed0 --data photos --deployed     folded queries, no training weights
  python -m cropr evaluate --spec spec.yaml --weights weights.safetensors --data imagenet --out result.json
  python -m cropr evaluate --run runs/8d21b0c9aa/seed0 --data coco --save-predictions predictions.json
  python -m cropr evaluate --predictions predictions.json --annotations coco/annotations/instances_val2017.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cropr.cli.spec_flags import make_spec, read_spec
from cropr.records import provenance, read_record, write_record
from cropr.training.specs import TrainSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="directory of a finished training run")
    parser.add_argument("--spec", metavar="FILE", help="a TrainSpec, with --weights instead of --run")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, training form")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the images, in the layout of the task")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="detections in COCO's result format, instead of a model"
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO's truth, with --predictions")
    parser.add_argument(
        "--save-predictions",
        type=Path,
        metavar="FILE",
        help="of detection: write what was found, as COCO's result file",
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
    if args.predictions or args.annotations:
        _score(args, started)
        return
    spec, weights, seed = _what(args)
    if args.data is None:
        raise ValueError("name the images with --data DIR")
    if args.save_predictions and spec.task != "detection":
        raise ValueError(f"--save-predictions: {spec.task} has no file of results; only detection has")

    from cropr.data.loading import Share
    from cropr.tasks import TASKS, open_task
    from cropr.tasks.base import EvaluationSettings
    from cropr.training.checkpoint import load_weights
    from cropr.training.distributed import start

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be 1 or more")
    with start(args.device, args.threads) as world:
        task = open_task(spec, args.data)
        model = task.build()
        load_weights(model, weights)
        # As it was trained; the CPU has no fp16.
        precision = "fp32" if (world.device.type, spec.recipe.precision) == ("cpu", "fp16") else spec.recipe.precision
        settings = EvaluationSettings(
            batch_size=args.batch_size,
            device=world.device,
            precision=precision,
            seed=seed,
            total=world.sum,
            gather=world.gather,
            predictions=args.save_predictions if world.leads else None,
        )
        share = Share(rank=world.rank, world=world.size, workers=args.workers)
        result = task.evaluate((model.deploy() if args.deployed else model).to(world.device), settings, **share)
        if not world.leads:
            return
        record = {
            "kind": "evaluate",
            "id": spec.digest(),
            "spec": spec.model_dump(mode="json"),
            "seed": seed,
            "metrics": {**result.metrics, "deployed": int(args.deployed)},
            "tokens": list(model.token_trace),
            "series": result.series,
            "provenance": provenance(
                started, device=str(world.device), precision=precision, data_fingerprint=task.fingerprint
            ),
        }
    if args.out:
        write_record(args.out, record)
    _show(record, weights, TASKS[spec.task].metrics)


def _score(args: argparse.Namespace, started: float) -> None:
    """Detections that lie in a file."""
    if not (args.predictions and args.annotations):
        raise ValueError("--predictions and --annotations go together: the detections, and the truth")
    if args.run_dir or args.spec or args.weights or args.data:
        raise ValueError("--predictions needs no model and no images; leave --run, --spec, --weights and --data out")

    from cropr.tasks.detection import FIGURES
    from cropr.tasks.detection.evaluation import score_file

    metrics = score_file(args.predictions, args.annotations)
    if args.out:
        files = {"predictions": str(args.predictions), "annotations": str(args.annotations)}
        write_record(args.out, {"kind": "score", "files": files, "metrics": metrics, "provenance": provenance(started)})
    kinds = [kind for kind in ("box", "mask") if any(name.startswith(kind) for name in metrics)]
    table = Table("quantity, %", *kinds, title=str(args.predictions))
    for figure in FIGURES:
        values = (metrics.get(f"{kind}_{figure}") for kind in kinds)
        table.add_row(figure, *("no such object" if value is None else f"{value:.2f}" for value in values))
    Console().print(table)


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
        raise ValueError(
            "name what to evaluate: --run DIR, or --spec FILE with --weights FILE, "
            "or --predictions FILE with --annotations FILE"
        )
    return read_spec(args.spec), args.weights, args.seed or 0


def _show(record: dict, weights: Path, labels: Mapping[str, str]) -> None:
    console = Console()
    console.print(str(weights), soft_wrap=True, highlight=False)
    table = Table("quantity", "value")
    for name, value in record["metrics"].items():
        table.add_row(*((labels[name], f"{value:.2f} %") if name in labels else (name, f"{value:.6g}")))
    table.add_row("tokens", ", ".join(map(str, record["tokens"])))
    console.print(table)
    if relevance := record["series"].get("relevance"):
        blocks = Table(
            "block", "kept patches on the object", "object's patches kept", title="where the kept tokens lie"
        )
        for row in relevance:
            blocks.add_row(str(row["block"]), f"{row['kept_on_object']:.1f} %", f"{row['object_kept']:.1f} %")
        console.print(blocks)
