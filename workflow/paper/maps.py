"""Pruning maps: over the image, the block after which each patch was pruned.

Patches that live to the end are the plain image; a pruned one is tinted by its block, early dark, late bright. Where
the truth is known, the object's outline is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cropr.data.scenes import OBJECT, object_patches
from workflow.paper import style
from workflow.paper.answers import ARRAYS, Answers, class_name, read_answers
from workflow.paper.load import Artefact, make_command

TINT = 0.8
"""Opacity of the colour over a pruned patch: the picture remains visible beneath."""
FEW = 4
"""Images in a figure that has two lines an image."""
_ARRAYS = ("images", "pruned_after", "grid", "depth", "classes")
"""What every file of maps holds; ``answers.ARRAYS`` are those of each task."""


@dataclass(frozen=True)
class Maps:
    """What ``python -m cropr show`` saves of one trained run."""

    images: NDArray[np.uint8]
    """[n, H, W, 3]."""
    pruned_after: NDArray[np.int64]
    """[n, N] in raster order: block after which a patch was pruned, counted from 1; 0 = never."""
    grid: tuple[int, int]
    """Rows and columns of patches; N is their product."""
    depth: int
    """Blocks of the model."""
    classes: tuple[str, ...]
    answers: Answers
    """Truth and predictions, of the kind that the task has."""
    masks: NDArray[np.uint8] | None
    """[n, H, W] truth masks of the labelled object, where the data set has them."""


def read_maps(path: str | Path) -> Maps:
    """Read a file of ``cropr show``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an array is missing, or shapes do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no pruning maps; make them with: python -m cropr show --help")
    with np.load(path, allow_pickle=False) as file:
        task = str(file.get("task", "classification"))
        if task not in ARRAYS:
            raise ValueError(f"{path}: maps of the task {task!r}; this version draws {', '.join(ARRAYS)}")
        if missing := [name for name in (*_ARRAYS, *ARRAYS[task]) if name not in file]:
            raise ValueError(f"{path}: array {missing[0]!r} is missing; make the file again with python -m cropr show")
        rows, columns = (int(side) for side in file["grid"])
        classes = tuple(str(name) for name in file["classes"])
        maps = Maps(
            file["images"],
            file["pruned_after"],
            (rows, columns),
            int(file["depth"]),
            classes,
            read_answers(task, file, classes),
            file.get("masks"),
        )
    if maps.pruned_after.shape != (len(maps.images), rows * columns):
        raise ValueError(
            f"{path}: pruned_after has shape {maps.pruned_after.shape}, {len(maps.images)} images on a "
            f"{rows} x {columns} grid need {(len(maps.images), rows * columns)}; make the file again"
        )
    return maps


def load_maps(artefact: Artefact) -> dict[str, Maps]:
    """Maps of every available row that has them, by row.

    Raises:
        FileNotFoundError: a file is missing; with the command that makes it.
        ValueError: the rows do not show the same images.
    """
    found: dict[str, Maps] = {}
    for row in artefact.manifest.rows:
        if row.available and row.maps is not None:
            if not (artefact.root / row.maps).is_file():
                raise FileNotFoundError(
                    f"{row.maps}: no maps; make them with: {make_command(artefact.manifest, row.maps)}"
                )
            found[row.row] = read_maps(artefact.root / row.maps)
    first = next(iter(found.values()), None)
    for name, maps in found.items():
        assert first is not None
        if maps.images.shape != first.images.shape or not np.array_equal(maps.images, first.images):
            raise ValueError(f"row {name!r} shows other images than the rows before it; make all maps again")
    return found


def figure(
    maps: Mapping[str, Maps], names: Mapping[str, str], reducers: Mapping[str, str], images: Sequence[int] | None = None
) -> Figure:
    """A grid: a row per image; columns are the input, then what each method pruned, with a colour bar of blocks.

    Where answers are pictures (label maps, boxes), there is one for each prediction, and one for the truth if it is
    known: of a single method beside the map, as in the paper's figures; of several below it.

    Args:
        maps: by row of the grid, all on the same images.
        names: column heads by row.
        reducers: method by row; gives the head's colour.
        images: which images, all by default.
    """
    if not maps:
        with style.style():
            empty, axes = plt.subplots(figsize=(style.WIDTH, 1.5))
            axes.set_axis_off()
            axes.text(0.5, 0.5, "no pruning maps at this scale", ha="center", va="center", color=style.MUTED)
            return empty
    first = next(iter(maps.values()))
    chosen = list(images) if images is not None else list(range(len(first.images)))
    lines = _panels(maps, names, reducers)
    columns, height = len(lines[0]), len(lines) * len(chosen)
    cell = min(1.9 if len(lines) == 1 else 1.5, style.WIDTH / columns)
    with style.style():
        plot, grid = plt.subplots(
            height, columns, figsize=(cell * columns, (cell + 0.16) * height + 1.1), squeeze=False
        )
        room = (0, 0, 1, 1 - 0.08 / plot.get_size_inches()[1])  # else the heads touch the edge
        plot.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01, rect=room)
        for axes in grid.flat:
            _bare(axes)
        for number, line in enumerate(grid):
            image, part = divmod(number, len(lines))
            for axes, panel in zip(line, lines[part], strict=True):
                if panel is not None:
                    panel.draw(axes, chosen[image])
                    if image == 0:
                        axes.set_title(panel.title, loc="center", color=panel.tint)
        _block_bar(plot, grid, maps, cell * columns)
        if patches := _legend(maps, chosen):
            plot.legend(handles=patches, loc="outside lower center", ncols=min(8, int(cell * columns / 1.3)))
    return plot


def few(maps: Mapping[str, Maps]) -> range:
    """The first images, as many as fit a page with two lines each."""
    return range(min((len(entry.images) for entry in maps.values()), default=0))[:FEW]


def survival(maps: Mapping[str, Maps]) -> pd.DataFrame:
    """Of the images shown, by row: shares of the object's and of the other patches that were never pruned (percent).

    Columns ``images``; ``correct``, the percentage of what ``unit`` names that is right (see ``answers``); ``object``
    and ``rest``, NaN without truth (see ``cropr.data.scenes.object_patches``).
    """
    lines = {}
    for name, entry in maps.items():
        alive = entry.pruned_after == 0
        line = {
            "images": len(alive),
            "correct": entry.answers.right(),
            "unit": entry.answers.unit,
            "object": np.nan,
            "rest": np.nan,
        }
        if entry.masks is not None:
            on = np.stack([object_patches(mask, entry.grid) for mask in entry.masks])
            line |= {"object": 100 * alive[on].mean(), "rest": 100 * alive[~on].mean()}
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index", columns=["images", "correct", "unit", "object", "rest"])


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


@dataclass(frozen=True)
class _Panel:
    """A column's picture, of any image."""

    title: str
    tint: str
    draw: Callable[[Axes, int], None]


def _panels(
    maps: Mapping[str, Maps], names: Mapping[str, str], reducers: Mapping[str, str]
) -> list[list[_Panel | None]]:
    """What is drawn of an image, in one line or two."""
    first = next(iter(maps.values()))
    seen = _Panel("input", style.INK, partial(_input, first))
    pruned = [_Panel(names[row], style.colour(reducers[row]), partial(_map, entry)) for row, entry in maps.items()]
    if not first.answers.panels:
        return [[seen, *pruned]]
    label = _Panel("label", style.INK, partial(_truth, first)) if first.answers.known else None
    found = [
        _Panel("prediction", style.colour(reducers[row]), partial(_prediction, entry)) for row, entry in maps.items()
    ]
    if len(maps) > 1:
        return [[seen, *pruned], [label, *found]]
    return [[seen, *pruned, *found, *([label] if label else [])]]


def _input(maps: Maps, axes: Axes, index: int) -> None:
    axes.imshow(maps.images[index], interpolation="nearest")
    _outline(axes, maps, index)
    if not maps.answers.panels:
        _truth(maps, axes, index)


def _truth(maps: Maps, axes: Axes, index: int) -> None:
    maps.answers.truth(axes, index, maps.images[index], maps.classes)


def _prediction(maps: Maps, axes: Axes, index: int) -> None:
    maps.answers.prediction(axes, index, maps.images[index], maps.classes)


def _block_bar(plot: Figure, grid: NDArray[np.object_], maps: Mapping[str, Maps], width: float) -> None:
    colours, norm, blocks = _scale(maps)
    bar = plot.colorbar(
        mpl.cm.ScalarMappable(norm, colours), ax=grid, location="bottom", fraction=0.02, aspect=50, pad=0.01,
        shrink=min(1.0, 5 / width),
    )  # fmt: skip
    step = max(1, round(len(blocks) / 12))
    bar.set_ticks(blocks[::step])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("block after which a patch was pruned (untinted: never)")


def _legend(maps: Mapping[str, Maps], images: Sequence[int]) -> list[Patch]:
    """Colours of the classes that any method or the truth shows, in the order of the classes."""
    found: dict[object, Patch] = {}
    for entry in maps.values():
        found |= {patch.get_label(): patch for patch in entry.answers.legend(entry.classes, images)}
    classes = next(iter(maps.values())).classes
    names = [class_name(classes, index) for index in range(len(classes))]
    return [found[name] for name in names if name in found]


def _map(maps: Maps, axes: Axes, index: int) -> None:
    """One image with its pruned patches tinted; below, answers that are words."""
    colours, norm, _ = _scale({"": maps})
    height, width = maps.images.shape[1:3]
    after = maps.pruned_after[index].reshape(maps.grid)
    # Patches need not divide the pixels of a resized picture evenly: every pixel looks up its patch.
    y, x = (np.arange(side) * count // side for side, count in zip((height, width), maps.grid, strict=True))
    pixels = after[np.ix_(y, x)]
    tint = colours(norm(pixels))
    tint[..., 3] = np.where(pixels > 0, TINT, 0.0)
    axes.imshow(maps.images[index], interpolation="nearest")
    axes.imshow(tint, interpolation="nearest")
    _outline(axes, maps, index)
    if not maps.answers.panels:
        _prediction(maps, axes, index)


def _outline(axes: Axes, maps: Maps, index: int) -> None:
    if maps.masks is None:
        return
    on = (maps.masks[index] == OBJECT).astype(float)
    if on.any() and not on.all():
        for tone, width in (("black", 2.0), ("white", 1.0)):  # visible on any background
            axes.contour(on, levels=[0.5], colors=tone, linewidths=width)


def _scale(maps: Mapping[str, Maps]) -> tuple[ListedColormap, BoundaryNorm, list[int]]:
    """One colour a block, over the whole depth, so that figures of one model share their colours."""
    depth = max(entry.depth for entry in maps.values())
    colours = ListedColormap(mpl.colormaps[style.SEQUENTIAL](np.linspace(0.08, 1, depth)))
    return colours, BoundaryNorm(np.arange(0.5, depth + 1), depth), list(range(1, depth + 1))
