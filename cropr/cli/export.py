"""Export a deployed model as torch.export (.pt2) and ONNX, run the ONNX file, and compare it with PyTorch.

The files have a dynamic batch and a fixed image size; inputs are normalised images, outputs the logits and, for each
block that prunes, the indices of the kept patches. The ONNX file is run in onnxruntime: it must keep the same tokens
and give logits within 1e-4. Reducers that draw random numbers are refused.
Needs: pip install onnx onnxscript onnxruntime

examples:
  python -m cropr export --run results/laptop/runs/3f2a91c07d/seed0 --out exported
  python -m cropr export --model vit_base_patch16_224 --rate 8 --out exported   # random weights
  python -m cropr export --model vit_base_patch16_224 --rate 8 --out exported --bench   # also speed-up in onnxruntime
"""

import argparse
import time
from pathlib import Path
from typing import Any

import cropr.cli.spec_flags as flags
from cropr.bench.specs import BenchSpec
from cropr.records import RECORD, make_record, package_versions, write_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="directory of a finished training run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model.onnx, model.pt2 and record.json")
    flags.add_fields(flags.add_pruning_flags(parser), BenchSpec, ["image_size"])
    how = parser.add_argument_group("check and measurement")
    text = "images per pass, compared and timed (default 4)"
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help=text)
    how.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default 5)")
    how.add_argument("--bench", action="store_true", help="also time the unpruned model in onnxruntime")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default OMP_NUM_THREADS, else all)")


def run(args: argparse.Namespace) -> None:
    """Export, check, print, write the record."""
    started = time.time()
    flags.require_positive(args, "batch_size", "rounds")

    from cropr.distributed import set_threads
    from cropr.export import export, need
    from cropr.tasks.base import build_model, require_known
    from cropr.training.checkpoint import load_weights

    need()
    set_threads(args.threads)
    spec: Any
    model: Any
    if args.run_dir:
        flags.require_alone(args, "run", (*flags.PRUNING, "image_size"))
        spec, weights, _ = flags.trained_run(args)
        if spec.task != "classification":
            raise ValueError(f"--run {args.run_dir}: a run of {spec.task}; only image classifiers can be exported")
        model = build_model(spec.model, spec.prune, spec.data.num_classes, spec.data.image_size)
        load_weights(model, weights)
    else:
        values = flags.model_and_pruning(args, "a training run with --run") | flags.given(args, ["image_size"])
        require_known(args.model)
        spec = flags.make_spec(values, kind=BenchSpec)
        model = build_model(spec.model, spec.prune, 1000, spec.image_size)
    with flags.progress() as tick:
        found = export(model.deploy(), args.out, args.batch_size, args.rounds, args.bench, tick)
    packages = package_versions("onnx", "onnxruntime", "onnxscript")
    found["tokens"] = list(model.token_trace)
    record = make_record("export", spec, started, found, precision="fp32", packages=packages)
    write_record(args.out / RECORD, record)
    flags.show_metrics(f"{args.out}: model.onnx, model.pt2", record["metrics"])
    flags.say(f"tokens: {flags.number(record['tokens'])}; {flags.origin(record)}")
