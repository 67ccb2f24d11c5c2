"""Export a deployed model as torch.export (.pt2) and ONNX, run the ONNX file, and compare it with PyTorch.

The files have a dynamic batch and a fixed image size; inputs are normalised images, outputs the logits and, for each
block that prunes, the indices of the kept patches. The ONNX file is run in onnxruntime: it must keep the same tokens
and give logits within 1e-4. Reducers that draw random numbers are refused.
Needs: pip install onnx onnxscript onnxruntime

examples:
  python -m cropr export --run results/laptop/runs/3f2a91c07d/seed0 --out exported
  python -m cropr export --model vit_base_patch16_224 --rate 8 --out exported            random weights
  python -m cropr export --model vit_base_patch16_224 --rate 8 --out exported --bench    also speed-up in onnxruntime
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cropr.bench.specs import BenchSpec
from cropr.cli.output import origin, progress, say, show_metrics
from cropr.cli.spec_flags import (
    PRUNING,
    add_fields,
    add_pruning_flags,
    given,
    make_spec,
    pruning,
    require_known,
    require_model,
    trained_run,
)
from cropr.records import RECORD, package_versions, provenance, write_record
from cropr.specs import Spec

if TYPE_CHECKING:
    from cropr.pruning.model import DeployedViT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="directory of a finished training run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model.onnx, model.pt2 and record.json")
    add_fields(add_pruning_flags(parser), BenchSpec, ["image_size"])
    how = parser.add_argument_group("check and measurement")
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="images of both (default 4)")
    how.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default 5)")
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
    with progress() as tick:
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
    show_metrics(f"{args.out}: model.onnx, model.pt2", record["metrics"])
    say(f"tokens: {record['tokens'][0]} to {min(record['tokens'])}; {origin(record)}")


def _trained(args: argparse.Namespace) -> tuple[Spec, DeployedViT]:
    """The model of a training run."""
    if found := given(args, (*PRUNING, "image_size")):
        raise ValueError(f"--run and --{next(iter(found)).replace('_', '-')}: the run says what the model is")
    spec, weights, _ = trained_run(args.run_dir)
    if spec.task != "classification":
        raise ValueError(f"--run {args.run_dir}: a run of {spec.task}; only image classifiers can be exported")

    from cropr.build import build_model
    from cropr.pruning.model import PrunedViT
    from cropr.training.checkpoint import load_weights

    model: PrunedViT = build_model(spec.model, spec.prune, spec.data.num_classes, spec.data.image_size)
    load_weights(model, weights)
    return spec, model.deploy()


def _random(args: argparse.Namespace) -> tuple[Spec, DeployedViT]:
    """A model with random weights, by name."""
    require_known(require_model(args, "a training run with --run"))
    values = {"model": {"name": args.model}, "prune": pruning(args), **given(args, ["image_size"])}
    spec = make_spec(values, kind=BenchSpec)

    from cropr.build import build_model
    from cropr.pruning.model import PrunedViT

    model: PrunedViT = build_model(spec.model, spec.prune, 1000, spec.image_size)
    return spec, model.deploy()
