"""The figures that are drawn from an artefact's frame: trade-off, speed against its bound, ablations, token counts.

Each function returns a matplotlib figure and changes no global state. Where nothing was measured, it says so in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from workflow.paper import style
from workflow.paper.labels import Box, Label, label_ends, place_labels
from workflow.paper.load import Artefact
from workflow.paper.names import bench_model, row_names, schedule_name, schedules, setting_name, short_names
from workflow.paper.quantities import quantity
from workflow.paper.stats import Interval

OFF_SCALE = {"measured": 10.0, "published": 5.0}
"""Points below the unpruned model at which a panel of the trade-off ends; lower rows are named at its foot."""
PUBLISHED_ROWS = 3
"""Rows with a published accuracy and speed-up that make a panel worth looking at."""
COSTS = {
    "train_speedup": "Training step: speed relative\nto the same row (x)",
    "speedup": "Deployed: speed-up of the\ntimed model (x)",
}
"""What may stand beside a difference in accuracy, by quantity."""
_TINTS = ("#3b3b3b", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


def trade_off(artefact: Artefact) -> Figure:
    """Accuracy against speed-up, measured and, below it, published. The panels share no axis.

    Above: the accuracy (top-1, mIoU, box AP) of this scale's models with the interval over seeds, against the speed-up
    of the timed model on this device. Below: both as the paper prints them, where it has ``PUBLISHED_ROWS`` or more; a
    table says one or two better. Filled: with Last Layer Fusion; hollow: without.
    """
    accuracy = quantity(artefact.primary)
    published = len(_points(artefact, "published")) >= PUBLISHED_ROWS
    with style.style():
        figure, axes = plt.subplots(1 + published, 1, figsize=(style.WIDTH, 8.2 if published else 4.4), squeeze=False)
        above, *others = axes[:, 0]
        above.set_title(f"Measured (scale: {artefact.manifest.scale})")
        above.set_xlabel(f"Speed-up of {bench_model(artefact)} on this device (x)")
        above.set_ylabel(f"{accuracy.label} of this scale's model ({accuracy.unit})")
        for below in others:
            below.set_title(f"Published (paper): {artefact.measures.paper}")
            below.set_xlabel("Speed-up on the paper's GPU (x)")
            below.set_ylabel(f"{accuracy.label} of the paper's model ({accuracy.unit})")
        if pairs := schedules(artefact):
            text = "Labels name the timed schedule. The trained model has another:\n" + "\n".join(pairs)
            above.text(0.012, 0.03, text, transform=above.transAxes, color=style.MUTED, fontsize=9, va="bottom")
        panels = [("measured", above), *(("published", below) for below in others)]
        points = [_scatter(figure, axes, artefact, kind) for kind, axes in panels]
        handles = [
            Line2D([], [], marker="o", ls="", color=style.MUTED, label="with Last Layer Fusion"),
            Line2D([], [], marker="o", ls="", color=style.MUTED, mfc="white", mew=1.8, label="without"),
            Line2D([], [], ls=(0, (4, 3)), lw=1, color=style.COLOURS["none"], label="unpruned"),
            Line2D([], [], marker="v", ls="", color=style.MUTED, label="below the axis, with its value"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        for (kind, axes), labels in zip(panels, points, strict=True):
            if labels:
                place_labels(axes, labels, _obstacles(axes, artefact, kind))
    return figure


def speed_against_bound(artefact: Artefact) -> Figure:
    """Measured speed-up with its interval, the bound that the multiply-adds set, and the published speed-up, by row."""
    frame, names = artefact.frame, row_names(artefact, "speed")
    rows = [row for row in frame.index if artefact.interval(row, "speedup") is not None]
    with style.style():
        figure, axes = plt.subplots(figsize=(style.WIDTH, 1.5 + 0.34 * max(len(rows), 2)))
        if not rows:
            return _nothing(figure, axes, "no throughput measured at this scale")
        for y, row in enumerate(rows):
            tint, speedup = style.colour(artefact.reducer(row)), artefact.number(row, "speedup.measured")
            axes.plot([1, speedup], [y, y], color=tint, lw=1.6, alpha=0.35, zorder=1)
            bound = artefact.number(row, "speedup.bound")
            axes.plot([bound, bound], [y - 0.32, y + 0.32], color=style.INK, lw=2.2, zorder=3)
            if not np.isnan(published := _published_speed(artefact, row)):
                axes.plot(published, y, "D", color=style.MUTED, mfc="white", zorder=2)
            _bar(axes, y, artefact.interval(row, "speedup"), tint, vertical=False)
            axes.plot(speedup, y, "o", color=tint, markersize=8, zorder=4)
        axes.set_yticks(range(len(rows)), [names[row] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.axvline(1, color=style.MUTED, lw=1)
        axes.set_xlabel(f"Speed-up of {bench_model(artefact)} over the unpruned model in the same process (x)")
        handles = [
            Line2D([], [], marker="o", ls="", color=style.INK, label="measured on this device"),
            Line2D([], [], marker="|", ls="", color=style.INK, ms=13, mew=2.2, label="bound: ratio of multiply-adds"),
            Line2D([], [], marker="D", ls="", color=style.MUTED, mfc="white", label="published: on the paper's GPU"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def forest(artefact: Artefact, cost: str = "train_speedup") -> Figure:
    """Ablations: accuracy of every variant minus its baseline's with the interval, and beside it what it costs.

    Args:
        artefact: every measured row but the baseline is drawn, in the order of the grid.
        cost: quantity of the right panel, a key of ``COSTS``: a ratio to the baseline (1 = the same).
    """
    rows = [row for row in artefact.frame.index if artefact.interval(row, f"{artefact.primary}_difference") is not None]
    with style.style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(style.WIDTH, 1.9 + 0.3 * max(len(rows), 3)), width_ratios=(2.1, 1), sharey=True
        )
        left.set_title(f"Accuracy (scale: {artefact.manifest.scale})")
        left.set_xlabel(f"{quantity(artefact.primary).label} minus that of {_quoted(artefact)} (points)")
        right.set_title("Cost")
        right.set_xlabel(COSTS[cost])
        if not rows:
            right.set_axis_off()
            return _nothing(figure, left, "no variant has been trained at this scale")
        _seeds(left, artefact, rows)
        for y, row in enumerate(rows):
            _forest_row(artefact, row, y, left, right, cost)
        left.set_yticks(range(len(rows)), [str(artefact.frame.at[row, "label"]) for row in rows])
        left.set_ylim(len(rows) - 0.5, -0.5)
        for axes, reference in ((left, 0), (right, 1)):
            axes.axvline(reference, color=style.MUTED, lw=1.2)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        figure.legend(handles=_forest_legend(artefact), loc="outside lower center", ncols=3)
    return figure


def tokens(artefact: Artefact) -> Figure:
    """Tokens (with prefix) at the input and after each block, one line per distinct schedule."""
    traces: dict[tuple[int, ...], list[str]] = {}
    for row in artefact.frame.index:
        record = next(iter(artefact.runs.get(row, {}).values()), None)
        if record and record.get("tokens"):
            traces.setdefault(tuple(record["tokens"]), []).append(row)
    with style.style():
        figure, axes = plt.subplots(figsize=(style.WIDTH, 3.4))
        if not traces:
            return _nothing(figure, axes, "no token counts recorded at this scale")
        # Colour by schedule, dashes without fusion: the two share all but the last blocks.
        names = dict.fromkeys(schedule_name(artefact, rows[0]) for rows in traces.values())
        tints, ends = dict(zip(names, _TINTS * len(names), strict=False)), []
        for trace, rows in traces.items():
            columns = artefact.rows[rows[0]].columns
            tint, fused = tints[schedule_name(artefact, rows[0])], columns.get("fusion") == "llf"
            solid = fused or artefact.reducer(rows[0]) == "none"
            line, fill = ("o-", tint) if solid else ("o--", "white")
            axes.plot(range(len(trace)), trace, line, color=tint, ms=4, mfc=fill)
            text = f"{setting_name(artefact, rows[0])} ({len(rows)} {'row' if len(rows) == 1 else 'rows'})"
            ends.append((len(trace) - 1.0, float(trace[-1]), text, tint))
        axes.set_ylim(0, None)
        axes.set_xlabel("After block (0: input)")
        axes.set_ylabel("Tokens, prefix included")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(axes, ends)
    return figure


def _scatter(figure: Figure, axes: Axes, artefact: Artefact, kind: str) -> list[Label]:
    """Draw one panel; returns x, y, label and colour of each point."""
    names = short_names(artefact, "speed" if kind == "measured" else "paper")
    shown, reference = _points(artefact, kind), artefact.baseline
    if not shown:
        _nothing(figure, axes, "nothing measured at this scale" if kind == "measured" else "nothing published")
        return []
    top = next((y for row, _, y in shown if row == reference), max(y for _, _, y in shown))
    floor = top - OFF_SCALE[kind]
    points = []
    for row, x, y in shown:
        reducer = artefact.reducer(row)
        tint = style.colour(reducer)
        fill = tint if reducer == "none" or artefact.rows[row].columns.get("fusion", "llf") == "llf" else "white"
        if kind == "measured":
            _bar(axes, x, artefact.interval(row, artefact.primary), tint, vertical=True)
        look: dict[str, Any] = {"color": tint, "mfc": fill, "ms": 8, "mew": 1.8, "clip_on": False}
        if y < floor:
            axes.plot(x, floor, "v", **look)
            points.append((x, floor, f"{names[row]} {y:.1f}", tint))
        else:
            axes.plot(x, y, style.marker(reducer), **look, zorder=4)
            points.append((x, y, names[row], tint))
    if any(row == reference for row, _, _ in shown):
        axes.axhline(top, color=style.COLOURS["none"], lw=1, ls=(0, (4, 3)), zorder=0)
    axes.margins(0.08, 0.12)
    if any(y < floor for _, _, y in shown):
        axes.set_ylim(floor, max(y for _, _, y in shown) + 0.1 * OFF_SCALE[kind])
    return points


def _points(artefact: Artefact, kind: str) -> list[tuple[str, float, float]]:
    """Row, speed-up and accuracy of the rows that have both, measured or published."""
    found = []
    for row in artefact.frame.index:
        accuracy = artefact.number(row, f"{artefact.primary}.{kind}")
        speed = artefact.number(row, "speedup.measured") if kind == "measured" else _published_speed(artefact, row)
        if row == artefact.baseline and np.isnan(speed):
            speed = 1.0  # by definition
        if not np.isnan(speed + accuracy):
            found.append((row, speed, accuracy))
    return found


def _obstacles(axes: Axes, artefact: Artefact, kind: str) -> list[Box]:
    """The unpruned model's line and the intervals of a panel, in data units."""
    level = artefact.number(str(artefact.baseline), f"{artefact.primary}.{kind}")
    boxes = [] if np.isnan(level) else [(axes.get_xlim()[0], level, axes.get_xlim()[1], level)]
    for row in artefact.frame.index if kind == "measured" else ():
        x, interval = artefact.number(row, "speedup.measured"), artefact.interval(row, artefact.primary)
        if interval is not None and interval.low is not None and interval.high is not None and not np.isnan(x):
            boxes.append((x, interval.low, x, interval.high))
    return boxes


def _published_speed(artefact: Artefact, row: str) -> float:
    """The paper's throughput over its unpruned one, finer than the speed-up that it rounds to one digit."""
    ours, base = (artefact.number(r, "images_per_s.published") for r in (row, str(artefact.baseline)))
    return artefact.number(row, "speedup.published") if np.isnan(ours / base) else ours / base


def _seeds(axes: Axes, artefact: Artefact, rows: Sequence[str]) -> None:
    """A small dot for the difference of every seed, where there are several: dots say more than their interval."""
    name, base = artefact.primary, str(artefact.baseline)
    dots = [
        (value - artefact.values(base, name)[seed], y - 0.25)  # beside the interval, not beneath it
        for y, row in enumerate(rows)
        for seed, value in artefact.values(row, name).items()
        if seed in artefact.values(base, name)
    ]
    if len(artefact.manifest.seeds) > 1:
        label = axes.get_xlabel()
        sns.stripplot(
            pd.DataFrame(dots, columns=["difference", "row"]), x="difference", y="row", orient="h", jitter=False,
            native_scale=True, color=style.MUTED, size=4, alpha=0.6, ax=axes, zorder=2.5,
        )  # fmt: skip
        axes.set(xlabel=label, ylabel="")


def _forest_row(artefact: Artefact, row: str, y: int, left: Axes, right: Axes, cost: str) -> None:
    difference, price = artefact.interval(row, f"{artefact.primary}_difference"), artefact.interval(row, cost)
    assert difference is not None
    if not np.isnan(published := artefact.number(row, f"{artefact.primary}_difference.published")):
        left.plot(published, y, "D", color=style.MUTED, mfc="white", zorder=2)
    _bar(left, y, difference, style.INK, vertical=False)
    left.plot(difference.mean, y, "o", color=style.INK, zorder=4)
    if price is not None:
        _bar(right, y, price, style.INK, vertical=False)
        right.plot(price.mean, y, "o", color=style.INK, zorder=4)


def _forest_legend(artefact: Artefact) -> list[Line2D]:
    single = len(artefact.manifest.seeds) == 1
    text = "measured (one seed: no interval)" if single else "measured, 95 % interval over seeds"
    handles = [Line2D([], [], marker="o", ls="" if single else "-", color=style.INK, label=text)]
    if not single:
        handles.append(Line2D([], [], marker="o", ls="", color=style.MUTED, alpha=0.6, ms=4, label="single seeds"))
    if not all(
        np.isnan(artefact.number(row, f"{artefact.primary}_difference.published")) for row in artefact.frame.index
    ):
        handles.append(Line2D([], [], marker="D", ls="", color=style.MUTED, mfc="white", label="published (paper)"))
    return handles


def _quoted(artefact: Artefact) -> str:
    return f"“{artefact.rows[artefact.baseline].label}”" if artefact.baseline else "the baseline"


def _bar(axes: Axes, at: float, interval: Interval | None, tint: str, vertical: bool) -> None:
    """The interval as a line; nothing where there is none."""
    if interval is None or interval.low is None or interval.high is None:
        return
    ends = [interval.low, interval.high]
    x, y = ([at, at], ends) if vertical else (ends, [at, at])
    axes.plot(x, y, color=tint, lw=2, solid_capstyle="round", zorder=3)


def _nothing(figure: Figure, axes: Axes, text: str) -> Figure:
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, ha="center", va="center", color=style.MUTED, transform=axes.transAxes)
    return figure
