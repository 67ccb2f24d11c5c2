"""Evaluate trained weights on the validation images of a folder, or a file of detections against its truth.

examples:
  python -m cropr evaluate --run runs/3f2a91c07d/seed0 --data photos
  python -m cropr evaluate --run runs/3f2a91c07d/seed0 --data photos --deployed   # folded queries, no training weights
  python -m cropr evaluate --spec spec.yaml --weights weights.safetensors --data imagenet --out result.json
  python -m cropr evaluate --run runs/8d21b0c9aa/seed0 --data coco --save-predictions predictions.json
  python -m cropr evaluate --predictions predictions.json --annotations coco/annotations/instances_val2017.json
"""

import argparse
import time
from pathlib import Path
from typing import Any

import cropr.cli.spec_flags as flags
from cropr.records import make_record, provenance, write_record
from cropr.tasks import TASKS, TrainSpec, open_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_run_flags(parser)
    parser.add_argument("--spec", metavar="FILE", help="a TrainSpec, with --weights instead of --run")
    for flag, text in (
        ("--weights", "safetensors, training form"),
        ("--predictions", "detections in COCO's result format, instead of a model"),
        ("--annotations", "COCO's truth, with --predictions"),
        ("--save-predictions", "of detection: write what was found, as COCO's result file"),
        ("--out", "write a record there"),
    ):
        parser.add_argument(flag, type=Path, metavar="FILE", help=text)
    parser.add_argument("--deployed", action="store_true", help="evaluate the deployed model")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    flags.add_machine_flags(parser, workers=True)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print a table, write a record if asked to."""
    started = time.time()
    if args.predictions or args.annotations:
        return _score(args, started)
    spec, weights, seed = _named(args)
    if args.data is None:
        raise ValueError("name the images with --data DIR")
    if args.save_predictions and spec.task != "detection":
        raise ValueError(f"--save-predictions: {spec.task} has no file of results; only detection has")
    flags.require_positive(args, "batch_size")

    from cropr.distributed import start
    from cropr.tasks.base import EvaluationSettings, write_arrays
    from cropr.training.checkpoint import load_weights

    with start(args.device, args.threads) as world:
        task = open_task(spec, args.data)
        model = task.build()
        load_weights(model, weights)
        # As it was trained; the CPU has no fp16.
        precision = "fp32" if (world.device.type, spec.recipe.precision) == ("cpu", "fp16") else spec.recipe.precision
        how: dict[str, Any] = {"batch_size": args.batch_size, "precision": precision, "seed": seed}
        predictions = args.save_predictions if world.leads else None
        settings = EvaluationSettings(world=world, workers=args.workers, predictions=predictions, **how)
        result = task.evaluate((model.deploy() if args.deployed else model).to(world.device), settings)
        if not world.leads:
            return None
        metrics, tokens = {**result.metrics, "deployed": int(args.deployed)}, list(model.token_trace)
        if args.out:
            arrays = args.out.with_suffix(".npz")
            write_arrays(arrays, result.images)
            found = {"seed": seed, "metrics": metrics, "tokens": tokens, "series": result.series}
            found["per_image"] = arrays.name
            origin = {"device": str(world.device), "precision": precision, "data_fingerprint": task.fingerprint}
            write_record(args.out, make_record("evaluate", spec, started, found, **origin))
    flags.show_metrics(str(weights), metrics, TASKS[spec.task].metrics)
    flags.say(f"tokens: {', '.join(map(str, tokens))}")
    if relevance := result.series.get("relevance"):
        flags.show_table("where the kept tokens lie: % of the kept patches, % of the object's patches", relevance)
    return None


def _named(args: argparse.Namespace) -> tuple[TrainSpec, Path, int]:
    """Specification, weights and seed of what is evaluated."""
    if args.run_dir:
        flags.require_alone(args, "run", ("spec", "weights"))
        return flags.trained_run(args)
    if args.spec and args.weights and not args.best:
        return flags.make_spec(args.spec), args.weights, args.seed or 0
    own = "--spec FILE with --weights FILE, or --predictions FILE with --annotations FILE"
    raise ValueError(f"name what to evaluate: --run DIR, or {own}")


def _score(args: argparse.Namespace, started: float) -> None:
    """Detections that lie in a file."""
    if not (args.predictions and args.annotations):
        raise ValueError("--predictions and --annotations go together: the detections, and the truth")
    others = ("run_dir", "spec", "weights", "data", "save_predictions", "deployed", "best")
    if extra := [f"--{name.removesuffix('_dir').replace('_', '-')}" for name in others if getattr(args, name)]:
        raise ValueError(f"--predictions needs no model and no images; leave {', '.join(extra)} out")

    from cropr.tasks.detection.evaluation import score_file

    metrics = score_file(args.predictions, args.annotations)
    if args.out:
        files = {"predictions": str(args.predictions), "annotations": str(args.annotations)}
        write_record(args.out, {"kind": "score", "files": files, "metrics": metrics, "provenance": provenance(started)})
    labels = {name: text for name, text in TASKS["detection"].metrics.items() if f"{name.split('_')[0]}_ap" in metrics}
    flags.show_metrics(str(args.predictions), {name: metrics.get(name) for name in labels}, labels)
