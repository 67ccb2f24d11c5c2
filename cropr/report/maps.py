"""Pruning maps: over the image, the block after which each patch was pruned.

Patches that live to the end are the plain image; a pruned one is tinted by its block, early dark, late bright. Where
the truth is known, the object's outline is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cropr.data.scenes import OBJECT, object_patches
from cropr.report import style
from cropr.report.load import Artefact, make_command

TINT = 0.8
"""Opacity of the colour over a pruned patch: the picture remains visible beneath."""
_ARRAYS = ("images", "labels", "predictions", "pruned_after", "grid", "depth", "classes")


@dataclass(frozen=True)
class Maps:
    """What ``python -m cropr show`` saves of one trained run."""

    images: NDArray[np.uint8]
    """[n, H, W, 3]."""
    labels: NDArray[np.int64]
    """[n]; -1 where there is none (a picture of the user's)."""
    predictions: NDArray[np.int64]
    """[n]."""
    pruned_after: NDArray[np.int64]
    """[n, N] in raster order: block after which a patch was pruned, counted from 1; 0 = never."""
    grid: tuple[int, int]
    """Rows and columns of patches; N is their product."""
    depth: int
    """Blocks of the model."""
    classes: tuple[str, ...]
    masks: NDArray[np.uint8] | None
    """[n, H, W] truth masks, where the data set has them."""


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
        if missing := [name for name in _ARRAYS if name not in file]:
            raise ValueError(f"{path}: array {missing[0]!r} is missing; make the file again with python -m cropr show")
        rows, columns = (int(side) for side in file["grid"])
        maps = Maps(
            file["images"],
            file["labels"],
            file["predictions"],
            file["pruned_after"],
            (rows, columns),
            int(file["depth"]),
            tuple(str(name) for name in file["classes"]),
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
    """A grid: a row per image, the input and then one column per method, with a colour bar of blocks.

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
    cell = min(1.9, style.WIDTH / (len(maps) + 1))
    with style.style():
        plot, grid = plt.subplots(
            len(chosen),
            len(maps) + 1,
            figsize=(cell * (len(maps) + 1), (cell + 0.16) * len(chosen) + 0.9),
            squeeze=False,
        )
        room = (0, 0, 1, 1 - 0.08 / plot.get_size_inches()[1])  # else the heads touch the edge
        plot.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01, rect=room)
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)
        grid[0, 0].set_title("input", loc="center")
        for row, index in enumerate(chosen):
            _picture(grid[row, 0], first, index)
            for column, (name, entry) in enumerate(maps.items(), 1):
                _map(grid[row, column], entry, index)
                if row == 0:
                    grid[0, column].set_title(names[name], loc="center", color=style.colour(reducers[name]))
        colours, norm, blocks = _scale(maps)
        bar = plot.colorbar(
            mpl.cm.ScalarMappable(norm, colours), ax=grid, location="bottom", fraction=0.02, aspect=50, pad=0.01,
            shrink=min(1.0, 5 / (cell * (len(maps) + 1))),
        )  # fmt: skip
        step = max(1, round(len(blocks) / 12))
        bar.set_ticks(blocks[::step])
        bar.minorticks_off()
        bar.outline.set_visible(False)
        bar.set_label("block after which a patch was pruned (untinted: never)")
    return plot


def survival(maps: Mapping[str, Maps]) -> pd.DataFrame:
    """Of the images shown, by row: shares of the object's and of the other patches that were never pruned (percent).

    Columns ``images``, ``correct`` (percent of those with a label), ``object`` and ``rest``; the latter two are NaN
    without truth (see ``cropr.data.scenes.object_patches``).
    """
    lines = {}
    for name, entry in maps.items():
        alive, known = entry.pruned_after == 0, entry.labels >= 0
        line = {
            "images": len(alive),
            "correct": 100 * float((entry.predictions == entry.labels)[known].mean()) if known.any() else np.nan,
            "object": np.nan,
            "rest": np.nan,
        }
        if entry.masks is not None:
            on = np.stack([object_patches(mask, entry.grid) for mask in entry.masks])
            line |= {"object": 100 * alive[on].mean(), "rest": 100 * alive[~on].mean()}
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index", columns=["images", "correct", "object", "rest"])


def _picture(axes: Axes, maps: Maps, index: int) -> None:
    axes.imshow(maps.images[index], interpolation="nearest")
    _outline(axes, maps, index)
    if maps.labels[index] >= 0:
        axes.set_xlabel(_class(maps, maps.labels[index]), fontsize=9, labelpad=2)


def _map(axes: Axes, maps: Maps, index: int) -> None:
    """One image with its pruned patches tinted; below it the prediction, marked right or wrong."""
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
    label, prediction = maps.labels[index], maps.predictions[index]
    mark, tone = ("", style.INK) if label < 0 else (" ✓", "#00694d") if label == prediction else (" ✗", "#b3420a")
    axes.set_xlabel(f"{_class(maps, prediction)}{mark}", fontsize=9, color=tone, labelpad=2)


def _outline(axes: Axes, maps: Maps, index: int) -> None:
    if maps.masks is None:
        return
    on = (maps.masks[index] == OBJECT).astype(float)
    if on.any() and not on.all():
        for tone, width in (("black", 2.0), ("white", 1.0)):  # visible on any background
            axes.contour(on, levels=[0.5], colors=tone, linewidths=width)


def _class(maps: Maps, index: int) -> str:
    text = maps.classes[index] if 0 <= index < len(maps.classes) else f"class {index}"
    return text.replace("_", " ")


def _scale(maps: Mapping[str, Maps]) -> tuple[ListedColormap, BoundaryNorm, list[int]]:
    """One colour a block, over the whole depth, so that figures of one model share their colours."""
    depth = max(entry.depth for entry in maps.values())
    colours = ListedColormap(mpl.colormaps[style.SEQUENTIAL](np.linspace(0.08, 1, depth)))
    return colours, BoundaryNorm(np.arange(0.5, depth + 1), depth), list(range(1, depth + 1))
