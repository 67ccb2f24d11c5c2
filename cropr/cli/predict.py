"""Predict images of your own with a trained model: a table, and pictures of what was pruned.

The CSV has a row for each prediction, the most certain first: the five most likely classes of an image, the share of
its pixels by class (segmentation), or its objects with boxes in pixels (detection).

examples:
  python -m cropr predict cat.jpg --run runs/3f2a91c07d/seed0
  python -m cropr predict photos holiday.png --run runs/3f2a91c07d/seed0 --best --out found.csv --pictures pruned
"""

import argparse
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

import cropr.cli.spec_flags as flags
from cropr.cli.show import to_arrays
from cropr.records import read_record, write_table
from cropr.tasks import TASKS

SHOWN = 20
"""Images whose first prediction is printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image, or folder that is searched")
    flags.add_run_flags(parser, required=True)
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default %(default)s")
    text = "draw a picture of each image there: image, pruning map, prediction"
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=text)
    flags.add_machine_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Predict, write the table, draw what was pruned if asked to, print the first rows."""
    spec, weights, seed = flags.trained_run(args)

    import torch

    from cropr.data.loading import ImageError, find_images, some
    from cropr.distributed import start
    from cropr.show import Answers, panels
    from cropr.training.checkpoint import load_weights

    task, files = TASKS[spec.task], [file for path in args.paths for file in find_images(path)]
    rows, broken = list[dict[str, Any]](), list[str]()
    columns = flags.progress(MofNCompleteColumn(), TimeRemainingColumn())
    with start(args.device, args.threads) as world, columns as tick, torch.inference_mode():
        answers: Answers = task.load(task.show)(spec, args.data)
        answers.names = names = read_record(args.run_dir).get("classes", ())
        load_weights(answers.model, weights)
        answers.model.to(world.device)
        torch.manual_seed(seed)
        for done, file in enumerate(files, start=1):
            tick("predicting", completed=done, total=len(files))
            try:
                shown = answers.show(str(file), world.device)
            except ImageError as error:
                broken.append(str(error))
                continue
            for rank, found in enumerate(shown.found, start=1):
                label = found["class"]
                rows.append({"file": str(file), "rank": rank, **found, "class": names[label] if names else label})
            if args.pictures:
                args.pictures.mkdir(parents=True, exist_ok=True)
                picture = panels(to_arrays([shown], spec.task, answers.model.backbone.depth))
                picture.save(args.pictures / f"{done:05d}_{file.stem}.png")
    write_table(args.out, rows, ("file", "rank", "class"))
    flags.show_table("first predictions", [row for row in rows if row["rank"] == 1][:SHOWN])
    flags.say(f"{len(files) - len(broken)} images: {args.out}" + f", pictures in {args.pictures}" * bool(args.pictures))
    if broken:
        raise ImageError(f"{len(broken)} of {len(files)} files are left out: {some(broken)}")
