"""The page of plans, from a record written by hand: predicted and measured stand apart, and sentences follow."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from cropr.bench.planner import FAMILIES
from cropr.bench.roofline import PAPER

from cropr.bench.specs import PlanSpec
from cropr.records import write_record
from workflow.paper import plan_page
from workflow.paper.load import Artefact, load, write_tables

TARGETS = (1.2, 2.0)


def plan(target: float, measured: float | None) -> dict:
    line = {
        "target": target,
        "family": "constant",
        "described": "R=4",
        "schedule": {"constant": {"rate": 4, "first_extra": 1, "align": 1}},
        "tokens": [197, 192, 188, 197],
        "pruned": 0.45,
        "predicted_speedup": target + 0.01,
        "predicted_latency_ms": 100 / target,
        "predicted_base_latency_ms": 100.0,
        "predicted_flops": 1 / target,
    }
    if measured is None:
        return line
    error = 100 * (line["predicted_speedup"] / measured - 1)
    interval = {
        "measured_speedup": measured,
        "measured_speedup_low": measured - 0.02,
        "measured_speedup_high": measured + 0.02,
    }
    return line | interval | {"bound": target + 0.05, "error_percent": error}


def write(folder: Path, measured: tuple[float | None, ...]) -> Artefact:
    """The artefact of a plan with these measured speed-ups."""
    spec = PlanSpec.model_validate(
        {"model": {"name": "vit_base_patch16_224"}, "prune": {"reducer": "cropr", "fusion": "llf"}, "targets": TARGETS}
    )
    plans = [plan(target, value) for target, value in zip(TARGETS, measured, strict=True)]
    metrics: dict[str, float] = {"targets": len(plans)}
    if None not in measured:
        errors = sorted(abs(line["error_percent"]) for line in plans)
        metrics |= {"largest_error_percent": errors[-1], "median_error_percent": sum(errors) / 2}
    gpus = [
        {"row": name, "label": row.label, "device": device, "batch_size": 128, "precision": "fp16", "speedup": 1.5,
         "low": 1.4, "high": 1.6, "bound": 1.55, "images_per_s": 1000.0}
        for name, row in PAPER.items() for device in ("a100", "h100")
    ]  # fmt: skip
    record = {
        "kind": "plan",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": metrics,
        "series": {
            "plans": plans,
            "reach": [plan(top, None) | {"family": name} for name, top in zip(FAMILIES, (1.8, 1.9, 5.0), strict=True)],
            "costs": {name: [{"tokens": n, "ms": n / 10} for n in (8, 104, 197)] for name in ("block", "reduce")},
            "gpus": gpus,
        },
        "provenance": {"commit": None, "dirty": None, "python": "3.11", "packages": {"torch": "2"}, "device": "cpu",
                       "cpu": "a processor", "threads": 2},
    }  # fmt: skip
    write_record(folder / "record.json", record)
    manifest = {
        "artefact": "plan",
        "title": "Planning",
        "scale": "laptop",
        "seeds": [0],
        "results": str(folder),
        "rows": [{"row": "plan", "label": "Plan", "bench": str(folder / "record.json")}],
    }
    (folder / "plan.json").write_text(json.dumps(manifest))
    return load(folder / "plan.json")


def test_predicted_and_measured_have_columns_of_their_own(tmp_path):
    artefact = plan_page.with_plans(write(tmp_path, (1.2, 1.5)))
    assert artefact.frame["speedup.predicted"].tolist() == pytest.approx([1.21, 2.01])
    assert artefact.frame["speedup.measured"].tolist() == pytest.approx([1.2, 1.5])
    table = plan_page.plan_table(artefact)
    assert table.cells["measured"].tolist() == ["1.20 [1.18, 1.22]", "1.50 [1.48, 1.52]"]
    assert table.cells["error"].tolist() == ["+0.8", "+34.0"]
    owners = [column for columns in table.spanners.values() for column in columns]
    assert len(owners) == len(set(owners)) == 4
    csv, _ = write_tables(artefact, table.markdown())
    assert csv.read_text().startswith("row,label,family,schedule,tokens,pruned.predicted,speedup.predicted")
    assert "target_1.2" in csv.read_text()


def test_sentences_count_what_is_within_the_goal(tmp_path):
    text = plan_page.plan_sentences(write(tmp_path, (1.2, 1.5)))
    assert "1 of 2 predictions are within 5 %" in text
    assert "measured speed-up**, 1 lie in its interval" in text  # 1.21 in [1.18, 1.22]; 2.01 not in [1.48, 1.52]
    assert "largest error is 34.0 %" in text
    assert "early 5.01x" in text


def test_plans_that_were_not_measured_say_so(tmp_path):
    artefact = write(tmp_path, (None, None))
    assert "not measured" in plan_page.plan_sentences(artefact)
    table = plan_page.plan_table(plan_page.with_plans(artefact))
    assert table.cells["measured"].tolist() == ["—", "—"]
    plt.close(plan_page.plan_figure(artefact))


def test_gpus_stand_beside_the_published(tmp_path):
    artefact = write(tmp_path, (1.2, 2.0))
    table = plan_page.gpu_table(artefact)
    assert len(table.cells) == len(PAPER)
    assert table.cells["a100"][0] == "1.50 (1.40 to 1.60)"
    assert table.cells["published"].tolist() == ["1.9", "1.7", "1.7", "1.6", "2.1", "4.1", "2.0"]
    text = plan_page.gpu_sentences(artefact)
    assert "1.07 to 2.73 times" in text  # 1.6 and 4.1 over 1.5
    assert "third-party notes" in text


def test_figure_draws_every_plan(tmp_path):
    figure = plan_page.plan_figure(write(tmp_path, (1.2, 1.5)))
    left, right = figure.axes
    assert sum(line.get_marker() == "o" for line in left.lines) == 2
    assert len(right.lines) == 2
    plt.close(figure)


def test_without_a_plan_the_error_names_the_command(tmp_path):
    artefact = write(tmp_path, (1.2, 1.5))
    empty = Artefact(artefact.manifest, {}, {}, artefact.published, artefact.frame, artefact.root)
    with pytest.raises(ValueError, match="snakemake --cores all plan"):
        plan_page.record_of(empty)
