"""Tables of the laboratory's notebooks. Each takes an artefact that comes from ``lab_load.with_cells``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from workflow.paper.lab_load import UNPRUNED, cells_of, distinct, entry, rows_of
from workflow.paper.load import Artefact
from workflow.paper.quantities import quantity
from workflow.paper.stats import ROUNDS, Interval, mean_interval
from workflow.paper.tables import NONE, Table

MEASURED, BOUND = "Measured", "Bound"
BOOTSTRAP = f"Brackets: {ROUNDS}."
CLASSES = (64, 32, 16, 8)
"""Token counts are sorted by the largest of these that divides them."""


def precision_table(artefact: Artefact) -> Table:
    """The grid of precisions, kernels and variants."""
    columns = ("images_per_s", "speedup", "share_of_bound", "gain", "mfu", "working_memory_mb")
    return sweep_table(artefact, columns)


def scoring_table(artefact: Artefact) -> Table:
    """The unpruned model, and those that score with one vector and with all queries."""
    columns = ("images_per_s", "speedup", "share_of_bound", "over_all_queries", "kept_in_both")
    return sweep_table(artefact, columns, measure="scoring")


def schedules_table(artefact: Artefact) -> Table:
    """Sweeps of schedules that differ in their counts alone, and what those that are not aligned cost."""
    table = sweep_table(artefact, ("images_per_s", "speedup", "share_of_bound"))
    costs: list[Interval | None] = []
    for row in rows_of(artefact, "sweep"):
        found = unaligned_costs(artefact, row)
        costs += [found.get(str(cell)) for cell in cells_of(artefact, row, measured=False).index]
    cells = table.cells.assign(cost=[NONE if cost is None else cost.format(3) for cost in costs])
    heads = table.heads | {"cost": "Time a multiply-add, over aligned (x)"}
    measured = [*table.spanners[MEASURED], "cost"]
    order = [key for key in heads if key not in (*measured, "bound")] + measured + ["bound"] * ("bound" in heads)
    return replace(
        table,
        cells=cells,
        heads={key: heads[key] for key in order},
        spanners=table.spanners | {MEASURED: measured},
        caption=f"{BOOTSTRAP} Over aligned: 95 % Student-t over the same rounds, paired.",
    )


def unaligned_costs(artefact: Artefact, row: str) -> dict[str, Interval]:
    """Cell -> seconds a multiply-add over those of the variant whose counts are all multiples of 8, in its setting.

    Paired by round; no cells of a setting (precision, kernel, batch size) where there is no such variant.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    names = cells_of(artefact, row, measured=False).index
    for name, cell in zip(names, artefact.benches[row]["cells"], strict=True):
        if cell["variant"] != UNPRUNED and "unsupported" not in cell:
            group = tuple(cell[axis] for axis in ("precision", "attention", "batch_size"))
            groups.setdefault(group, {})[str(name)] = cell
    costs = {}
    for cells in groups.values():
        base = next((cell for cell in cells.values() if _remainders(cell) == {0}), None)
        for name, cell in cells.items():
            if base is not None and cell is not base:
                costs[name] = mean_interval(
                    [
                        (ours / cell["metrics"]["gmacs"]) / (theirs / base["metrics"]["gmacs"])
                        for ours, theirs in zip(cell["seconds"], base["seconds"], strict=True)
                    ]
                )
    return costs


def _remainders(cell: Mapping[str, Any]) -> set[int]:
    """What a cell's pruned token counts leave when divided by 8."""
    return {count % 8 for count in cell["tokens"] if count != cell["tokens"][0]}


def paper_table(artefact: Artefact) -> Table:
    """What the paper reports of an artefact's rows beside the same measured here: a line a row and quantity."""
    published = artefact.published
    lines = [
        {
            "label": artefact.rows[number["row"]].label,
            "quantity": quantity(number["quantity"]).label,
            "measured": NONE if (own := _own(artefact, number["row"], number["quantity"])) is None else own.format(2),
            "published": f"{number['value']:g}",
            "confidence": number["confidence"],
        }
        for _, number in published.iterrows()
        if number["row"] in artefact.rows
    ]
    heads = {"label": "", "quantity": "", "measured": "This device (x)", "published": "The authors' GPU (x)"}
    heads["confidence"] = "Confidence"
    spanners = {MEASURED: ["measured"], "Published (paper)": ["published", "confidence"]}
    return Table(pd.DataFrame(lines, columns=list(heads)), heads, spanners)


def _own(artefact: Artefact, row: str, name: str) -> Interval | None:
    """What was measured here of a published quantity."""
    if row not in artefact.benches:
        return None
    if name == "unaligned_cost":
        # The published cost is that of one token more than a multiple, so the variant is chosen by its counts: the
        # costlier of several would be biased upwards.
        costs = unaligned_costs(artefact, row)
        cells = zip(cells_of(artefact, row, measured=False).index, artefact.benches[row]["cells"], strict=True)
        return next((costs[str(name)] for name, cell in cells if name in costs and _remainders(cell) == {1}), None)
    assert name == "amp_flash_gain", name
    frame = cells_of(artefact, row)
    chosen = frame[
        (frame["variant"] == UNPRUNED) & frame["precision"].str.startswith("amp_") & (frame["attention"] == "flash")
    ]
    return None if chosen.empty else artefact.interval(str(chosen["gain.measured"].idxmax()), "gain")


def sweep_table(artefact: Artefact, columns: Sequence[str], measure: str = "sweep") -> Table:
    """Cells of all sweeps, those of a row under its label; what could not run says why.

    Args:
        artefact: with cells.
        columns: measured quantities; a column without any number is left out. The bound of the speed-up follows.
        measure: another kind of measurement with a cell a variant.
    """
    rows = rows_of(artefact, measure)
    frame = pd.concat([cells_of(artefact, row, measured=False) for row in rows]) if rows else artefact.frame.iloc[:0]
    axes = {"name": "", "batch_size": "Batch", "precision": "Precision", "attention": "Attention", "tokens": "Tokens"}
    shown = [axis for axis in axes if axis == "name" or len(distinct(frame, axis)) > 1]
    measured = [name for name in columns if _has(frame, f"{name}.measured")]
    cells = pd.DataFrame({axis: [_place(line, axis) for _, line in frame.iterrows()] for axis in shown})
    for name in measured:
        cells[f"measured.{name}"] = [_number(artefact, str(cell), name) for cell in frame.index]
    spanners = {MEASURED: [f"measured.{name}" for name in measured]}
    heads = {axis: axes[axis] for axis in shown} | {f"measured.{name}": entry(name).title for name in measured}
    if "speedup" in measured and _has(frame, "speedup.bound"):
        cells["bound"] = [_write(value, 2) for value in frame["speedup.bound"]]
        heads["bound"], spanners[BOUND] = "Speed-up (x)", ["bound"]
    missing = [not pd.isna(why) for why in frame["why"]] if len(frame) else []
    notes = [f"not measured: {why}" if gone else "" for why, gone in zip(frame.get("why", []), missing, strict=True)]
    return Table(
        cells, heads, spanners, _groups(frame), notes, missing, caption=BOOTSTRAP, unbroken=("precision", "tokens")
    )


def breakeven_table(artefact: Artefact) -> Table:
    """A line a model and batch size; speed-up of every variant with its interval, and the bound."""
    lines: list[dict[str, str]] = []
    groups, notes, grey = [], [], []
    heads, spanners = {"batch": "Batch", "base": "Unpruned (images/s)"}, {MEASURED: ["base"], BOUND: list[str]()}
    for row in rows_of(artefact, "sweep"):
        frame = cells_of(artefact, row, measured=False)
        for batch in distinct(frame, "batch_size"):
            part = frame[frame["batch_size"] == batch]
            line = {"batch": _place(part.iloc[0], "batch_size"), "base": NONE}
            for cell, found in part.iterrows():
                name = str(found["name"])
                if found["variant"] == UNPRUNED:
                    line["base"] = _number(artefact, str(cell), "images_per_s")
                    continue
                if name not in heads:
                    heads |= {name: f"{name} (x)", f"bound {name}": name}
                    spanners[MEASURED].append(name)
                    spanners[BOUND].append(f"bound {name}")
                line[name] = _number(artefact, str(cell), "speedup")
                line[f"bound {name}"] = _write(artefact.number(str(cell), "speedup.bound"), 2)
            reasons = [str(why) for why in part["why"] if not pd.isna(why)]
            lines.append(line)
            groups.append(str(part.iloc[0]["label"]))
            notes.append(f"not measured: {reasons[0]}" if reasons else "")
            grey.append(len(reasons) == len(part))
    # Measured columns first, bounds behind them.
    order = ["batch", *spanners[MEASURED], *spanners[BOUND]]
    cells = pd.DataFrame(lines, columns=order).fillna(NONE)
    spanned = {title: columns for title, columns in spanners.items() if columns}
    return Table(cells, {key: heads[key] for key in order}, spanned, groups, notes, grey, caption=BOOTSTRAP)


def alignment_table(artefact: Artefact) -> Table:
    """Latency of a block over a smooth curve through all counts, by what divides the count; and what one more costs."""
    lines, groups = [], []
    for row in rows_of(artefact, "blocks"):
        frame = cells_of(artefact, row)
        excess, step = smooth_excess(frame), steps(frame)
        for divisor in (*CLASSES, 1):
            counts = [count for count in excess if alignment(count) == divisor]
            if not counts:
                continue
            after = [step[count] for count in counts if count in step]
            lines.append(
                {
                    "class": f"multiple of {divisor}" if divisor > 1 else "others",
                    "counts": str(len(counts)),
                    "excess": f"{100 * (float(np.median([excess[c] for c in counts])) - 1):+.1f}",
                    "median": NONE if not after else f"{float(np.median(after)):.3f}",
                    "most": NONE if not after else f"{max(after):.3f}",
                }
            )
            groups.append(str(frame.iloc[0]["label"]))
    heads = {
        "class": "Token count",
        "counts": "Counts",
        "excess": "Latency, against a smooth curve (%)",
        "median": "One token more, median (x)",
        "most": "One token more, most (x)",
    }
    caption = (
        "A multiple of 32 is not counted again as one of 16 or 8. The smooth curve is the parabola that fits all "
        "counts best. “One token more”: latency of the next count over that of this one."
    )
    cells = pd.DataFrame(lines, columns=list(heads))
    return Table(cells, heads, {MEASURED: ["excess", "median", "most"]}, groups, caption=caption)


def alignment(count: int) -> int:
    """The largest of ``CLASSES`` that divides a count; 1 for none."""
    return next((divisor for divisor in CLASSES if count % divisor == 0), 1)


def smooth_excess(frame: pd.DataFrame) -> dict[int, float]:
    """Token count -> measured latency over that of the parabola a + b N + c N^2 that fits all counts best.

    A block's arithmetic is such a parabola. Relative errors are what is made small.
    """
    counts, latency = _curve(frame)
    if len(counts) < 4:
        return {}
    powers = np.stack([np.ones_like(latency), counts, counts**2], axis=1)
    fitted, *_ = np.linalg.lstsq(powers / latency[:, None], np.ones_like(latency), rcond=None)
    return dict(zip(counts.astype(int).tolist(), (latency / (powers @ fitted)).tolist(), strict=True))


def steps(frame: pd.DataFrame) -> dict[int, float]:
    """Token count -> latency of the next count over its own, where both were measured."""
    counts, latency = _curve(frame)
    known = dict(zip(counts.astype(int).tolist(), latency.tolist(), strict=True))
    return {count: known[count + 1] / seconds for count, seconds in known.items() if count + 1 in known}


def profile_table(artefact: Artefact, categories: Sequence[str]) -> Table:
    """Milliseconds and share of every category; a line a category, columns for the variants of each row."""
    parts = [cells_of(artefact, row) for row in rows_of(artefact, "profile")]
    frame = pd.concat(parts) if parts else artefact.frame.iloc[:0]
    several = len(parts) > 1
    cells, heads, spanners = pd.DataFrame({"part": [*categories, "all"]}), {"part": "Part"}, {}
    for cell, line in frame.iterrows():
        total = line["total_ms.measured"]
        values = [line[f"{name}_ms.measured"] for name in categories] + [total]
        cells[f"{cell} ms"] = [f"{value:.2f}" for value in values]
        cells[f"{cell} %"] = [f"{100 * value / total:.2f}" for value in values]
        heads |= {f"{cell} ms": "ms", f"{cell} %": "%"}
        title = f"{line['label']}: {line['name']}" if several else str(line["name"])
        spanners[title] = [f"{cell} ms", f"{cell} %"]
    return Table(cells, heads, spanners, caption="Measured with torch's profiler, whose own time is in these numbers.")


def training_table(artefact: Artefact) -> Table:
    """Time of a training step and memory, by variant, and relative to the unpruned model."""
    names = ("step_ms", "speedup", "training_memory_mb", "inference_memory_mb", "state_mb")
    frames = [cells_of(artefact, row, measured=False) for row in rows_of(artefact, "training")]
    frame = pd.concat(frames) if frames else artefact.frame.iloc[:0]
    measured = [name for name in names if _has(frame, f"{name}.measured")]
    cells = pd.DataFrame({"name": frame["name"].astype(str).to_numpy() if len(frame) else []})
    heads = {"name": ""}
    for name in measured:
        cells[name] = [_number(artefact, str(cell), name) for cell in frame.index]
        heads[name] = entry(name).title
        if name.endswith("memory_mb"):
            cells[f"{name} share"] = [_write(value, 2) for value in relative(frame, f"{name}.measured")]
            heads[f"{name} share"] = "of unpruned (x)"
    spanners = {MEASURED: [key for key in heads if key != "name"]}
    if _has(frame, "speedup.bound"):
        cells["bound"] = [_write(value, 2) for value in frame["speedup.bound"]]
        heads["bound"], spanners[BOUND] = "Forward pass alone (x)", ["bound"]
    missing = [not pd.isna(why) for why in frame["why"]] if len(frame) else []
    notes = [f"not measured: {why}" if gone else "" for why, gone in zip(frame.get("why", []), missing, strict=True)]
    caption = f"{BOOTSTRAP} The bound leaves out what only training runs: auxiliary heads, and the optimizer."
    return Table(cells, heads, spanners, _groups(frame), notes, missing, caption=caption)


def relative(frame: pd.DataFrame, column: str) -> list[float]:
    """A column over the unpruned model's of the same row."""
    base = {line["row"]: line[column] for _, line in frame.iterrows() if line["variant"] == UNPRUNED}
    return [float(line[column] / base.get(line["row"], np.nan)) for _, line in frame.iterrows()]


def _curve(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Token counts, rising, and the block's latency in ms."""
    ordered = frame.sort_values("tokens")
    return ordered["tokens"].to_numpy(dtype=float), ordered["block_ms.measured"].to_numpy(dtype=float)


def _groups(frame: pd.DataFrame) -> list[str] | None:
    return [str(label) for label in frame["label"]] if len(frame) else None


def _has(frame: pd.DataFrame, column: str) -> bool:
    return column in frame and bool(frame[column].notna().any())


def _place(line: pd.Series, axis: str) -> str:
    """A cell's place on an axis; a batch that was halved for want of memory says so."""
    if axis != "batch_size" or pd.isna(line["fitted"]) or line["fitted"] == line["batch_size"]:
        return str(line[axis])
    return f"{int(line['fitted'])} (out of memory with {line['batch_size']})"


def _number(artefact: Artefact, cell: str, name: str) -> str:
    """A measured number with its interval, if there are any."""
    interval = artefact.interval(cell, name)
    return NONE if interval is None else interval.format(entry(name).digits)


def _write(value: float, digits: int) -> str:
    return NONE if pd.isna(value) else f"{value:.{digits}f}"
