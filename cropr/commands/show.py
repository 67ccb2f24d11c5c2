"""Save what a trained model prunes where: images, predictions, and the block after which each patch was pruned.

The images are chosen by rule, spread over the classes, so that every run on a data set shows the same ones. The file
is what the notebook pruning_maps reads; --picture draws it at once.

examples:
  python -m cropr show --run results/laptop/runs/3f2a91c07d/seed0 --data results/laptop/data/scenes --out maps.npz
  python -m cropr show --run runs/3f2a91c07d/seed0 --data photos --images 4 --out maps.npz --picture maps.png
  python -m cropr show --run runs/3f2a91c07d/seed0 --data photos --image cat.jpg --out cat.npz --picture cat.png
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cropr.records import read_record
from cropr.specs import DataSpec, TrainSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cropr.model import PrunedViT

_LOG = logging.getLogger("cropr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--run", type=Path, required=True, dest="run_dir", metavar="DIR", help="a finished training run"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="validation images and the names of the classes")
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
    spec = TrainSpec.model_validate(record["spec"])
    if not isinstance(spec.data, DataSpec):
        raise ValueError(f"--run {args.run_dir}: maps are saved of classification runs; this one's task is {spec.task}")

    from cropr.model import build_model
    from cropr.training.checkpoint import WEIGHTS, load_weights
    from cropr.training.distributed import start

    with start(args.device, args.threads) as world:
        model: PrunedViT = build_model(spec.model, spec.prune, spec.data.num_classes, spec.data.image_size)
        load_weights(model, args.run_dir / WEIGHTS)
        paths, labels, classes = _what(args, spec.data)
        seed = record["seed"] if args.seed is None else args.seed
        arrays = show(model.to(world.device), paths, labels, spec.data, seed, world.device)
    save(args.out, arrays, classes)
    if args.picture:
        _draw(args.out, args.picture, spec.prune.reducer)
    Console().print(f"{len(paths)} images: {args.out}", highlight=False)


def choose(labels: Sequence[int], count: int) -> list[int]:
    """Indices of ``count`` images spread over the classes, and within a class over its images.

    The same images every time: a function of labels and count. Fewer if there are not so many.

    Raises:
        ValueError: no image is asked for.
    """
    if count < 1:
        raise ValueError(f"--images {count}: must be 1 or more")
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    members = [by_class[label] for label in sorted(by_class)]
    if count < len(members):
        members = [members[i * len(members) // count] for i in range(count)]
    rounds = -(-count // len(members))
    chosen = [images[turn * len(images) // rounds] for turn in range(rounds) for images in members]
    # A class with fewer images than rounds is met twice; then the next best are the first of all that are left.
    return list(dict.fromkeys([*chosen, *range(len(labels))] if len(set(chosen)) < count else chosen))[:count]


def show(
    model: PrunedViT,
    paths: Sequence[str | Path],
    labels: Sequence[int],
    data: DataSpec,
    seed: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Run images through a model in evaluation mode, one at a time.

    Returns:
        images: uint8 [n, H, W, 3], as the model saw them (resized and cropped); labels, predictions: int64 [n];
        pruned_after: int64 [n, N] in raster order, 0 = never; grid: [2], rows and columns of patches; depth: blocks;
        masks: uint8 [n, H, W], where the data set has truth of that size for every image.
    """
    import numpy as np
    import torch

    from cropr.data.imagenet import eval_transform
    from cropr.data.loading import decode
    from cropr.data.scenes import object_mask

    transform = eval_transform(data)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    model.eval()
    images, predictions, pruned_after, masks = [], [], [], []
    torch.manual_seed(seed)
    for path in paths:
        image = transform(decode(path))
        with torch.inference_mode():
            output = model(image[None].to(device))
        images.append(((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        predictions.append(int(output.logits.argmax()))
        pruned_after.append(output.pruned_after(model.backbone.num_patches)[0].cpu().numpy())
        masks.append(object_mask(path))
    arrays = {
        "images": np.stack(images),
        "labels": np.array(labels, np.int64),
        "predictions": np.array(predictions, np.int64),
        "pruned_after": np.stack(pruned_after),
        "grid": np.array(model.backbone.grid(image[None])),
        "depth": np.array(model.backbone.depth),
    }
    known = [mask for mask in masks if mask is not None and mask.shape == images[0].shape[:2]]
    return {**arrays, "masks": np.stack(known)} if len(known) == len(images) else arrays


def save(path: Path, arrays: dict[str, np.ndarray], classes: Sequence[str]) -> None:
    """Write arrays and class names as compressed npz without pickles, whole or not at all."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, classes=np.array(classes, dtype=np.str_), **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _what(args: argparse.Namespace, data: DataSpec) -> tuple[list[str | Path], list[int], list[str]]:
    """Images, their labels (-1: none known) and the names of the classes, as far as they are known."""
    from cropr.data.imagenet import load_splits

    split = load_splits(args.data, data.num_classes)[1] if args.data else None
    classes = list(split.classes) if split else []
    if args.image:
        if missing := [path for path in args.image if not path.is_file()]:
            raise FileNotFoundError(f"--image {missing[0]}: no such file")
        return list(args.image), [-1] * len(args.image), classes
    assert split is not None
    chosen = choose(split.labels, args.images)
    if len(chosen) < args.images:
        _LOG.warning("%s: only %d validation images of %d", args.data, len(chosen), args.images)
    return [split.paths[i] for i in chosen], [split.labels[i] for i in chosen], classes


def _draw(file: Path, picture: Path, reducer: str) -> None:
    try:
        from cropr.report import maps, style
    except ModuleNotFoundError as error:
        raise ValueError(f"--picture needs {error.name}: pip install 'cropr[report]'") from None
    figure = maps.figure({reducer: maps.read_maps(file)}, {reducer: style.name(reducer)}, {reducer: reducer})
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=style.DPI)
