"""Published numbers and claims: complete, sourced, and about rows that exist."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from workflow.paper.claims import load_claims
from workflow.paper.grid import Grid, load_grid

CONFIG = Path(__file__).parents[2] / "config"
CONFIDENCE = {"T", "L", "R", "I"}


@pytest.fixture(scope="module")
def grid() -> Grid:
    return load_grid(CONFIG, "laptop")


def numbers(artefact: str) -> list[dict[str, str]]:
    lines = (CONFIG / "published" / f"{artefact}.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.mark.parametrize(
    "artefact", ["imagenet_methods", "ablations", "ade20k", "reactivation", "coco", "precision", "alignment"]
)
def test_every_number_has_a_row_a_source_and_a_confidence(grid: Grid, artefact: str) -> None:
    rows = {row.row for row in grid.artefacts[artefact].rows}
    for number in numbers(artefact):
        assert number["row"] in rows
        assert number["source"]
        assert number["confidence"] in CONFIDENCE
        float(number["value"])


def test_table_1_is_complete_and_in_the_papers_order(grid: Grid) -> None:
    rows = [row.row for row in grid.artefacts["imagenet_methods"].rows]
    assert len(rows) == 20
    assert [number["row"] for number in numbers("imagenet_methods") if number["quantity"] == "top1"] == rows[:19]
    assert rows[19] == "small_image"


def test_table_1_as_printed() -> None:
    value = {(number["row"], number["quantity"]): float(number["value"]) for number in numbers("imagenet_methods")}
    assert value["none", "top1"] == 85.8
    assert value["cropr_r8_llf", "top1"] == 85.3
    assert value["cropr_r8_llf", "images_per_s"] == 1480
    assert value["sinkhorn_r50", "top1"] == 56.5
    assert value["cropr_r50_llf", "speedup"] == 1.6
    assert len(value) == 19 * 3
    for row in {row for row, _ in value}:
        # Printed with two digits each, so they agree to a rounding.
        speedup = value[row, "images_per_s"] / value["none", "images_per_s"]
        assert abs(speedup - value[row, "speedup"]) < 0.07


def test_claims_are_about_rows_that_can_run() -> None:
    grid = load_grid(CONFIG, "ci")  # has all rows that run
    claims = load_claims(CONFIG / "claims.yaml")
    assert {"cropr_above_random", "non_salient_below_random", "cropr_near_unpruned", "speed_near_bound"} <= {
        claim.id for claim in claims
    }
    for claim in claims:
        for row in filter(None, (claim.left, claim.right)):
            assert grid.artefacts[claim.artefact][row].available
