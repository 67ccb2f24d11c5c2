"""Train or fine-tune a model, pruned or not, and evaluate it.

Without --spec, the images lie in class folders: DATA/train/<class>/* and DATA/val/<class>/*. With --spec, they lie in
the layout of its task. The run ends with record.json, weights.safetensors and log.csv (a line a step) in its
directory; --evaluate-every also keeps the best weights. An interrupted run continues from its last checkpoint when the
same command is given again; a finished one is not repeated.

examples:
  python -m cropr train --data photos --model vit_small_patch16_224 --pretrained --reducer cropr --rate 8 --fusion llf
  python -m cropr train --data photos --model vit_small_patch16_224 --reducer none   # the unpruned baseline
  python -m cropr train --data photos --model vit_base_patch16_224 --pretrained --batch-size 256 --accumulate 4 \\
      --set recipe.layer_decay=0.65 --set data.augment.mixup=0.8
  python -m cropr train --data photos --model vit_small_patch16_224 --pretrained --freeze-encoder --evaluate-every 1
  python -m cropr train --data small --model vit_tiny_patch16_224 --img-size 28 --patch-size 4 --auto-augment none
  python -m cropr train --data imagenet --spec spec.yaml --seed 1 --out runs/mine   # everything from a file
  torchrun --nproc-per-node 8 -m cropr train --data imagenet --spec spec.yaml   # 8 GPUs
"""

import argparse
import hashlib
import logging
import math
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cropr.cli.spec_flags as flags
from cropr.records import claimed, leaves
from cropr.specs import ModelSpec, RecipeSpec
from cropr.tasks import TASKS, TrainSpec

_LOG = logging.getLogger(__name__)
_RECIPE = ("epochs", "batch_size", "accumulate", "precision", "freeze_encoder")
_WATCH = ("checkpoint_minutes", "evaluate_every", "tensorboard")
_RANDAUGMENT = "rand-m9-mstd0.5-inc1"
_PARTS = (*flags.PRUNING, "drop_path", *_RECIPE, "lr", "image_size", "auto_augment", "pretrained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    keys = ", ".join(key for key, _ in leaves(TrainSpec(model=ModelSpec(name="")).model_dump()))
    data = "the images: train/<class>/* and val/<class>/*, or the layout of the spec's task"
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help=data)
    parser.add_argument("--spec", metavar="FILE", help="a TrainSpec as JSON or YAML file, or as JSON; instead of flags")
    parser.add_argument("--init", type=Path, metavar="FILE", help="start from these safetensors, or a run's directory")
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="learn from this unpruned run, too, as --init")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"set a key: {keys}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/<id of the spec>/seed<seed>")
    flags.add_fields(flags.add_pruning_flags(parser), ModelSpec, ["drop_path"], drop_path=0.1)
    recipe = parser.add_argument_group("recipe")
    flags.add_fields(recipe, RecipeSpec, _RECIPE, epochs=20, batch_size=64, precision="bf16 on a GPU, else fp32")
    recipe.add_argument("--lr", type=float, metavar="LR", help="peak learning rate (default 1e-3 per 256 images)")
    recipe.add_argument("--image-size", "--img-size", type=int, metavar="PX", help="default: the model's own")
    text = f"timm's policy of random changes of training images, or none (default {_RANDAUGMENT}: RandAugment)"
    recipe.add_argument("--auto-augment", metavar="POLICY", help=text)
    recipe.add_argument("--pretrained", action="store_true", help="start from timm's weights of this model")
    machine = parser.add_argument_group("machine (none of these changes the result on a CPU)")
    flags.add_machine_flags(machine, workers=True)
    text = "minutes between checkpoints (default 10); one more after each epoch"
    machine.add_argument("--checkpoint-minutes", type=float, default=10, metavar="M", help=text)
    machine.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="epochs; default: at the end only")
    machine.add_argument("--tensorboard", action="store_true", help="also write event files (needs tensorboard)")


def run(args: argparse.Namespace) -> None:
    """Train, then print one line."""
    spec: Any = None
    if args.tensorboard and not find_spec("tensorboard"):
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if args.spec:
        flags.require_alone(args, "spec", _PARTS, ", or change single keys with --set")
        spec = flags.make_spec(args.spec, args.set)

    from cropr.distributed import start
    from cropr.training.loop import TrainingInterrupted, train

    with start(args.device, args.threads) as world:
        if not world.leads:
            logging.disable(logging.INFO)
        spec = spec or _spec_for_folder(args, on_gpu=world.device.type == "cuda")
        out = args.out or Path("runs") / spec.digest() / f"seed{args.seed}"
        how = {name: getattr(args, name) for name in ("init", "teacher", "workers", *_WATCH)}
        try:
            with claimed(out) if world.leads else nullcontext():
                record = train(spec, args.seed, args.data, out, world=world, **how)
        except TrainingInterrupted as stop:
            message, number = stop.args
            _LOG.error("%s; the same command continues from there", message)
            raise SystemExit(128 + (number or 15)) from None
        if world.leads:
            metrics, labels = record["metrics"], list(TASKS[spec.task].metrics.items())[:2]
            figures = ", ".join(f"{label} {metrics[name]:.2f} %" for name, label in labels)
            speed = f", {metrics['train_images_per_s']:.3g} training images/s" if spec.recipe.epochs else ""
            flags.say(f"{figures} of {metrics['val_images']} images{speed}: {out}")


def _spec_for_folder(args: argparse.Namespace, on_gpu: bool) -> TrainSpec:
    """A recipe to fine-tune a model on a folder of images."""
    from cropr.data.imagenet import load_splits
    from cropr.tasks.base import require_known

    split, _ = load_splits(args.data)
    values = flags.model_and_pruning(args)
    name = require_known(args.model)
    if args.pretrained and args.init:
        raise ValueError(f"--pretrained and --init {args.init}: give one of them")
    if args.freeze_encoder and not args.pretrained and not args.init:
        raise ValueError("--freeze-encoder: name weights that are worth keeping, with --pretrained or --init")
    policy = args.auto_augment or _RANDAUGMENT
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr:g}: must be a finite number above 0")
    if args.lr is not None and any(one.startswith(("recipe.batch_size", "recipe.base_lr")) for one in args.set or ()):
        raise ValueError("--lr with --set recipe.batch_size or recipe.base_lr: use --batch-size, or --set without --lr")
    batch = args.batch_size if args.batch_size is not None else min(64, len(split))
    values["model"] |= {"drop_path": 0.0 if args.freeze_encoder else 0.1, **flags.given(args, ["drop_path"])}
    values |= {
        "data": {
            **_input_of(name),
            **flags.given(args, ["image_size"]),
            "num_classes": len(split.classes),
            "augment": {"auto_augment": None if policy == "none" else policy, "smoothing": 0.1},
        },
        "recipe": {
            "epochs": 20,
            "warmup_epochs": 1 if args.epochs is None or args.epochs > 1 else 0,
            "precision": "bf16" if on_gpu else "fp32",
            "clip_grad": 1.0,
            **({} if args.lr is None or batch < 1 else {"base_lr": args.lr * 256 / batch}),
            **flags.given(args, _RECIPE),
            "batch_size": batch,
        },
        "teacher": _initial_id(args.teacher) if args.teacher else None,
        "init": "timm" if args.pretrained else _initial_id(args.init) if args.init else "random",
    }
    return flags.make_spec(values, args.set)


def _initial_id(path: Path) -> str:
    """What names initial weights in a spec: the id of the run that made them, else a digest of the file."""
    from cropr.records import RECORD, read_record
    from cropr.training.checkpoint import WEIGHTS

    path = path / WEIGHTS if path.is_dir() else path
    if (path.parent / RECORD).exists():
        return str(read_record(path.parent)["id"])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights (--init, --teacher)")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def _input_of(model: str) -> dict[str, Any]:
    """Image size, normalisation and evaluation crop that a timm model was made for."""
    import timm

    config = timm.get_pretrained_cfg(model)
    if config is None:
        return {}
    found = {name: getattr(config, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    if config.interpolation not in ("bicubic", "bilinear"):
        found["interpolation"] = "bicubic"
    return found | {"image_size": config.input_size[-1]}
