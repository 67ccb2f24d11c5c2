"""Sentences of the laboratory's notebooks, computed from records. Each takes an artefact from ``lab_load.with_cells``.

Every function returns Markdown, and says so where nothing was measured.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from workflow.paper.lab_load import UNPRUNED, cells_of, distinct, rows_of
from workflow.paper.lab_tables import alignment, relative, smooth_excess, steps, unaligned_costs
from workflow.paper.load import Artefact
from workflow.paper.stats import Interval

NOTHING = "Nothing of this was measured at this scale."
PRUNING_GOAL = 3.0
"""Percent of the forward pass that scoring, selection, gathering and fusion should stay under."""


def precision(artefact: Artefact) -> str:
    """By row: the fastest setting of the unpruned model, and what pruning gives on top of it."""
    lines = []
    for row in rows_of(artefact, "sweep"):
        frame = cells_of(artefact, row)
        base = frame[frame["variant"] == UNPRUNED]
        if base.empty:
            continue
        best = base.iloc[int(base["images_per_s.measured"].argmax())]
        first = base.iloc[0]
        text = f"**{best['label']}**: the unpruned model is fastest with {_setting(best)}"
        if len(base) > 1:
            text += f", {_ratio(best, 'gain')} the speed that it has with {_setting(first)}"
        same = (frame["precision"] == best["precision"]) & (frame["attention"] == best["attention"])
        tops = frame[same & (frame["variant"] != UNPRUNED) & (frame["batch_size"] == best["batch_size"])]
        parts = [
            f"{line['name']} {_ratio(line, 'speedup')}, {_interval(line, 'share_of_bound').format(0)} % of its bound"
            for _, line in tops.iterrows()
        ]
        lines.append(f"- {text}." + (f" On top of it: {'; '.join(parts)}." if parts else ""))
    return "\n".join(lines) or NOTHING


def kernels(artefact: Artefact) -> str:
    """What could not be measured, and why."""
    frame = artefact.frame
    gone = frame[frame["why"].notna()] if len(frame) else frame
    if gone.empty:
        return "Every combination ran; the forced attention kernel was seen at work in each."
    reasons = [f"- {reason} ({count} cells)" for reason, count in gone["why"].value_counts(sort=False).items()]
    return (
        f"{len(gone)} of {len(frame)} cells were not measured. In all others the forced attention kernel was seen at "
        "work.\n\n" + "\n".join(reasons)
    )


def aligned(artefact: Artefact) -> str:
    """By row of blocks: what one token above a multiple costs, and how far counts lie off the smooth curve."""
    lines = []
    for row in rows_of(artefact, "blocks"):
        frame = cells_of(artefact, row)
        excess, after = smooth_excess(frame), steps(frame)
        if not excess or not after:
            continue
        eights = {count: cost for count, cost in after.items() if alignment(count) > 1}
        worst = max(eights or after, key=lambda count: after[count])
        off = max(excess, key=lambda count: abs(excess[count] - 1))
        text = (
            f"- **{frame.iloc[0]['label']}**: the costliest single token above a multiple is the one after {worst}, "
            f"{after[worst]:.2f} times the latency"
        )
        if eights:
            text += f" (median over multiples: {float(np.median(list(eights.values()))):.2f})"
        lines.append(
            f"{text}. Farthest from a smooth curve lie {off} tokens, {100 * (excess[off] - 1):+.0f} %; the median "
            f"distance is {100 * float(np.median([abs(value - 1) for value in excess.values()])):.1f} %."
        )
    return "\n".join(lines) or NOTHING


def schedules(artefact: Artefact) -> str:
    """By row of schedules: what counts that are not aligned cost, decided by intervals."""
    lines = []
    for row in rows_of(artefact, "sweep"):
        frame = cells_of(artefact, row)
        several = any(len(distinct(frame, axis)) > 1 for axis in ("precision", "attention", "batch_size"))
        costs = unaligned_costs(artefact, row)
        for cell, line in frame.loc[list(costs)].iterrows():
            cost = costs[str(cell)]
            where = f", {_setting(line)}, batches of {line['batch_size']}" if several else ""
            verdict = _against_one(cost, "these counts cost more", "these counts cost less")
            lines.append(
                f"- **{line['name']}**{where}: {cost.format(3)} times the time a multiply-add of the schedule whose "
                f"counts are all multiples of 8; {verdict}."
            )
    return "\n".join(lines) or NOTHING


def scoring(artefact: Artefact) -> str:
    """What one vector saves over all queries, decided by the interval."""
    lines = []
    for row in rows_of(artefact, "scoring"):
        lines_of = {str(line["variant"]): line for _, line in cells_of(artefact, row).iterrows()}
        if not lines_of:
            continue
        one, every = lines_of["one_vector"], lines_of["all_queries"]
        saved = _interval(one, "over_all_queries")
        lines.append(
            f"- **{one['label']}**: with one vector the pruned model is {saved.format(3)} times as fast as with all "
            f"queries, by multiply-adds alone {one['speedup.bound'] / every['speedup.bound']:.3f}; "
            f"{_against_one(saved, 'one vector is faster', 'one vector is slower')}. Over the unpruned model it is "
            f"{_ratio(one, 'speedup')} against {_ratio(every, 'speedup')}. Of the tokens kept, "
            f"{one['kept_in_both.measured']:.1f} % are the same."
        )
    return "\n".join(lines) or NOTHING


def breakeven(artefact: Artefact) -> str:
    """By model and variant: from which batch size pruning pays, and what it gives for the smallest batch."""
    lines = []
    for row in rows_of(artefact, "sweep"):
        frame = cells_of(artefact, row)
        for name in distinct(frame[frame["variant"] != UNPRUNED], "name"):
            part = frame[frame["name"] == name].sort_values("fitted")
            least, paying = part.iloc[0], part[part["speedup.low"] > 1]
            text = f"- **{least['label']}, {name}**: {_ratio(least, 'speedup')} with batches of {int(least['fitted'])}"
            if len(part) > 1:
                most = part.iloc[-1]
                text += f", {_ratio(most, 'speedup')} with {int(most['fitted'])}"
            text += f" (bound {least['speedup.bound']:.2f}x). "
            if paying.empty:
                text += "At no batch size measured does its interval lie above 1."
            else:
                text += f"Its interval lies above 1 from {int(paying['fitted'].min())} images on."
                if len(after := part[part["fitted"] > paying["fitted"].min()]) > len(paying) - 1:
                    failing = after[~(after["speedup.low"] > 1)]["fitted"].astype(int)
                    text += f" Not at {', '.join(map(str, failing))}, though."
            lines.append(text)
    return "\n".join(lines) or NOTHING


def profile(artefact: Artefact) -> str:
    """What pruning itself takes, and the two largest parts, by variant."""
    lines = []
    for row in rows_of(artefact, "profile"):
        for _, line in cells_of(artefact, row).iterrows():
            shares = {
                str(column).removesuffix("_ms.measured"): 100 * line[column] / line["total_ms.measured"]
                for column in line.index
                if str(column).endswith("_ms.measured") and column != "total_ms.measured" and pd.notna(line[column])
            }
            largest = sorted(shares, key=lambda part: -shares[part])[:2]
            text = f"- **{line['label']}, {line['name']}**: " + ", ".join(f"{p} {shares[p]:.0f} %" for p in largest)
            if line["variant"] != UNPRUNED:
                own = float(line["pruning_share.measured"])
                verdict = "under" if own < PRUNING_GOAL else "**not under**"
                text += (
                    f"; scoring, selection, gathering and fusion together {own:.2f} %, {verdict} the "
                    f"{PRUNING_GOAL:g} % that it should stay below"
                )
            lines.append(f"{text}.")
    return "\n".join(lines) or NOTHING


def memory(artefact: Artefact) -> str:
    """Step time and memory of every variant, relative to the unpruned model."""
    lines = []
    for row in rows_of(artefact, "training"):
        frame = cells_of(artefact, row)
        shares = {
            name: relative(frame, f"{name}.measured") if f"{name}.measured" in frame else [float("nan")] * len(frame)
            for name in ("training_memory_mb", "inference_memory_mb")
        }
        for number, (_, line) in enumerate(frame.iterrows()):
            if line["variant"] == UNPRUNED:
                continue
            text = f"- **{line['label']}, {line['name']}**: a training step runs at {_ratio(line, 'speedup')} the speed"
            training, inference = (values[number] for values in shares.values())
            if not np.isnan(training):
                text += (
                    f" and takes {training:.2f} times the memory of the unpruned model's; a forward pass for inference "
                    f"takes {inference:.2f} times"
                )
            lines.append(f"{text}.")
    return "\n".join(lines) or NOTHING


def _against_one(interval: Interval, above: str, below: str) -> str:
    """What an interval says of 1."""
    if interval.low is None or interval.high is None or interval.low <= 1 <= interval.high:
        return "the interval includes 1, so nothing is decided"
    return f"{above}, the interval lies above 1" if interval.low > 1 else f"{below}, the interval lies below 1"


def _interval(line: pd.Series, name: str) -> Interval:
    """A measured quantity of a cell with its bounds."""
    measured, low, high = (float(line.get(f"{name}.{kind}", np.nan)) for kind in ("measured", "low", "high"))
    return Interval(measured, None, None, 1) if np.isnan(low + high) else Interval(measured, low, high, 1)


def _setting(line: pd.Series) -> str:
    return f"`{line['precision']}` and `{line['attention']}` attention"


def _ratio(line: pd.Series, name: str) -> str:
    """``1.72 [1.70, 1.75]x``."""
    return f"{_interval(line, name).format(2)}x"
