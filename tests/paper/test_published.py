"""Published numbers: complete, sourced, and about rows that exist."""

import pytest
from synthetic import row_configs

from workflow.paper.records import REPOSITORY, load_published


@pytest.mark.parametrize("artefact", ["imagenet_methods", "ablations", "ade20k", "reactivation", "coco"])
def test_every_number_has_a_row_a_source_and_a_confidence(artefact):
    table = load_published(artefact)
    rows = {row["row"] for row in row_configs(artefact)}
    assert set(table["row"]) <= rows
    assert set(table["confidence"]) <= {"T", "L", "R", "I"}
    assert table["source"].str.len().min() > 0


def test_table_1_is_complete_and_consistent():
    rows = [row["row"] for row in row_configs("imagenet_methods")]
    table = load_published("imagenet_methods").pivot(index="row", columns="quantity", values="value")
    assert set(table.index) == {row for row in rows if not row.endswith(("_corrected", "_teacher"))} - {
        "small_image",
        "cropr_r8_llf_full",
    }
    assert table.notna().all().all()
    assert table.loc[["none", "cropr_r8_llf", "sinkhorn_r50"], "top1"].tolist() == [85.8, 85.3, 56.5]
    # Printed with two digits each, so they agree to a rounding.
    assert (table["images_per_s"] / table.loc["none", "images_per_s"] - table["speedup"]).abs().max() < 0.07


def test_a_number_given_twice_is_refused(monkeypatch, tmp_path):
    (tmp_path / "config" / "published").mkdir(parents=True)
    text = (REPOSITORY / "config/published/ade20k.csv").read_text()
    (tmp_path / "config/published/ade20k.csv").write_text(text + text.splitlines()[-1] + "\n")
    monkeypatch.setattr("workflow.paper.records.REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match="give each quantity one number"):
        load_published("ade20k")
