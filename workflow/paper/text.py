"""Sentences of the notebooks and the report, computed from records, so that they are true of whatever was measured.

Every function returns Markdown. None of them contains a result; all of them say when something was not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from workflow.paper import relevance as curves
from workflow.paper.claims import Judgement
from workflow.paper.load import CONFIDENCE, Artefact, make_command
from workflow.paper.names import bench_model, row_names, schedules
from workflow.paper.quantities import quantity
from workflow.paper.stats import Interval, difference_interval


def paper_says(artefact: Artefact) -> str:
    """The published numbers of this artefact: baseline and range by quantity, with source and confidence."""
    published, names = artefact.published, row_names(artefact, "paper")
    if published.empty:
        return "**The paper** gives no numbers for this."
    sentences = []
    for name, part in published[published["row"].isin(list(names))].groupby("quantity", sort=False):
        if name in ("images_per_s", "base_images_per_s"):
            continue  # on another machine: the table has them, a sentence would invite comparison
        values = dict(zip(part["row"], part["value"], strict=True))
        base = values.pop(artefact.baseline, None)
        words = [] if base is None else [_published(str(name), base, [names[str(artefact.baseline)]])]
        if values:
            ends = list(dict.fromkeys((min(values.values()), max(values.values()))))
            texts = [_published(str(name), end, [names[r] for r in values if values[r] == end]) for end in ends]
            others = f"from {' to '.join(texts)}" if len(texts) > 1 else texts[0]
            words.append(others if base is None else f"the others {others}")
        sentences.append(f"{quantity(str(name)).label} {', '.join(words)}")
    sources = []
    for confidence, part in published.groupby("confidence", sort=False):
        where = ", ".join(dict.fromkeys(part["source"]))
        sources.append(f"{where}; confidence {confidence}: {CONFIDENCE.get(str(confidence), 'not explained')}")
    return f"**The paper** reports {'; '.join(sentences)}. ({'. '.join(sources)}.)"


def _published(name: str, value: float, rows: Sequence[str]) -> str:
    return f"{quantity(name).write(format(value, 'g'))} ({', '.join(rows)})"


def how_to_read(artefact: Artefact) -> str:
    """Which kinds of numbers a table holds, and which model each belongs to."""
    label = quantity(artefact.primary).label
    text = (
        "Three kinds of numbers stand side by side and never in one column: *measured* (a record of this machine), "
        "*published* (the paper's, with source and confidence) and *bound* or *predicted* (a formula). A number "
        f"measured at a small scale is not the paper's number, even where both are called {label}."
    )
    if artefact.benches:
        text += (
            "\n\nAccuracy and speed are measured apart. Accuracy: the model of this scale, fine-tuned and evaluated "
            "here, every row from the same weights with the same recipe. Speed: the deployed "
            f"{bench_model(artefact)} with random weights, on which speed does not depend; the bound is the ratio of "
            "multiply-adds, unpruned over pruned. So a row is not one network that has both, except where the two "
            "models named above are the same."
        )
        if pairs := schedules(artefact):
            text += f" Nor is it one schedule: {' or '.join(f'*{pair}*' for pair in pairs)}."
    return text


def coverage(artefact: Artefact) -> str:
    """How many rows are measured, and which are missing for what reason."""
    rows, names = artefact.manifest.rows, row_names(artefact)
    missing = [row for row in rows if not row.available]
    text = f"{len(rows) - len(missing)} of {len(rows)} rows are measured at this scale."
    if missing:
        reasons: dict[str, list[str]] = {}
        for row in missing:
            reasons.setdefault(row.why or "no reason given", []).append(names[row.row])
        listed = "; ".join(f"{', '.join(labels)} ({why})" for why, labels in reasons.items())
        text += f" Not available: {listed}."
    untimed = [names[row.row] for row in rows if row.available and not row.unpruned and row.row not in artefact.benches]
    if artefact.benches and untimed:
        timed = ", ".join(names[row] for row in artefact.benches)
        text += f" Speed was measured of {timed} beside the unpruned model, and not of {', '.join(untimed)}."
    return text


def accuracy(artefact: Artefact) -> str:
    """Accuracy of the baseline, and which rows lie clearly above or below it, or neither."""
    base, names, primary = artefact.baseline, row_names(artefact), artefact.primary
    entry = quantity(primary)
    interval = artefact.interval(base, primary) if base else None
    if base is None or interval is None:
        return f"No {entry.label} was measured at this scale."
    differences = {row: artefact.interval(row, f"{primary}_difference") for row in artefact.frame.index if row != base}
    known = {row: difference for row, difference in differences.items() if difference is not None}
    text = f"**{names[base]}** reaches {entry.write(interval.format())} {entry.label}. "
    if not known:
        return text + "No other row was measured."
    best, worst = max(known, key=lambda r: known[r].mean), min(known, key=lambda r: known[r].mean)
    ends = [f"{_points(known[row])} ({names[row]})" for row in dict.fromkeys((worst, best))]
    text += f"Against it the other rows lie between {ends[0]} and {ends[1]}. " if len(ends) > 1 else ""
    return text + _sorted_out(known, names, "it")


def against_paper(artefact: Artefact) -> str:
    """Where the order of two rows is the paper's, where it is not, and where the seeds leave it open.

    Pairs of rows that have both a published and a measured accuracy; a pair that the paper has level says nothing. The
    measured difference is paired by seed, and a contradiction is stated with its interval.
    """
    name, names = artefact.primary, row_names(artefact)
    entry = quantity(name)
    rows = [r for r in artefact.frame.index if pd.notna(artefact.number(r, f"{name}.published"))]
    rows = sorted((r for r in rows if artefact.values(r, name)), key=lambda r: -artefact.number(r, f"{name}.published"))
    found: dict[str, list[str]] = {"agrees": [], "contradicted": [], "open": []}
    for high, low in combinations(rows, 2):
        published = artefact.number(high, f"{name}.published") - artefact.number(low, f"{name}.published")
        ours, theirs = artefact.values(high, name), artefact.values(low, name)
        if published == 0 or not ours.keys() & theirs.keys():
            continue
        interval = difference_interval(ours, theirs)
        text = f"{names[high]} minus {names[low]}: {_points(interval)} here, {published:+.1f} in the paper"
        if interval.low is None or interval.high is None:
            found["open"].append(text)
        else:
            found["agrees" if interval.low > 0 else "contradicted" if interval.high < 0 else "open"].append(text)
    total = sum(map(len, found.values()))
    if not total:
        return "**Against the paper.** No two rows are both measured here and published."
    counts = f"Of {total} pair{'s' if total > 1 else ''} of rows that the paper puts in an order by {entry.label}"
    if len(artefact.manifest.seeds) == 1:
        return f"**Against the paper.** {counts}, one seed decides none: it has no interval."
    text = (
        f"**Against the paper.** {counts}, {len(found['agrees'])} have the same order here with a 95 % interval clear "
        f"of zero, {len(found['open'])} are undecided, {len(found['contradicted'])} are contradicted."
    )
    if found["contradicted"]:
        listed = "\n".join(f"- {line}" for line in found["contradicted"])
        text += f" **This scale contradicts the paper in:**\n\n{listed}"
    return text


def speed(artefact: Artefact) -> str:
    """Measured speed-ups next to their bounds, Cropr's over that of the random choice, and the memory that it adds.

    Rows are called by the schedule that was timed.
    """
    names = row_names(artefact, "speed")
    rows = [
        r
        for r in artefact.frame.index
        if artefact.interval(r, "speedup") is not None and artefact.reducer(r) == "cropr"
    ]
    if not rows:
        return "No throughput of Cropr was measured at this scale."
    parts = []
    for row in rows:
        interval, share = artefact.interval(row, "speedup"), artefact.interval(row, "share_of_bound")
        assert interval is not None
        assert share is not None
        bound = artefact.number(row, "speedup.bound")
        parts.append(f"{names[row]} {interval.format(2)}x, {share.mean:.0f} % of its bound of {bound:.2f}x")
    text = f"{bench_model(artefact)}, deployed, on this device: {'; '.join(parts)}."
    for row in rows:
        twin = next((r for r in artefact.frame.index if _twins(artefact, row, r, "random")), None)
        if twin is not None:
            # Of speed-ups, each beside the unpruned model in one process: a slow moment in between cancels out.
            ratio = artefact.number(row, "speedup.measured") / artefact.number(twin, "speedup.measured")
            text += f" The speed-up of {names[row]} is {ratio:.3f} times that of {names[twin]}."
    if "weights_extra.measured" in artefact.frame:
        extra = max(artefact.number(row, "weights_extra.measured") for row in rows)
        text += f" Its weights take {extra:+.2f} % of memory beside the unpruned model's (the most of these rows)."
    return text


def ablations(artefact: Artefact) -> str:
    """Which variants differ from the default, and what training costs with them."""
    text, names = accuracy(artefact), row_names(artefact)
    rows = [row for row in artefact.frame.index if artefact.interval(row, "train_speedup") is not None]
    if rows:
        costs = {row: artefact.number(row, "train_speedup.measured") for row in rows}
        slow, fast = min(costs, key=lambda r: costs[r]), max(costs, key=lambda r: costs[r])
        text += (
            f" A training step runs at {costs[slow]:.2f}x ({names[slow]}) to {costs[fast]:.2f}x ({names[fast]}) the "
            f"speed of that of “{names[str(artefact.baseline)]}”; other jobs of the workflow may have shared the "
            "machine."
        )
    return text


def relevance(artefact: Artefact) -> str:
    """Where the kept patches lie after the last recorded block, per row, against chance."""
    table, chance = curves.curves(artefact), curves.chance(artefact)
    if table.empty or chance is None:
        return "No record at this scale says where the kept patches lie."
    ends = curves.last_block(table)
    parts = [f"{line['label']} {_interval(line).format(0)} %" for _, line in ends.iterrows()]
    blocks = sorted({int(block) for block in ends["block"]})
    text = (
        f"{chance:.0f} % of all patches lie on the object. Of those kept after block {' or '.join(map(str, blocks))}, "
        f"the shares on the object are: {', '.join(parts)}. "
    )
    alive = curves.last_block(table, "object_kept")
    best = alive.iloc[0]
    text += f"Most of the object is still there with {best['label']}: {_interval(best).format(0)} % of its patches. "
    if len(artefact.manifest.seeds) == 1:
        return text + "One seed: these shares have no interval."
    above = [str(r["label"]) for _, r in ends.iterrows() if pd.notna(r["low"]) and r["low"] > chance]
    below = [str(r["label"]) for _, r in ends.iterrows() if pd.notna(r["high"]) and r["high"] < chance]
    text += f"Clearly above chance: {_list(above)}; clearly below: {_list(below)}."
    return text


def maps(summary: pd.DataFrame, names: Mapping[str, str]) -> str:
    """What the pictures show in numbers: patches of the object and others that lived to the end, and right answers.

    Args:
        summary: of ``maps.survival``.
        names: labels by row.
    """
    if summary.empty:
        return "There are no pruning maps at this scale."
    lines = []
    for row, line in summary.iterrows():
        known = pd.notna(line["object"])
        where = (
            f"never pruned: {line['object']:.0f} % of the object's patches, {line['rest']:.0f} % of the others"
            if known
            else ""
        )
        right = f"right: {line['correct']:.0f} % of the {line['unit']}" if pd.notna(line["correct"]) else ""
        lines.append(f"- **{names[str(row)]}**: {'; '.join(filter(None, (where, right)))}")
    count = int(summary["images"].iloc[0])
    return f"In all {count} images, too few for a comparison:\n\n" + "\n".join(lines)


def verdicts(judgements: Sequence[Judgement]) -> str:
    """How many claims hold, are contradicted or remain undecided."""
    if not judgements:
        return "No claim is stated for this."
    counts = Counter(str(judgement.verdict.outcome) for judgement in judgements)
    words = {
        "holds": ("holds", "hold"),
        "contradicted": ("is contradicted", "are contradicted"),
        "undecided": ("is undecided", "are undecided"),
    }
    parts = [f"{counts[outcome]} {forms[counts[outcome] > 1]}" for outcome, forms in words.items() if counts[outcome]]
    text = f"Of {len(judgements)} claim{'s' if len(judgements) > 1 else ''}, {', '.join(parts)}."
    if any(j.verdict.reason.startswith("one seed") for j in judgements):
        text += " A single seed has no interval: claims about trained models need more of them, such as `seeds=3`."
    return text


def rerun(artefact: Artefact) -> str:
    """The command that makes what is missing or out of date of this artefact, and this page."""
    return f"Everything on this page, as far as it is not there yet: `{make_command(artefact.manifest)}`"


def rerun_row(artefact: Artefact) -> str:
    """The command that trains one row and its baseline alone and compares them; empty without a row to compare."""
    rows = [row.row for row in artefact.manifest.rows if row.available and row.row != artefact.baseline]
    if artefact.baseline is None or not rows:
        return ""
    choice = f"{artefact.manifest.artefact}/{rows[0]}"
    return (
        f"One row beside its baseline and nothing else, here `{rows[0]}`, with three seeds: "
        f"`snakemake --cores all --config scale={artefact.manifest.scale} seeds=3 row={choice} -- compare`"
    )


def _sorted_out(known: Mapping[str, Interval], names: Mapping[str, str], what: str) -> str:
    """Rows clearly above, clearly below, and neither."""
    if not any(interval.known for interval in known.values()):
        return "One seed: these differences have no interval, so none of them is decided."
    groups: dict[str, list[str]] = {"above": [], "below": [], "neither": []}
    for row, interval in known.items():
        above, below = interval.low is not None and interval.low > 0, interval.high is not None and interval.high < 0
        groups["above" if above else "below" if below else "neither"].append(names[row])
    return (
        f"With 95 % intervals clear of zero, above {what}: {_list(groups['above'])}; below: {_list(groups['below'])}; "
        f"undecided: {_list(groups['neither'])}."
    )


def _twins(artefact: Artefact, row: str, other: str, reducer: str) -> bool:
    """Whether ``other`` is the same row but for its method."""
    mine, theirs = artefact.rows[row].columns, artefact.rows[other].columns
    same = all(mine.get(key) == theirs.get(key) for key in ("schedule", "fusion", "pool"))
    return same and artefact.reducer(other) == reducer and artefact.interval(other, "speedup") is not None


def _interval(line: pd.Series) -> Interval:
    low, high = (None if pd.isna(line[key]) else float(line[key]) for key in ("low", "high"))
    return Interval(float(line["mean"]), low, high, int(line["seeds"]))


def _points(interval: Interval) -> str:
    return f"{interval.format(1, signed=True)} points"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
