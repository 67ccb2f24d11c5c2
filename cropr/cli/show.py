"""Save what a trained model prunes where: images, predictions, and the block after which each patch was pruned.

Runs of every task: a prediction is a class an image, a class a pixel, or objects with boxes and masks. The images are
chosen by rule, spread over the classes, so that every run on a data set shows the same ones. The file is what the
notebooks pruning_maps* read; --picture draws it at once.

examples:
  python -m cropr show --run results/laptop/runs/3f2a91c07d/seed0 --data results/laptop/data/scenes --out maps.npz
  python -m cropr show --run runs/3f2a91c07d/seed0 --data photos --images 4 --out maps.npz --picture maps.png
  python -m cropr show --run runs/3f2a91c07d/seed0 --data photos --image cat.jpg --out cat.npz --picture cat.png
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cropr.cli.spec_flags import make_spec
from cropr.records import read_record
from cropr.training.specs import TrainSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cropr.tasks.views.base import Arrays, Sample, View

_LOG = logging.getLogger("cropr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--run", type=Path, required=True, dest="run_dir", metavar="DIR", help="a finished training run"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the images, in the layout of the task")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="validation images to show (default 8)")
    parser.add_argument("--image", type=Path, action="append", metavar="FILE", help="this picture instead; repeatable")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, .npz")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the maps, .png or .pdf")
    parser.add_argument("--seed", type=int, metavar="N", help="of random reducers (default: the run's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="of one operation (default OMP_NUM_THREADS)")


def run(args: argparse.Namespace) -> None:
    """Load the model, run the images, write the file."""
    if args.image is None and args.data is None:
        raise ValueError("name what to show: --data DIR for validation images, or --image FILE")
    record = read_record(args.run_dir)
    if record["kind"] != "train":
        raise ValueError(f"--run {args.run_dir}: holds a record of kind {record['kind']}, not of a training run")
    spec: TrainSpec = make_spec(record["spec"])

    from cropr.tasks import open_view
    from cropr.training.checkpoint import WEIGHTS, load_weights
    from cropr.training.distributed import start

    with start(args.device, args.threads) as world:
        view = open_view(spec, args.data)
        load_weights(view.model, args.run_dir / WEIGHTS)
        seed = record["seed"] if args.seed is None else args.seed
        arrays = show(view, _samples(args, view), seed, world.device)
    save(args.out, arrays)
    if args.picture:
        _draw(args.out, args.picture, spec.prune.reducer)
    Console().print(f"{len(arrays['images'])} images: {args.out}", highlight=False)


def choose(labels: Sequence[int], count: int) -> list[int]:
    """Indices of ``count`` images spread over the classes, and within a class over its images.

    The same images every time: a function of labels and count. Fewer if there are not so many. Images whose label is
    below 0 stand for no class and come last.

    Raises:
        ValueError: no image is asked for.
    """
    if count < 1:
        raise ValueError(f"--images {count}: must be 1 or more")
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        if label >= 0:
            by_class.setdefault(label, []).append(index)
    members = [by_class[label] for label in sorted(by_class)]
    if count < len(members):
        members = [members[i * len(members) // count] for i in range(count)]
    rounds = -(-count // max(len(members), 1))
    chosen = [images[turn * len(images) // rounds] for turn in range(rounds) for images in members]
    # A class with fewer images than rounds is met twice; then the next best are the first of all that are left.
    rest = sorted(range(len(labels)), key=lambda index: labels[index] < 0)
    return list(dict.fromkeys([*chosen, *rest] if len(set(chosen)) < count else chosen))[:count]


def show(view: View, samples: Iterable[Sample], seed: int, device: torch.device) -> Arrays:
    """Run images through a view's model, one at a time.

    Returns:
        task; images: uint8 [n, H, W, 3], as the model saw them; pruned_after: int64 [n, N] in raster order, 0 = never;
        grid: [2], rows and columns of patches; depth: blocks; classes: names; and the truth and the answers of the task
        (``workflow.paper.answers``).
    """
    import numpy as np
    import torch

    model = view.model.to(device)
    grid, shown = (0, 0), []
    torch.manual_seed(seed)
    for sample in samples:
        with torch.inference_mode():
            output, answer = view.answer(sample, device)
        grid = output.grid
        after = output.pruned_after(grid[0] * grid[1])[0].cpu().numpy()
        shown.append({"images": view.pixels(sample), "pruned_after": after, **sample.truth, **answer})
    constant = {
        "task": np.array(view.spec.task),
        "grid": np.array(grid),
        "depth": np.array(model.backbone.depth),
        "classes": np.array(view.classes, dtype=np.str_),
    }
    return {**view.join(shown), **constant}


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as compressed npz without pickles, whole or not at all."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _samples(args: argparse.Namespace, view: View) -> Iterator[Sample]:
    """The user's pictures, or validation images."""
    if args.image:
        if missing := [path for path in args.image if not path.is_file()]:
            raise FileNotFoundError(f"--image {missing[0]}: no such file")
        return map(view.picture, args.image)
    chosen = choose(view.labels(), args.images)
    if len(chosen) < args.images:
        _LOG.warning("%s: only %d validation images of %d", args.data, len(chosen), args.images)
    return map(view.validation, chosen)


def _draw(file: Path, picture: Path, reducer: str) -> None:
    try:
        from workflow.paper import maps, style
    except ModuleNotFoundError as error:
        raise ValueError(f"--picture needs {error.name}: pip install '.[report]' in a checkout") from None
    figure = maps.figure({reducer: maps.read_maps(file)}, {reducer: style.name(reducer)}, {reducer: reducer})
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=style.DPI)
