"""Pruning maps: over each image, the block after which each patch was pruned.

    torchvision.io.write_png(cropr.show.show(model, images)[0], "map.png")

Patches that are never pruned show the plain image. The colour of a pruned patch tells the block: dark for the first,
bright for the last. B batch, H x W pixels, h x w patches.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_segmentation_masks

from cropr.pruning.model import DeployedViT, Output, PrunedViT
from cropr.tasks import TrainSpec, open_task

Colour = tuple[int, int, int]

OPACITY = 0.75
"""Of the colour over a pruned patch: the image stays visible below."""
_BLOCKS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Matplotlib's viridis at five places."""
_CLASSES: tuple[Colour, ...] = (
    (112, 128, 144), (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49), (145, 30, 180),
    (66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212), (70, 153, 144), (220, 190, 255), (154, 99, 36),
    (255, 250, 200), (128, 0, 0), (170, 255, 195), (128, 128, 0), (255, 216, 177), (0, 0, 117),
)  # fmt: skip
"""Distinct colours of classes, grey for the first (background, wall); they repeat after the last."""
_SIDE, _TEXT, _GAP = 320, 18, 8
"""Pixels of a picture's panels, of its lines of text, and between panels."""


def pruned_after(model: PrunedViT | DeployedViT, images: Tensor) -> Tensor:
    """Block after which each patch was pruned, int64 [B, h, w]; 0 for patches that are never pruned. The model runs in
    evaluation mode and keeps its own mode; ``images`` [B, 3, H, W] are normalised for it."""
    training = model.training
    with torch.inference_mode():
        output = model.eval().detailed(images) if isinstance(model, DeployedViT) else model.eval()(images)
    model.train(training)
    return grid_map(getattr(output, "encoded", output))  # a detector's output holds that of its encoder


def grid_map(output: Output) -> Tensor:
    """``Output.pruned_after`` as [B, h, w]."""
    return output.pruned_after(output.grid[0] * output.grid[1]).unflatten(1, output.grid)


def show(model: PrunedViT | DeployedViT, images: Tensor, mean: Any = None, std: Any = None) -> Tensor:
    """Pruning maps, drawn over the images: uint8 [B, 3, H, W], on the CPU; arguments as of ``pruned_after``. The images
    were normalised with ``mean`` and ``std``, by default those of the timm model."""
    vit = model.model if isinstance(model, DeployedViT) else model
    config = getattr(vit.backbone.host, "pretrained_cfg", {})
    pixels = to_pixels(images, mean or config.get("mean", (0.5,) * 3), std or config.get("std", (0.5,) * 3))
    after = pruned_after(model, images)
    return torch.stack([draw_map(*pair, vit.backbone.depth) for pair in zip(pixels, after, strict=True)])


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images [..., 3, H, W] as uint8, on the CPU; padding with zeros has the mean colour."""
    shift, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return ((images * scale + shift) * 255).round().clamp(0, 255).byte().cpu()


def draw_map(image: Tensor, after: Tensor, depth: int) -> Tensor:
    """One map [3, H, W] of an image uint8 [3, H, W] and its blocks [h, w]; ``depth`` blocks share the colours."""
    pixels = F.interpolate(after[None, None].float().cpu(), image.shape[-2:], mode="nearest-exact")[0, 0]
    blocks = [block for block in range(1, depth + 1) if (pixels == block).any()]
    if not blocks:
        return image
    colours = [block_colour(block, depth) for block in blocks]
    return draw_segmentation_masks(image, torch.stack([pixels == block for block in blocks]), OPACITY, colours)


def block_colour(block: int, depth: int) -> Colour:
    """Colour of patches that are pruned after a block, counted from 1. No block prunes after the last but one."""
    place = (block - 1) / max(depth - 2, 1) * (len(_BLOCKS) - 1)
    red, green, blue = (round(np.interp(place, range(len(_BLOCKS)), channel)) for channel in zip(*_BLOCKS, strict=True))
    return red, green, blue


def class_colour(label: int) -> Colour:
    """Colour of a class in label maps and of objects."""
    return _CLASSES[label % len(_CLASSES)]


def choose(labels: Sequence[int], count: int) -> list[int]:
    """Indices of ``count`` images (or all, if there are fewer) spread over the classes, and within a class over its
    images: a function of labels and count. Images whose label is below 0 have no class and come last."""
    if count < 1:
        raise ValueError(f"--images {count}: must be 1 or more")
    members = [[i for i, other in enumerate(labels) if other == label] for label in sorted(set(labels)) if label >= 0]
    if count < len(members):
        members = [members[i * len(members) // count] for i in range(count)]
    rounds = -(-count // max(len(members), 1))
    chosen = [images[turn * len(images) // rounds] for turn in range(rounds) for images in members]
    # A class with fewer images than rounds repeats its images; the first of all that are left replace the repeated.
    rest = sorted(range(len(labels)), key=lambda index: labels[index] < 0)
    return list(dict.fromkeys([*chosen, *rest] if len(set(chosen)) < count else chosen))[:count]


def rarest(present: Sequence[Collection[int]]) -> list[int]:
    """For images that show several classes: the (first) one that the fewest images show, -1 for images without a class.
    A choice spread over these labels shows the variety of data in which almost every image has a wall or a person."""
    counts = Counter(label for labels in present for label in set(labels))
    return [min(labels, key=lambda label: (counts[label], label), default=-1) for labels in present]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An image, uint8 [3, H, W], as the model sees it, padding included; the encoder's output for it alone; and what a
    task says about it: true and predicted labels or objects drawn over the image, or the names of classes instead."""

    image: Tensor
    output: Output
    truth: Tensor | None = None
    prediction: Tensor | None = None
    truth_text: str = ""
    prediction_text: str = ""
    found: tuple[dict[str, Any], ...] = ()
    """Rows of a table of predictions, most certain first; ``class`` is a label, counted from 0."""


class Answers:
    """Images of one task and what a model answers on them. Each task names its own subclass in ``Task.show``. ``root``:
    images in the layout of the task; None where only single files are shown. Raises what ``TaskRun`` raises."""

    def __init__(self, spec: TrainSpec, root: Path | None) -> None:
        run = open_task(spec, root)
        self.data: Any = run.data
        self.split: Any = run.splits[1] if run.splits else None
        self.model = run.build().eval()
        """In training form; weights are loaded from outside."""
        self.names: Sequence[str] = ()
        """Names of the classes, for pictures without data; numbers stand for them if there are none."""

    def labels(self) -> Sequence[int]:
        """Class of each validation image, for ``choose``; -1 for images without a class."""
        raise NotImplementedError

    def show(self, item: int | str, device: torch.device) -> Shown:
        """Run the model on the validation image of this number, or on the file of this name."""
        raise NotImplementedError


def panels(arrays: Mapping[str, Any]) -> Image.Image:
    """One picture of the arrays that ``python -m cropr show`` writes: a row for each image, with its map, prediction
    and truth (or names of classes below), and the colours of the blocks at the end."""
    font: Any = ImageFont.load_default(size=_TEXT - 3)
    titles = {"images": "image", "map": "pruning map", "prediction": "prediction", "truth": "truth"}
    predicted = [text and f"predicted: {text}" for text in arrays["prediction_text"]]
    texts = {"images": arrays["truth_text"], "map": predicted}
    names = [name for name in titles if name in arrays]
    texts = {name: [fill(text or "", _SIDE // 8) for text in all_] for name, all_ in texts.items()}
    lines = _TEXT * max((text.count("\n") + 1 for all_ in texts.values() for text in all_ if text), default=0)
    width, height, top = _SIDE + _GAP, _SIDE + _GAP + lines, _TEXT + _GAP
    page = Image.new("RGB", (_GAP + width * len(names), top + height * len(arrays["images"]) + 3 * _TEXT), "white")
    pen = ImageDraw.Draw(page)
    for column, name in enumerate(names):
        left = _GAP + column * width
        pen.text((left, _GAP // 2), titles[name], "black", font)
        for row, image in enumerate(arrays[name]):
            factor = _SIDE / max(image.shape[:2])
            size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
            method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            page.paste(Image.fromarray(image).resize(size, method), (left, top + row * height))
            if lines and name in texts:
                pen.text((left, top + row * height + _SIDE), texts[name][row], "black", font)
    _draw_key(pen, int(arrays["depth"]), page.width, page.height - 2 * _TEXT - _GAP, font)
    return page


def _draw_key(pen: ImageDraw.ImageDraw, depth: int, width: int, top: int, font: Any) -> None:
    """A box for each block that can prune, with its number."""
    text = "pruned after block"
    left = 2 * _GAP + round(font.getlength(text))
    side = min(24, (width - left - _GAP) // max(depth - 1, 1))
    pen.text((_GAP, top), text, "black", font)
    pen.text((_GAP, top + _TEXT), "plain: never", "black", font)
    for block in range(1, depth):
        x = left + (block - 1) * side
        pen.rectangle((x, top, x + side - 1, top + _TEXT), block_colour(block, depth))
        if side >= 20 or block % 4 == 1:
            pen.text((x + side / 2, top + _TEXT + 2), str(block), "black", font, anchor="ma")
