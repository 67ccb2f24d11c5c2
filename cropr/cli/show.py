"""Draw what a trained model prunes: over each image, the block after which each patch was pruned.

Runs of every task: a prediction is a class an image, a class a pixel, or objects with boxes and masks. The images are
chosen by rule, spread over the classes, so that every run on a data set shows the same images. The .npz file holds all
arrays; --picture also writes them as one PNG of panels: image, map, prediction, truth.

examples:
  python -m cropr show --run results/laptop/runs/3f2a91c07d/seed0 --data results/laptop/data/imagenet --out maps.npz
  python -m cropr show --run runs/3f2a91c07d/seed0 --data photos --images 4 --out maps.npz --picture maps.png
  python -m cropr show --run runs/3f2a91c07d/seed0 --image cat.jpg --out cat.npz --picture cat.png
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropr.cli.spec_flags import add_machine_flags, add_run_flags, say, trained_run
from cropr.records import read_record

if TYPE_CHECKING:
    from cropr.show import Answers, Shown

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser, required=True)
    parser.add_argument("--images", type=int, default=8, metavar="N", help="validation images to show (default 8)")
    parser.add_argument("--image", type=Path, action="append", metavar="FILE", help="this picture instead; repeatable")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, .npz")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw all panels in one .png")
    add_machine_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Load the model, run the images, write the files."""
    if args.image is None and args.data is None:
        raise ValueError("name what to show: --data DIR for validation images, or --image FILE")
    for file in args.image or ():
        if not file.is_file():
            raise FileNotFoundError(f"--image {file}: no such file (of a folder: python -m cropr predict)")
    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: must end in .npz; --picture FILE writes a .png")
    spec, weights, seed = trained_run(args)

    import torch

    from cropr.distributed import start
    from cropr.show import choose, panels
    from cropr.tasks import TASKS
    from cropr.tasks.base import write_arrays
    from cropr.training.checkpoint import load_weights

    task = TASKS[spec.task]
    with start(args.device, args.threads) as world:
        answers: Answers = task.load(task.show)(spec, args.data)
        answers.names = read_record(args.run_dir).get("classes", ())
        load_weights(answers.model, weights)
        answers.model.to(world.device)
        items: list[Any] = [*map(str, args.image)] if args.image else choose(answers.labels(), args.images)
        if len(items) < args.images and not args.image:
            _LOG.warning("%s: only %d validation images of %d", args.data, len(items), args.images)
        torch.manual_seed(seed)
        with torch.inference_mode():
            shown = [answers.show(item, world.device) for item in items]
    arrays = to_arrays(shown, spec.task, answers.model.backbone.depth)
    write_arrays(args.out, arrays)
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        panels(arrays).save(args.picture)
    for one in shown:
        if one.prediction_text:
            say(f"predicted: {one.prediction_text}" + f", true: {one.truth_text}" * bool(one.truth_text))
    say(f"{len(shown)} images: {args.out}" + f", {args.picture}" * bool(args.picture))


def to_arrays(shown: list["Shown"], task: str, depth: int) -> dict[str, Any]:
    """What the file holds of n images: ``images``, ``map`` uint8 [n, H, W, 3]; ``pruned_after`` int64 [n, patches] in
    raster order, 0 for never; ``grid`` [2], rows and columns of patches; ``depth``, blocks; ``truth_text`` and
    ``prediction_text`` [n]; ``truth`` and ``prediction`` uint8 [n, H, W, 3], drawn, of dense tasks; ``task``."""
    import numpy as np
    import torch

    from cropr.show import draw_map, grid_map

    after = [grid_map(one.output)[0].cpu() for one in shown]
    drawn = {name: [getattr(one, name) for one in shown] for name in ("prediction", "truth")}
    drawn["images"] = [one.image for one in shown]
    drawn["map"] = [draw_map(one.image, blocks, depth) for one, blocks in zip(shown, after, strict=True)]
    texts = {name: [getattr(one, name) for one in shown] for name in ("truth_text", "prediction_text")}
    return {
        **{name: torch.stack(all_).permute(0, 2, 3, 1).numpy() for name, all_ in drawn.items() if all_[0] is not None},
        **{name: np.array(all_, dtype=np.str_) for name, all_ in texts.items()},
        "pruned_after": torch.stack(after).flatten(1).numpy(),
        "grid": np.array(shown[0].output.grid),
        "depth": np.array(depth),
        "task": np.array(task),
    }
