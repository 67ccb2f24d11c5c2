"""What notebooks/plan.ipynb shows: schedules planned for a target, predicted beside measured, and GPUs by formula.

Read from one record of ``python -m cropr plan``, which the manifest names as the measurement of its row.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from workflow.paper import style
from workflow.paper.load import CONFIDENCE, Artefact, Record, make_command, read_published
from workflow.paper.stats import ROUNDS, Interval
from workflow.paper.tables import NONE, Table

GOAL = 5.0
"""Percent by which a prediction may be off."""
DEVICES = {"a100": "A100", "h100": "H100"}
UNITS = {"speedup": "x", "latency_ms": " ms", "flops": " of the FLOPs"}


def record_of(artefact: Artefact) -> Record:
    """The plan's record.

    Raises:
        ValueError: the manifest names none, with the command that makes it.
    """
    for record in artefact.benches.values():
        if record.get("kind") == "plan":
            return record
    raise ValueError(
        f"{artefact.manifest.artefact}: no record of a plan; make it with: {make_command(artefact.manifest)}"
    )


def with_plans(artefact: Artefact) -> Artefact:
    """The artefact with a line for every target in its frame, which is what ``tables/plan.csv`` then holds."""
    record = record_of(artefact)
    lines = []
    for plan in record["series"]["plans"]:
        low, high = plan.get("measured_speedup_low"), plan.get("measured_speedup_high")
        lines.append(
            {
                "row": f"target_{plan['target']:g}",
                "label": f"{plan['target']:g}{UNITS[record['spec']['quantity']]}",
                "family": plan["family"],
                "schedule": plan["described"],
                "tokens": f"{plan['tokens'][0]} to {min(plan['tokens'])}",
                "pruned.predicted": 100 * plan["pruned"],
                "speedup.predicted": plan["predicted_speedup"],
                "speedup.measured": plan.get("measured_speedup"),
                "speedup.low": low,
                "speedup.high": high,
                "speedup.bound": plan.get("bound"),
                "error.measured": plan.get("error_percent"),
            }
        )
    return replace(artefact, frame=pd.DataFrame(lines).set_index("row"))


def plan_table(artefact: Artefact) -> Table:
    """Target, schedule, predicted, measured. ``artefact`` comes from ``with_plans``."""
    frame = artefact.frame
    cells = pd.DataFrame(
        {name: frame[name].astype(str).to_numpy() for name in ("label", "family", "schedule", "tokens")}
    )
    cells["pruned"] = [f"{share:.0f}" for share in frame["pruned.predicted"]]
    cells["predicted"] = [f"{value:.2f}" for value in frame["speedup.predicted"]]
    cells["measured"] = [_interval(line) for _, line in frame.iterrows()]
    cells["error"] = [NONE if pd.isna(value) else f"{value:+.1f}" for value in frame["error.measured"]]
    cells["bound"] = [NONE if pd.isna(value) else f"{value:.2f}" for value in frame["speedup.bound"]]
    heads = {
        "label": "Target",
        "family": "Family",
        "schedule": "Schedule",
        "tokens": "Tokens",
        "pruned": "Patches pruned (%)",
        "predicted": "Speed-up (x)",
        "measured": "Speed-up (x)",
        "error": "Predicted over measured (%)",
        "bound": "Speed-up (x)",
    }
    spanners = {"Predicted (formula)": ["predicted"], "Measured": ["measured", "error"], "Bound": ["bound"]}
    caption = f"Brackets: {ROUNDS}."
    return Table(cells, heads, spanners, caption=caption, unbroken=("schedule", "tokens"))


def plan_sentences(artefact: Artefact) -> str:
    """How far predictions are off, and how far each family reaches."""
    record = record_of(artefact)
    metrics, plans = record["metrics"], record["series"]["plans"]
    reach = ", ".join(
        f"{line['family']} {line['predicted_speedup']:.2f}x ({line['described']})" for line in record["series"]["reach"]
    )
    text = f"The largest speed-up predicted of each family here: {reach}."
    if "largest_error_percent" not in metrics:
        return f"These plans were not measured. {text}"
    within = sum(abs(plan["error_percent"]) <= GOAL for plan in plans)
    inside = sum(
        plan["measured_speedup_low"] <= plan["predicted_speedup"] <= plan["measured_speedup_high"] for plan in plans
    )
    return (
        f"**{within} of {len(plans)} predictions are within {GOAL:g} % of the measured speed-up**, {inside} lie in its "
        f"interval; the largest error is {metrics['largest_error_percent']:.1f} %, the median "
        f"{metrics['median_error_percent']:.1f} %. {text}"
    )


def plan_figure(artefact: Artefact) -> Figure:
    """Measured against predicted speed-up with the goal as a band; and what a block costs by its token count."""
    record = record_of(artefact)
    plans = [plan for plan in record["series"]["plans"] if "measured_speedup" in plan]
    with style.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 4.2))
        left.set_title("Speed-up of the planned schedules")
        left.set_xlabel("Predicted (x)")
        left.set_ylabel("Measured (x)")
        predicted = np.array([plan["predicted_speedup"] for plan in plans])
        if plans:
            ends = np.array([0.95 * predicted.min(), 1.05 * predicted.max()])
            left.plot(ends, ends, color=style.MUTED, lw=1)
            left.fill_between(
                ends, ends / (1 + GOAL / 100), ends / (1 - GOAL / 100), color=style.GRID, label=f"within {GOAL:g} %"
            )
            left.legend(loc="upper left")
        for plan in plans:
            low, high = plan["measured_speedup_low"], plan["measured_speedup_high"]
            left.vlines(plan["predicted_speedup"], low, high, color=style.colour("cropr"), lw=1.6)
            left.plot(plan["predicted_speedup"], plan["measured_speedup"], "o", color=style.colour("cropr"))
        if not plans:
            left.text(0.5, 0.5, "not measured", transform=left.transAxes, ha="center", color=style.MUTED)
        costs = record["series"]["costs"]
        right.set_title("What was timed")
        right.set_xlabel("Tokens")
        right.set_ylabel("Latency of a batch (ms)")
        names = {"block": ("one block", style.INK), "reduce": ("scoring and gathering after it", style.colour("cropr"))}
        for key, (name, tint) in names.items():
            right.plot(
                [point["tokens"] for point in costs[key]],
                [point["ms"] for point in costs[key]],
                "o-", color=tint, ms=4, lw=1.4, label=name,
            )  # fmt: skip
        right.set_ylim(bottom=0)
        right.legend(loc="upper left")
    return figure


def gpu_table(artefact: Artefact) -> Table:
    """Speed-ups of the paper's schedules by the roofline, beside what the paper reports of its own GPU."""
    published = _published(artefact)
    lines: dict[str, dict[str, str]] = {}
    for found in record_of(artefact)["series"]["gpus"]:
        line = lines.setdefault(found["row"], {"label": found["label"], "bound": f"{found['bound']:.2f}"})
        line[found["device"]] = f"{found['speedup']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
    for row, line in lines.items():
        line["published"] = f"{published[row]:.1f}" if row in published else NONE
    devices = [name for name in DEVICES if any(name in line for line in lines.values())]
    cells = pd.DataFrame(list(lines.values()), columns=["label", *devices, "bound", "published"])
    heads = {"label": "", **{name: f"{DEVICES[name]} (x)" for name in devices}, "bound": "FLOPs (x)"}
    heads["published"] = "Paper's GPU (x)"
    spanners = {"Predicted (roofline)": devices, "Bound": ["bound"], "Published (paper)": ["published"]}
    caption = (
        "Predicted from data sheets, not measured. In parentheses: the same for other assumptions about how much of "
        "their peak matrix products reach."
    )
    return Table(cells, heads, spanners, caption=caption)


def gpu_sentences(artefact: Artefact) -> str:
    """Where the published speed-ups lie against the predicted ones, and how sure the published are."""
    gpus, published = record_of(artefact)["series"]["gpus"], _published(artefact)
    pairs = [(published[line["row"]], line) for line in gpus if line["row"] in published]
    if not pairs:
        return "No GPU was predicted."
    ratios = [speed / line["speedup"] for speed, line in pairs]
    settings = sorted({f"batches of {line['batch_size']}, {line['precision']}" for line in gpus})
    table = _sources(artefact)
    parts = [
        f"{confidence}: {CONFIDENCE[str(confidence)]} ({', '.join(dict.fromkeys(part['source']))})"
        for confidence, part in table.groupby("confidence", sort=False)
    ]
    return (
        f"The published speed-ups are {min(ratios):.2f} to {max(ratios):.2f} times the predicted ones "
        f"({'; '.join(settings)}). Confidence of the published: {'; '.join(parts)}."
    )


def _interval(line: pd.Series) -> str:
    if pd.isna(line["speedup.measured"]):
        return NONE
    mean, low, high = (float(line[f"speedup.{kind}"]) for kind in ("measured", "low", "high"))
    return Interval(mean, low, high, 1).format(2)


def _sources(artefact: Artefact) -> pd.DataFrame:
    return read_published(artefact.root / "config" / "published" / "gpu_speed.csv")


def _published(artefact: Artefact) -> dict[str, float]:
    """Published speed-ups by row."""
    table = _sources(artefact)
    return dict(zip(table["row"], table["value"].astype(float), strict=True))
