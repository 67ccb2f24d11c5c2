"""Sentences of the notebooks and the report, computed from records, so that they are true of whatever was measured.

Every function returns Markdown. None of them contains a result; all of them say when something was not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from cropr.report import relevance as curves
from cropr.report.claims import Judgement
from cropr.report.load import CONFIDENCE, Artefact, Record, make_command, row_names
from cropr.report.quantities import quantity
from cropr.report.stats import Interval


def scope(artefact: Artefact) -> str:
    """What the numbers of this scale can be used for."""
    scale = artefact.manifest.scale
    if scale == "ci":
        return "**The scale `ci` only tests that everything runs. Its accuracies, speeds and verdicts mean nothing.**"
    if scale == "paper":
        return "This scale trains the paper's model on the paper's images."
    return (
        f"At the scale `{scale}` the accuracies belong to other models and images than the paper's: what can be "
        "compared is the order of methods, not the numbers."
    )


def setting(artefact: Artefact) -> str:
    """What the numbers were made with, as a table, and what they can be used for."""
    body = "\n".join(f"| {name} | {text} |" for name, text in settings(artefact))
    return f"{scope(artefact)}\n\n**How the numbers were made**\n\n| | |\n| :-- | :-- |\n{body}"


def settings(artefact: Artefact) -> list[tuple[str, str]]:
    """Scale, data, model, training, speed measurement, machine and code; several values stand on lines of their own."""
    manifest = artefact.manifest
    trained = [record for records in artefact.runs.values() for record in records.values()]
    benched = list(artefact.benches.values())
    lines = [("Scale", f"`{manifest.scale}`"), ("Seeds", _seeds(manifest.seeds))]
    if trained:
        lines += [
            ("Accuracy: images", _unique(_images(r) for r in trained)),
            ("Accuracy: model", _unique(_model(r["spec"]["model"]) for r in trained)),
            ("Accuracy: training", _unique(_training(r) for r in trained)),
        ]
    if benched:
        lines.append(("Speed: model", _unique(_bench(r) for r in benched)))
    if trained or benched:
        lines += [
            ("Machine", _unique(_machine(r) for r in trained + benched)),
            ("Code", _unique(map(_code, trained + benched))),
        ]
    return lines


def paper_says(artefact: Artefact) -> str:
    """The published numbers of this artefact: baseline and range by quantity, with source and confidence."""
    published, names = artefact.published, row_names(artefact, paper=True)
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
        text += f" Not yet available: {listed}."
    return text


def accuracy(artefact: Artefact) -> str:
    """Accuracy of the baseline, and which rows lie clearly above or below it, or neither."""
    base, names = artefact.baseline, row_names(artefact)
    interval = artefact.interval(base, "top1") if base else None
    if base is None or interval is None:
        return "No accuracy was measured at this scale."
    differences = {row: artefact.interval(row, "top1_difference") for row in artefact.frame.index if row != base}
    known = {row: difference for row, difference in differences.items() if difference is not None}
    text = f"**{names[base]}** reaches {interval.format()} % top-1. "
    if not known:
        return text + "No other row was measured."
    best, worst = max(known, key=lambda r: known[r].mean), min(known, key=lambda r: known[r].mean)
    ends = [f"{_points(known[row])} ({names[row]})" for row in dict.fromkeys((worst, best))]
    text += f"Against it the other rows lie between {ends[0]} and {ends[1]}. " if len(ends) > 1 else ""
    return text + _sorted_out(known, names, "it")


def speed(artefact: Artefact) -> str:
    """Measured speed-ups next to their bounds, Cropr's over that of the random choice, and the memory that it adds."""
    names = row_names(artefact)
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
    text = f"Deployed, on this device: {'; '.join(parts)}."
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
            "speed of the default's; other jobs of the workflow may have shared the machine."
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
        right = f"{line['correct']:.0f} % of the images are classified correctly" if pd.notna(line["correct"]) else ""
        lines.append(f"- **{names[str(row)]}**: {'; '.join(filter(None, (where, right)))}")
    count = int(summary["images"].iloc[0])
    return f"In these {count} images, too few for a comparison:\n\n" + "\n".join(lines)


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


def _unique(texts: Iterable[str]) -> str:
    """Each text once, the most frequent first; many of them are counted."""
    found = [text for text, _ in Counter(texts).most_common()]
    return "<br>".join(found[:4]) + (f"<br>and {len(found) - 4} more" if len(found) > 4 else "")


def _seeds(seeds: Sequence[int]) -> str:
    return "one (no intervals over seeds)" if len(seeds) == 1 else ", ".join(map(str, seeds))


def _images(record: Record) -> str:
    data = record["spec"]["data"]
    size, scenes = data["image_size"], data.get("scenes")
    if not scenes:
        count = record["metrics"].get("val_images")
        return f"{data['num_classes']} classes, {size} px" + (f", {int(count):,} for validation" if count else "")
    return f"`scenes` (generated), {size} px, {scenes['train']:,} for training, {scenes['val']:,} for validation"


def _model(model: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in model.get("args", {}).items() if "pool" not in key}
    arguments = ", ".join(f"{key}={value}" for key, value in shown.items())
    return f"`{model['name']}`" + (f" with {arguments}" if arguments else "")


def _training(record: Record) -> str:
    spec, metrics = record["spec"], record["metrics"]
    start = {"random": "random weights", "timm": "timm's pretrained weights"}.get(
        spec["init"], "the weights of the pretraining run"
    )
    seen = f"{int(metrics['images']):,} images" if "images" in metrics else f"{spec['recipe']['epochs']} epochs"
    return f"{seen} from {start}, batches of {spec['recipe']['batch_size']}, {spec['recipe']['precision']}"


def _bench(record: Record) -> str:
    spec = record["spec"]
    return (
        f"{_model(spec['model'])} at {spec['image_size']} px, random weights, batches of {spec['batch_size']}, "
        f"{spec['precision']}, median of {spec['rounds']} rounds, unpruned and pruned interleaved in one process"
    )


def _machine(record: Record) -> str:
    origin = record["provenance"]
    device = origin.get("device") or "unknown device"
    name = origin.get("cpu") or "CPU of unknown name" if device == "cpu" else device
    threads = origin.get("threads", "?")
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def _code(record: Record) -> str:
    origin = record["provenance"]
    commit = f"commit {str(origin['commit'])[:10]}" if origin.get("commit") else "no git checkout"
    versions = origin.get("packages", {})
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)
    return (
        f"{commit}{' with local changes' if origin.get('dirty') else ''}; Python {origin.get('python', '?')}, {shown}"
    )
