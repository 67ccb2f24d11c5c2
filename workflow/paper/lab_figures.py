"""Figures of the laboratory's notebooks. Each takes an artefact that comes from ``lab_load.with_cells``."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workflow.paper import style
from workflow.paper.lab_load import UNPRUNED, cells_of, distinct, rows_of
from workflow.paper.lab_tables import CLASSES, alignment, smooth_excess
from workflow.paper.load import Artefact

TINTS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Variants, in the order of the record; the unpruned model is dark."""
MODELS = ("o", "^", "D", "v", "P", "X")
"""Markers of models, where a figure has several."""
PARTS = {
    "attention": "#0072b2",
    "mlp": "#56b4e9",
    "norm": "#999999",
    "residual": "#c8c8c8",
    "embed": "#009e73",
    "head": "#117733",
    "scoring": "#d55e00",
    "selection": "#e69f00",
    "gather": "#cc79a7",
    "fusion": "#882255",
    "other": "#e4e4e4",
}
"""Categories of a profile in the order in which they are stacked; what pruning adds is together, in warm colours."""


def precision(artefact: Artefact) -> Figure:
    """Images per second of every variant by precision and attention kernel, a panel a row."""
    rows = [row for row in rows_of(artefact, "sweep") if len(cells_of(artefact, row))]
    lengths = [len(_settings(cells_of(artefact, row, measured=False))) for row in rows] or [2]
    with style.style():
        figure, axes = plt.subplots(
            len(lengths), 1, figsize=(style.WIDTH, 1.0 + sum(0.7 + 0.38 * length for length in lengths)),
            height_ratios=[0.7 + 0.38 * length for length in lengths], squeeze=False,
        )  # fmt: skip
        if not rows:
            return _nothing(figure, axes[0, 0])
        for axis, row in zip(axes[:, 0], rows, strict=True):
            _precision_panel(axis, cells_of(artefact, row, measured=False))
        axes[-1, 0].set_xlabel("Images per second on this device, median with the speed-up over unpruned")
        _variant_legend(figure, artefact, rows)
    return figure


def alignment_curve(artefact: Artefact) -> Figure:
    """How far a block's latency lies off a smooth curve, over its token count, by what divides it; a panel a row."""
    rows = [row for row in rows_of(artefact, "blocks") if len(cells_of(artefact, row))]
    with style.style():
        figure, axes = plt.subplots(max(1, len(rows)), 1, figsize=(style.WIDTH, 3.9 * max(1, len(rows))), squeeze=False)
        if not rows:
            return _nothing(figure, axes[0, 0])
        tints = dict(zip((*CLASSES, 1), ("#882255", "#d55e00", "#e69f00", "#0072b2", style.MUTED), strict=True))
        found: set[int] = set()
        for axis, row in zip(axes[:, 0], rows, strict=True):
            frame = cells_of(artefact, row)
            excess = smooth_excess(frame)
            found |= {alignment(count) for count in excess}
            counts = np.array(list(excess))
            each = 100 * (np.array(list(excess.values())) - 1)
            gaps = np.flatnonzero(np.diff(counts) > 1) + 1  # a line would suggest counts that were not measured
            for part in np.split(np.arange(len(counts)), gaps):
                axis.plot(counts[part], each[part], color=style.GRID, lw=1.4, zorder=1)
            for divisor, tint in tints.items():
                own = [i for i, count in enumerate(excess) if alignment(count) == divisor]
                axis.plot(counts[own], each[own], "o", color=tint, ms=6 if divisor > 1 else 4, zorder=2)
            axis.set_title(f"{frame.iloc[0]['label']}, batches of {frame.iloc[0]['batch_size']}")
            axis.set_ylabel("Latency of a block,\noff a smooth curve (%)")
            axis.axhline(0, color=style.INK, lw=1)
        axes[-1, 0].set_xlabel("Tokens, with prefix")
        handles = [
            Line2D([], [], marker="o", ls="", color=tint, label=f"multiple of {divisor}" if divisor > 1 else "others")
            for divisor, tint in tints.items()
            if divisor in found
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def breakeven(artefact: Artefact) -> Figure:
    """Speed-up over batch size, a panel a variant, a line a model; dashed: the bound."""
    rows = [row for row in rows_of(artefact, "sweep") if len(cells_of(artefact, row))]
    names = list(dict.fromkeys(n for row in rows for n in distinct(cells_of(artefact, row), "name") if n != UNPRUNED))
    with style.style():
        figure, axes = plt.subplots(
            1, max(1, len(names)), figsize=(style.WIDTH, 4.4), sharey=True, squeeze=False
        )  # fmt: skip
        if not names:
            return _nothing(figure, axes[0, 0])
        for axis, name in zip(axes[0], names, strict=True):
            for row, tint, mark in zip(rows, _cycle(TINTS, len(rows)), _cycle(MODELS, len(rows)), strict=True):
                part = cells_of(artefact, row)
                part = part[part["name"] == name].sort_values("fitted")
                if len(part):
                    _speed_line(axis, part, tint, mark)
            axis.axhline(1, color=style.INK, lw=1)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(name)
            axis.set_xlabel("Images a batch")
        axes[0, 0].set_ylabel("Speed-up over unpruned (x)")
        handles = [
            Line2D([], [], marker=mark, color=tint, label=artefact.rows[row].label)
            for row, tint, mark in zip(rows, _cycle(TINTS, len(rows)), _cycle(MODELS, len(rows)), strict=True)
        ]
        handles.append(Line2D([], [], ls=(0, (4, 3)), lw=1.2, color=style.MUTED, label="bound"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def profile(artefact: Artefact) -> Figure:
    """A stacked bar a variant: milliseconds of a forward pass by category."""
    parts = [cells_of(artefact, row) for row in rows_of(artefact, "profile")]
    frame = pd.concat(parts) if parts else artefact.frame.iloc[:0]
    with style.style():
        figure, axes = plt.subplots(figsize=(style.WIDTH, 2.2 + 0.55 * max(2, len(frame))))
        if not len(frame):
            return _nothing(figure, axes)
        left = np.zeros(len(frame))
        for category, tint in PARTS.items():
            values = frame[f"{category}_ms.measured"].to_numpy(dtype=float)
            axes.barh(range(len(frame)), values, left=left, color=tint, height=0.66, label=category)
            left += values
        several = len(parts) > 1
        labels = [f"{line['label']}: {line['name']}" if several else str(line["name"]) for _, line in frame.iterrows()]
        axes.set_yticks(range(len(frame)), labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("Milliseconds of a forward pass, under the profiler")
        figure.legend(loc="outside lower center", ncols=6)
    return figure


def memory(artefact: Artefact) -> Figure:
    """Bars by variant: time of a training step, memory of training, memory of inference."""
    parts = [cells_of(artefact, row) for row in rows_of(artefact, "training")]
    frame = pd.concat(parts) if parts else artefact.frame.iloc[:0]
    panels = {
        "step_ms.measured": "Training step (ms)",
        "training_memory_mb.measured": "Memory, training (MB)",
        "inference_memory_mb.measured": "Memory, inference (MB)",
    }
    panels = {column: title for column, title in panels.items() if column in frame}
    with style.style():
        figure, axes = plt.subplots(
            1, max(1, len(panels)), figsize=(style.WIDTH, 1.6 + 0.5 * max(2, len(frame))), sharey=True, squeeze=False
        )  # fmt: skip
        if not panels:
            return _nothing(figure, axes[0, 0])
        several = len(parts) > 1
        labels = [f"{line['label']}: {line['name']}" if several else str(line["name"]) for _, line in frame.iterrows()]
        tints = [_tint(artefact, str(line["row"]), str(line["variant"])) for _, line in frame.iterrows()]
        for axis, (column, title) in zip(axes[0], panels.items(), strict=True):
            values = frame[column].to_numpy(dtype=float)
            axis.barh(range(len(frame)), values, color=tints, height=0.62)
            for y, value in enumerate(values):
                if np.isfinite(value):
                    axis.annotate(
                        f"{value:,.0f}", (value, y), xytext=(-4, 0), textcoords="offset points",
                        ha="right", va="center", color="white", fontsize=9,
                    )  # fmt: skip
            axis.set_xlabel(title)
            axis.grid(visible=False, axis="y")
        axes[0, 0].set_yticks(range(len(frame)), labels)
        axes[0, 0].invert_yaxis()
    return figure


def _precision_panel(axis: Axes, frame: pd.DataFrame) -> None:
    settings = _settings(frame)
    variants = distinct(frame, "variant")
    for y, (kind, kernel) in enumerate(settings):
        part = frame[(frame["precision"] == kind) & (frame["attention"] == kernel)]
        if part["why"].notna().all():
            axis.text(0.01, y, "not available here", transform=axis.get_yaxis_transform(), va="center", fontsize=9,
                      color=style.MUTED)  # fmt: skip
            continue
        for number, variant in enumerate(variants):
            for _, line in part[(part["variant"] == variant) & part["why"].isna()].iterrows():
                at = y + 0.24 * (number - (len(variants) - 1) / 2)
                tint = style.COLOURS["none"] if variant == UNPRUNED else TINTS[(number - 1) % len(TINTS)]
                speed = line["images_per_s.measured"]
                axis.barh(at, speed, height=0.22, color=tint)
                if variant != UNPRUNED and pd.notna(line.get("speedup.measured")):
                    axis.annotate(
                        f"{line['speedup.measured']:.2f}x", (speed, at), xytext=(4, 0), textcoords="offset points",
                        va="center", fontsize=8.5, color=tint,
                    )  # fmt: skip
    axis.set_yticks(range(len(settings)), [f"{kind}, {kernel}" for kind, kernel in settings])
    axis.set_ylim(len(settings) - 0.5, -0.5)
    axis.margins(x=0.08)
    axis.grid(visible=False, axis="y")
    batches = distinct(frame, "batch_size")
    axis.set_title(f"{frame.iloc[0]['label']}, batches of {', '.join(map(str, batches))}")


def _speed_line(axis: Axes, part: pd.DataFrame, tint: str, mark: str) -> None:
    x = part["fitted"].to_numpy(dtype=float)
    axis.vlines(x, part["speedup.low"], part["speedup.high"], color=tint, lw=1.4)
    axis.plot(x, part["speedup.measured"], marker=mark, color=tint)
    axis.plot(x, part["speedup.bound"], ls=(0, (4, 3)), lw=1.2, color=tint, alpha=0.7)


def _settings(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs of precision and kernel in the order of the record."""
    return list(dict.fromkeys(zip(frame["precision"], frame["attention"], strict=True)))


def _variant_legend(figure: Figure, artefact: Artefact, rows: list[str]) -> None:
    names: dict[str, str] = {}
    for row in rows:
        for _, line in cells_of(artefact, row, measured=False).iterrows():
            names.setdefault(str(line["name"]), _tint(artefact, row, str(line["variant"])))
    handles = [Line2D([], [], marker="s", ls="", color=tint, label=name) for name, tint in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _tint(artefact: Artefact, row: str, variant: str) -> str:
    """A variant's colour: by its place in the record of its row."""
    if variant == UNPRUNED:
        return style.COLOURS["none"]
    others = [name for name in distinct(cells_of(artefact, row, measured=False), "variant") if name != UNPRUNED]
    return TINTS[others.index(variant) % len(TINTS)]


def _cycle(values: tuple[str, ...], count: int) -> list[str]:
    return [values[number % len(values)] for number in range(count)]


def _nothing(figure: Figure, axes: Axes) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not measured at this scale", transform=axes.transAxes, ha="center", color=style.MUTED)
    return figure
