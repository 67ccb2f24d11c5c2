"""Do the kept patches lie on the object? Curves by block from the records of a data set whose truth is known."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workflow.paper import style
from workflow.paper.labels import label_ends
from workflow.paper.load import RELEVANCE, Artefact
from workflow.paper.stats import mean_interval


def curves(artefact: Artefact) -> pd.DataFrame:
    """Relevance by row, block and measure: columns row, label, reducer, block, measure, mean, low, high, seeds.

    The unpruned row is left out: it keeps all patches, so that its line is the chance level (see ``chance``).
    Block 0 is the input, before any pruning, where the records give it or the unpruned row does.
    """
    lines: list[dict[str, Any]] = []
    start = chance(artefact)
    for row, records in artefact.runs.items():
        if artefact.reducer(row) == "none":
            continue
        blocks: dict[int, list[dict[str, float]]] = {}
        for record in records.values():
            for entry in record.get("series", {}).get("relevance", []):
                blocks.setdefault(int(entry["block"]), []).append(entry)
        named = {"row": row, "label": artefact.rows[row].label, "reducer": artefact.reducer(row)}
        if blocks and 0 not in blocks and start is not None:
            values = dict(zip(RELEVANCE, (start, 100.0), strict=True))
            lines += [{**named, "block": 0, "measure": m, "mean": v, "seeds": len(records)} for m, v in values.items()]
        for block, entries in sorted(blocks.items()):
            for measure in RELEVANCE:
                interval = mean_interval([entry[measure] for entry in entries])
                lines.append(
                    {**named, "block": block, "measure": measure, "mean": interval.mean, "low": interval.low,
                     "high": interval.high, "seeds": interval.n}
                )  # fmt: skip
    columns = ["row", "label", "reducer", "block", "measure", "mean", "low", "high", "seeds"]
    return pd.DataFrame(lines, columns=columns).astype({"low": float, "high": float})


def chance(artefact: Artefact) -> float | None:
    """Share of all patches that lie on the object, percent: what a choice blind to the image would keep on average.

    Read off the unpruned model, or off the input of a pruned one; None if no record has it.
    """
    for row, records in artefact.runs.items():
        for record in records.values():
            series = record.get("series", {}).get("relevance", [])
            found = [e for e in series if int(e["block"]) == 0 or artefact.reducer(row) == "none"]
            if found:
                return float(found[0]["kept_on_object"])
    return None


def last_block(table: pd.DataFrame, measure: str = "kept_on_object") -> pd.DataFrame:
    """The line of every row at its last recorded block, best first; index row."""
    part = table[table["measure"] == measure]
    return part.sort_values("block").groupby("row").tail(1).set_index("row").sort_values("mean", ascending=False)


def figure(artefact: Artefact) -> Figure:
    """Both measures by block, a line per row; bands are 95 % intervals over seeds where there are several."""
    table, level = curves(artefact), chance(artefact)
    with style.style():
        plot, both = plt.subplots(1, 2, figsize=(style.WIDTH, 4.2))
        titles = ("Kept patches that lie on the object", "Object patches that are still alive")
        units = ("Share of the kept patches (%)", "Share of the object's patches (%)")
        for axes, measure, title, unit in zip(both, RELEVANCE, titles, units, strict=True):
            axes.set_title(title)
            axes.set_ylabel(unit)
            axes.set_xlabel("After block (0: input)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _lines(axes, table[table["measure"] == measure])
        if table.empty:
            for axes in both:
                axes.text(0.5, 0.5, "no record with relevance at this scale", ha="center", transform=axes.transAxes)
            return plot
        both[1].set_ylim(0, 105)
        highest = max(table.loc[table["measure"] == RELEVANCE[0], "mean"].max(), level or 0)
        both[0].set_ylim(0, min(105.0, 1.15 * highest))
        if level is not None:
            both[0].axhline(level, color=style.MUTED, lw=1.2, ls=(0, (4, 3)), zorder=1)
        for axes, measure in zip(both, RELEVANCE, strict=True):
            lines = [line for _, line in last_block(table, measure).iterrows()]
            ends = [(line["block"], line["mean"], line["label"], style.colour(line["reducer"])) for line in lines]
            if measure == RELEVANCE[0] and level is not None:
                ends.append((max(end[0] for end in ends), level, f"chance: {level:.0f} %", style.MUTED))
            label_ends(axes, ends)
    return plot


def _lines(axes: Axes, table: pd.DataFrame) -> None:
    for _, line in table.groupby("row", sort=False):
        tint = style.colour(line["reducer"].iloc[0])
        axes.plot(line["block"], line["mean"], "o-", color=tint, ms=4)
        if line["low"].notna().any():
            axes.fill_between(line["block"], line["low"], line["high"], color=tint, alpha=0.18, lw=0)
