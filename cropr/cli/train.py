"""Train or fine-tune a model, pruned or not, and evaluate it.

The images lie in class folders: DATA/train/<class>/* and DATA/val/<class>/*. The run ends with record.json,
weights.safetensors and log.jsonl (a line a step) in its directory. A run that was cut off goes on from its last
checkpoint when the same command is given again; a finished one is not repeated.

examples:
  python -m cropr train --data photos --model vit_small_patch16_224 --pretrained --reducer cropr --rate 8 --fusion llf
  python -m cropr train --data photos --model vit_small_patch16_224 --reducer none      the unpruned baseline
  python -m cropr train --data photos --model vit_base_patch16_224 --pretrained --batch-size 256 --accumulate 4 \\
      --set recipe.layer_decay=0.65 --set data.augment.mixup=0.8
  python -m cropr train --data imagenet --spec spec.yaml --seed 1 --out runs/mine       everything from a file
  torchrun --nproc-per-node 8 -m cropr train --data imagenet --spec spec.yaml           8 GPUs
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from cropr.cli.spec_flags import FLAGS, add_flags, read_spec, require_lone_spec, spec_from_flags
from cropr.training.specs import TrainSpec

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="holds train/<class>/* and val/<class>/*"
    )
    parser.add_argument("--spec", metavar="FILE", help="a TrainSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument(
        "--init", type=Path, metavar="WEIGHTS", help="start from this safetensors file or run directory"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set any key of the spec")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/<id of the spec>/seed<seed>")
    add_flags(parser)
    machine = parser.add_argument_group("machine (none of these changes the result on a CPU)")
    machine.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    machine.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")
    machine.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images (default 0)")
    machine.add_argument(
        "--checkpoint-minutes", type=float, default=10, metavar="M", help="default 10, and every epoch"
    )
    machine.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="epochs; default: at the end only")


def run(args: argparse.Namespace) -> None:
    """Train, then print one line."""
    require_lone_spec(args, FLAGS, "; change single keys with --set")
    spec = read_spec(args.spec, args.set) if args.spec else None

    from cropr.tasks import TASKS
    from cropr.training.distributed import start
    from cropr.training.loop import TrainingInterrupted
    from cropr.training.run import train

    with start(args.device, args.threads) as world:
        if not world.leads:
            logging.disable(logging.INFO)
        spec = spec or _spec_for_folder(args, on_gpu=world.device.type == "cuda")
        out = args.out or Path("runs") / spec.digest() / f"seed{args.seed}"
        try:
            record = train(
                spec,
                args.seed,
                args.data,
                out,
                world=world,
                init=args.init,
                workers=args.workers,
                checkpoint_minutes=args.checkpoint_minutes,
                evaluate_every=args.evaluate_every,
            )
        except TrainingInterrupted as stop:
            message, number = stop.args
            _LOG.error("%s; the same command goes on from there", message)
            raise SystemExit(128 + (number or 15)) from None
        if world.leads:
            Console().print(
                _summary(record, out, TASKS[spec.task].metrics),
                soft_wrap=True,
                highlight=False,
            )


def _spec_for_folder(args: argparse.Namespace, on_gpu: bool) -> TrainSpec:
    from cropr.data.imagenet import load_splits

    split, _ = load_splits(args.data)
    return spec_from_flags(args, len(split.classes), len(split), on_gpu)


def _summary(record: dict, out: Path, labels: Mapping[str, str]) -> str:
    metrics = record["metrics"]
    figures = ", ".join(f"{label} {metrics[name]:.2f} %" for name, label in list(labels.items())[:2])
    return f"{figures} of {metrics['val_images']} images, {metrics['train_images_per_s']:.3g} training images/s: {out}"
