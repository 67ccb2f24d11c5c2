"""The notebooks of the microbenchmarks run on made-up records; plain Python computes their main tables again."""

import csv
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from synthetic import run_cells, write_microbench

from workflow.paper.microbench.profiling import CATEGORIES

pytestmark = pytest.mark.workflow
NOISE = (1.0, 1.1, 0.97)
"""Factors of the pruned models' times by round. The interval of three rounds is their range."""
SPEED = {"unpruned": 1.0, "cropr": 1.8, "cropr_llf": 1.7}
SWEEPS = {
    "methods_speed": (("r8", "r50"), {**SPEED, "control": 1.0}),
    "model_scaling": (("vit_b_224", "vit_l_224", "vit_h_224", "vit_l_448"), {"unpruned": 1.0, "cropr_llf": 1.7}),
    "eva02": (("eva02_l_448",), SPEED),
}
"""Rows and variants of notebooks whose main table leaves out the unpruned model and the control."""


def cell(
    variant: str, speed: float, base: float = 2.0, metrics: dict[str, float] | None = None, **setting: Any
) -> dict:
    """A variant that is ``speed`` times as fast as ``base`` seconds."""
    seconds = [base * (1 if variant == "unpruned" else noise) / speed for noise in NOISE]
    setting = {"precision": "fp32", "attention": "math", "batch_size": 4, "tokens": [17, 9, 17], **setting}
    common = {"images_per_s": 4 / median(seconds), "mfu": 0.5, "mac_ratio": 1.1 * speed, "gmacs": 9 / speed}
    common |= {"batch_size": 2}
    return {"variant": variant, **setting, "seconds": seconds, "metrics": common | (metrics or {})}


def block(count: int) -> dict:
    """Counts that are not multiples of 8 take longer."""
    latency = 0.01 + 1e-4 * count + (0.002 if count % 8 else 0)
    setting = {"tokens": count, "precision": "fp32", "attention": "auto", "batch_size": 2, "seconds": [latency] * 3}
    return {**setting, "metrics": {"block_s": latency, "block_s_iqr": 0.0, "block_gmacs": 0.1}}


def target(asked: float, reason: str | None, **metrics: float) -> dict:
    line = {"target": asked, "schedule": f"R={asked:g}", "config": {}, "predicted": 1.05 * asked}
    return {**line, "metrics": metrics, "rounds": 2, "reached": reason is None, "reason": reason}


def records() -> dict[str, dict[str, list[dict]]]:
    """Cells by artefact and row. In ``breakeven``, one image is slower when pruned; no device has cudnn's kernel."""
    seconds = {part: 0.001 * number for number, part in enumerate(CATEGORIES, 1)}
    profile = {"batch_size": 4, "precision": "fp32", "attention": "auto", "seconds": seconds}
    profile["metrics"] = {"total_s": sum(seconds.values()), "pruning_share": 0.4, "gmacs": 3.0}
    settings = [("fp32", "math", 2.0), ("fp32", "flash", 1.6), ("amp_bf16", "flash", 1.0)]
    sweep = [cell(v, s, base, precision=p, attention=a) for p, a, base in settings for v, s in SPEED.items()]
    gone = {"variant": "cropr", "precision": "fp32", "attention": "cudnn", "batch_size": 4, "unsupported": "no kernel"}
    pays = [cell(v, s if size > 1 else 1 / s, batch_size=size) for size in (1, 8) for v, s in [*SPEED.items()][::2]]
    step = {v: {"step_ms": 9 / s, "training_memory_mb": 8 / s, "inference_memory_mb": 1.0} for v, s in SPEED.items()}
    schedules = {"unpruned": 1.0, "as_in_paper": 1.5, "multiples_of_8": 1.7, "one_token_more": 1.6}
    scoring = {"unpruned": 1.0, "one_vector": 1.9, "all_queries": 1.6}
    measured = target(1.5, None, speedup=1.52, speedup_low=1.35, speedup_high=1.8)
    return {
        "precision": {"vit_l_224": [*sweep, gone]},
        "alignment": {
            "blocks": [block(count) for count in range(30, 67)],
            "schedules": [cell(v, s) for v, s in schedules.items()],
        },
        "breakeven": {"vit_s": pays, "vit_b": pays},
        "profile": {
            "vit_l_224": [{"variant": v, **profile} for v in SPEED],
            "scoring": [cell(v, s) for v, s in scoring.items()],
        },
        "memory": {row: [cell(v, s, metrics=step[v]) for v, s in SPEED.items()] for row in ("vit_s_224", "laptop_vit")},
        **{name: {row: [cell(v, s) for v, s in each.items()] for row in rows} for name, (rows, each) in SWEEPS.items()},
        "plan": {"plan": [measured, target(9.0, "out of reach") | {"schedule": None, "predicted": None}]},
    }


def run(results: Path, name: str) -> tuple[dict[str, list[dict]], list[dict[str, str]]]:
    """Run a notebook; returns its records' cells by row, and the lines of its main table."""
    made = records()[name]
    write_microbench(results, name, made)
    run_cells(name, results)
    assert (results / "figures" / f"{name}.png").is_file()
    return made, list(csv.DictReader((results / "tables" / f"{name}.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", ["precision", "breakeven", "memory", *SWEEPS])
def test_speedups_are_ratios_of_the_same_round(tmp_path, name):
    made, table = run(tmp_path, name)
    expected = []
    for row, cells in made.items():
        measured = {(c["precision"], c["attention"], c["batch_size"], c["variant"]): c for c in cells if "metrics" in c}
        for (*place, variant), c in measured.items():
            base = measured[*place, "unpruned"]["seconds"]
            ratios = [b / s for b, s in zip(base, c["seconds"], strict=True)]
            text = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            if variant != "control" and (name not in ("breakeven", *SWEEPS) or variant != "unpruned"):
                expected.append((row.upper(), text, round(c["metrics"]["mac_ratio"], 2)))
    assert [(line["label"], line["speedup"], float(line["mac_ratio"])) for line in table] == expected
    if name == "breakeven":
        assert [line["pays"] for line in table] == ["False", "True"] * 2
    if name == "memory":
        shares = [round(1 / speed, 2) for speed in SPEED.values()]
        assert [float(line["training_memory_mb_relative"]) for line in table] == shares * 2


def test_counts_are_compared_with_their_neighbours(tmp_path):
    made, table = run(tmp_path, "alignment")
    latency = {c["tokens"]: c["metrics"]["block_s"] for c in made["blocks"]}
    assert [(line["multiple_of"], line["counts"]) for line in table[:2]] == [("64", "1"), ("32", "1")]
    assert [float(line["next_count_max"]) for line in table[:2]] == [
        round(latency[n + 1] / latency[n], 3) for n in (64, 32)
    ]
    assert float(table[0]["excess_percent"]) < 0 < float(table[-1]["excess_percent"])


def test_parts_add_up_and_plans_stand_beside_their_targets(tmp_path):
    made, table = run(tmp_path, "profile")
    seconds = made["vit_l_224"][0]["seconds"]
    total = sum(seconds.values())
    parts = [(part, round(1000 * s, 2), round(100 * s / total, 2)) for part, s in [*seconds.items(), ("total", total)]]
    assert {(line["part"], float(line["cropr_ms"]), float(line["cropr_percent"])) for line in table} == set(parts)
    _, table = run(tmp_path, "plan")
    found = [(line["target"], line["measured"], line["deviation_percent"], line["reached"]) for line in table]
    assert found == [("1.5", "1.52 [1.35, 1.80]", "1.3", "True"), ("9", "", "", "False")]
