"""Write the embedded data set or a public one, or check a folder of images.

examples:
  python -m cropr data scenes --out scenes   # 20,000 + 2,000 images of 64 px
  python -m cropr data scenes --out tiny --train 200 --val 50 --image-size 32
  python -m cropr data scenes --out scenes --spec '{"distractors": [9, 12], "seed": 1}'
  python -m cropr data scenes --out maps --layout ade20k --objects 1 2
  python -m cropr data fashion --out data/fashion   # Fashion-MNIST: DIR/imagenet, DIR/ade20k
  python -m cropr data fashion --out data/fashion --source /usr/share/datasets/fashion-mnist   # files that are there
  python -m cropr data pets --out data/pets   # Oxford-IIIT Pet, 800 MB: DIR/imagenet, DIR/ade20k, DIR/coco
  python -m cropr data check /data/imagenet --classes 1000
  python -m cropr data check /data/ADEChallengeData2016 --layout ade20k --classes 150
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from cropr.cli.spec_flags import LAYOUTS, add_fields, given, make_spec, progress, read_values, say
from cropr.records import claimed
from cropr.specs import ScenesSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    scenes = verbs.add_parser("scenes", help="write the embedded data set")
    scenes.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to; an earlier set is replaced")
    scenes.add_argument("--spec", metavar="JSON", help="a ScenesSpec, or a file that holds one; flags go over it")
    add_fields(scenes, ScenesSpec)
    scenes.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    for name, title in (("fashion", "Fashion-MNIST, MIT licence"), ("pets", "Oxford-IIIT Pet, CC BY-SA 4.0")):
        public = verbs.add_parser(name, help=f"download {title}, and write it in the layouts of the tasks")
        public.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to; a folder for each layout")
        text = "archives that are there already (default: download to DIR/downloads)"
        public.add_argument("--source", type=Path, metavar="DIR", help=text)
    check = verbs.add_parser("check", help="read every image of a folder and list those that cannot be used")
    check.add_argument("root", type=Path, metavar="DIR", help="holds train/<class>/* and val/<class>/*, or --layout's")
    check.add_argument("--classes", type=int, metavar="N", help="expected number of classes")
    for verb in (scenes, check):
        verb.add_argument("--layout", choices=LAYOUTS, default="imagenet", help="folders of (default imagenet)")


def run(args: argparse.Namespace) -> None:
    """Write or read the images, then print how many there are."""
    alone = nullcontext() if args.what == "check" else claimed(args.out)
    with alone, progress(MofNCompleteColumn(), TimeRemainingColumn()) as tick:
        text = {"scenes": _scenes, "check": _check}.get(args.what, _public)(args, tick)
    say(text)


def _scenes(args: argparse.Namespace, tick: Callable[..., None]) -> str:
    from cropr.data.layouts import write

    values = read_values(args.spec) if args.spec else {}
    spec = make_spec({**values, **given(args, ScenesSpec.model_fields)}, kind=ScenesSpec)
    tick("scenes", total=spec.train + spec.val)
    write(spec, args.out, args.layout, args.workers, lambda done: tick("scenes", advance=done))
    return f"{spec.train} training and {spec.val} validation images in {args.out}"


def _public(args: argparse.Namespace, tick: Callable[..., None]) -> str:
    from cropr.data.public import write

    counts = write(args.what, args.out, args.source, lambda done, all_: tick(args.what, completed=done, total=all_))
    return f"{counts['train_images']} training and {counts['val_images']} validation images in {args.out}"


def _check(args: argparse.Namespace, tick: Callable[..., None]) -> str:
    from cropr.data.check import check

    report = check(args.root, args.classes, args.layout, lambda done, all_: tick("reading", completed=done, total=all_))
    report.raise_for_problems()
    images = ", ".join(f"{count} {split}" for split, count in report.images.items())
    classes = f" of {report.classes} classes" if report.classes else ""
    return f"{args.root}: all images can be used ({'; '.join([images + classes, *report.notes])})"
