"""What the report says: frames, tables, claims and sentences, checked on small records."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import claim, with_paper_schedule
from workflow.paper.load import KINDS, load, make_command, pruned_share, write_tables
from workflow.paper.names import headings, row_names, short_names

from workflow.paper import claims, setting, tables, text

ROOT = Path(__file__).parents[2]


# The frame ----------------------------------------------------------------------------------------------------------


def test_frame_has_a_line_per_row_and_kinds_apart(small):
    frame = load(small()).frame
    assert list(frame.index) == ["none", "cropr", "random", "tome"]
    assert frame.at["cropr", "top1.measured"] == 90.25
    assert frame.at["cropr", "top1.published"] == 85.3
    assert frame.at["cropr", "speedup.bound"] == 1.8
    assert frame.at["cropr", "share_of_bound.measured"] == pytest.approx(100 * 1.7 / 1.8)
    assert frame.at["cropr", "share_of_bound.low"] == pytest.approx(100 * 1.68 / 1.8)
    assert frame.at["cropr", "gmacs.predicted"] == 30.0
    assert frame.at["cropr", "weights_extra.measured"] == pytest.approx(0.1)
    assert frame.at["cropr", "train_speedup.measured"] == pytest.approx(1.25)
    assert frame.at["cropr", "object_kept.measured"] == 90.0
    assert pd.isna(frame.at["tome", "top1.measured"])
    assert frame.at["tome", "top1.published"] == 85.0
    texts = {"label", "reducer", "schedule", "fusion", "pool", "image_size", "available", "why", "seeds"}
    assert all(name in texts or name.rpartition(".")[2] in KINDS for name in frame)


def test_differences_are_paired_by_seed(small):
    artefact = load(small())
    # Pairs -1.0 and -0.5: mean -0.75, half width t(0.975, 1) * 0.25 = 12.706 * 0.25.
    interval = artefact.interval("cropr", "top1_difference")
    assert (interval.mean, interval.n) == (-0.75, 2)
    assert interval.low == pytest.approx(-0.75 - 12.7062 * 0.25, abs=1e-3)
    assert artefact.interval("none", "top1_difference") is None
    assert artefact.number("cropr", "top1_difference.published") == -0.5
    assert np.isnan(artefact.number("random", "top1_difference.published"))


def test_one_seed_has_no_bounds(small):
    interval = load(small(seeds=1)).interval("cropr", "top1")
    assert (interval.mean, interval.low, interval.high) == (89.0, None, None)


def test_missing_record_names_path_and_command(small, tmp_path):
    manifest = small()
    lost = tmp_path / "runs" / "random" / "seed1" / "record.json"
    lost.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{lost}: no record; make it with: snakemake --cores all {lost} --config"
    ):
        load(manifest)


def test_missing_records_of_unavailable_rows_are_no_error(small):
    assert "tome" not in load(small()).runs


def test_a_record_of_something_else_is_refused(small, tmp_path):
    manifest = small()
    (tmp_path / "runs" / "random" / "seed1" / "record.json").write_text('{"metrics": {}, "provenance": {}}')
    with pytest.raises(ValueError, match="a record without 'seed'; delete it and run the job again"):
        load(manifest)


def test_manifest_is_found_from_a_subfolder(small, tmp_path, monkeypatch):
    small()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert load("manifest.json").root == tmp_path
    with pytest.raises(FileNotFoundError, match="no manifest under"):
        load("nowhere.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("row,quantity,value,source\n", "column 'confidence' is missing"),
        ("row,quantity,value,source,confidence\na,top1,about 3,b,T\n", "a, top1: has no number"),
        ("row,quantity,value,source,confidence\na,top1,3,b,T\na,top1,4,b,T\n", "a, top1: twice"),
    ],
)
def test_published_numbers_are_checked(small, tmp_path, content, message):
    bad = tmp_path / "bad.csv"
    bad.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(small(published=str(bad)))


def test_not_a_manifest(small):
    with pytest.raises(ValueError, match="is not a manifest"):
        load(small(rows="none"))


def test_tables_are_written_and_read_back(small, tmp_path):
    artefact = load(small())
    csv, md = write_tables(artefact, "| a |")
    assert csv == tmp_path / "results" / "tables" / "imagenet_methods.csv"
    back = pd.read_csv(csv, index_col="row")
    assert back.loc["cropr", "top1.low"] == pytest.approx(artefact.frame.loc["cropr", "top1.low"], rel=1e-5)
    assert back.columns.tolist() == artefact.frame.columns.tolist()
    assert md.read_text() == "| a |\n"
    assert sorted(p.name for p in csv.parent.iterdir()) == ["imagenet_methods.csv", "imagenet_methods.md"]


def test_commands_name_scale_and_seeds(small):
    manifest = load(small()).manifest
    assert make_command(manifest) == "snakemake --cores all imagenet_methods --config scale=tiny seeds=2"
    assert make_command(manifest, "") == "snakemake --cores all --config scale=tiny seeds=2"
    assert make_command(manifest.model_copy(update={"seeds": [0]})).endswith("scale=tiny")
    assert make_command(manifest.model_copy(update={"seeds": [1, 4]})).endswith("seeds=1,4")


def test_names_tell_rows_of_one_label_apart(ci):
    names = row_names(ci[1]["imagenet_methods"])
    assert len(set(names.values())) == len(names)
    assert names["random_r8_llf"] == "Random"
    assert names["cropr_r8_llf"] == "Cropr (R=8, LLF)"
    assert names["cropr_r8"] == "Cropr (R=8, no LLF)"


# Tables -------------------------------------------------------------------------------------------------------------

COLUMNS = {"measured": ("top1", "top1_difference", "speedup"), "bound": ("speedup",), "published": ("top1", "speedup")}


def test_kinds_stand_under_their_own_spanners(small):
    table = tables.side_by_side(load(small()), texts=("pool",), **COLUMNS)
    assert list(table.spanners) == ["Measured (this scale: tiny)", "Bound", "Published (paper)"]
    columns = [column for group in table.spanners.values() for column in group]
    assert len(columns) == len(set(columns))
    for title, group in table.spanners.items():
        assert all(column.startswith(title.split()[0].lower()) for column in group)
    line = table.cells.set_index("label").loc["Cropr"]
    assert line["measured.speedup"] == "1.70 [1.68, 1.71]"
    assert line["published.speedup"] == "1.7"
    assert line["bound.speedup"] == "1.80"


def test_missing_rows_say_why_and_are_escaped(small):
    html = tables.side_by_side(load(small()), **COLUMNS).html()
    assert "ToMe &lt;new&gt;" in html
    assert "not available: merging is missing" in html
    assert "<new>" not in html


def test_table_loads_nothing_and_is_stable(small):
    artefact = load(small())
    html = tables.side_by_side(artefact, grouped=True, **COLUMNS).html()
    assert not re.search(r"(src|href)=|@import|url\(", html)
    assert html == tables.side_by_side(artefact, grouped=True, **COLUMNS).html()


def test_markdown_has_the_same_cells(small):
    table = tables.side_by_side(load(small()), grouped=True, **COLUMNS)
    lines = table.markdown().splitlines()
    assert lines[0].startswith("|  | Measured (this scale: tiny): Top-1 (%) |")
    assert any(line.startswith("| ToMe <new> (not available: merging is missing) | — |") for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "Differences are to “None”" in lines[-1]


def test_one_seed_shows_image_sampling_labelled_as_such(small):
    table = tables.side_by_side(load(small(seeds=1)), **COLUMNS)
    assert table.heads["sampling"] == "Image sampling alone (%)"
    assert list(table.heads)[1:3] == ["measured.top1", "sampling"]
    line = table.cells.set_index("label").loc["Cropr"]
    assert line["measured.top1"] == "89.0"
    assert line["sampling"] == "[85.6, 91.7]"  # Wilson, 356 of 400
    assert "another seed may fall outside" in table.caption
    assert "sampling" not in tables.side_by_side(load(small(seeds=2)), **COLUMNS).heads


def test_rows_of_one_schedule_stand_together(ci):
    table = tables.side_by_side(ci[1]["imagenet_methods"], grouped=True, **COLUMNS)
    runs = [group for i, group in enumerate(table.group) if i == 0 or table.group[i - 1] != group]
    assert len(runs) == len(set(runs))
    assert runs[0] == "Unpruned"
    assert table.cells["label"].tolist()[:2] == ["No pruning", "No pruning, smaller image"]


def with_equal_labels(small):
    """Accuracies with R=8, speeds with R=12, and two rows of one label."""
    rows = json.loads(small().read_text())["rows"]
    for row in rows[1:3]:
        row["label"] = "Cropr"
    return load(small(rows=rows))


@pytest.mark.parametrize(
    ("paper", "heading"),
    [
        (None, "accuracy R=8; speed R=12; with Last Layer Fusion"),
        ("R=12", "accuracy R=8; speed and paper R=12; with Last Layer Fusion"),
        ("R=50 @ 6,12,18", "accuracy R=8; speed R=12; paper R=50 @ 6,12,18; with Last Layer Fusion"),
    ],
)
def test_heading_names_the_schedule_of_each_number(small, paper, heading):
    artefact = with_paper_schedule(load(small()), paper) if paper else load(small())
    table = tables.side_by_side(artefact, grouped=True, measured=("top1", "speedup"))
    # The row that does not exist was not timed; it stands with the others nevertheless.
    assert table.group == ["Unpruned", heading, heading, heading]
    assert "their schedules differ (the headings name both)" in table.caption
    assert "accuracy R=8; speed R=12" in tables.side_by_side(artefact, measured=("top1", "speedup")).caption
    assert "schedules differ" not in tables.side_by_side(artefact, measured=("speedup",)).caption


def test_heading_is_short_where_all_numbers_have_one_schedule(small, ci):
    assert "R=8, with Last Layer Fusion" in headings(ci[1]["imagenet_methods"]).values()
    assert "schedules differ" not in tables.methods(ci[1]["imagenet_methods"]).caption


def test_rows_are_called_by_the_schedule_of_the_number(small):
    artefact = with_paper_schedule(with_equal_labels(small), "R=50 @ 6,12,18")
    assert row_names(artefact)["cropr"] == "Cropr (R=8, LLF)"
    assert row_names(artefact, "speed")["cropr"] == "Cropr (R=12, LLF)"
    assert row_names(artefact, "paper")["cropr"] == "Cropr (R=50 @ 6,12,18, LLF)"
    assert row_names(artefact, "speed")["none"] == "None"
    assert short_names(artefact, "accuracy")["random"] == "Cropr R=8"
    assert short_names(artefact, "speed")["random"] == "Cropr R=12"
    assert "Cropr (R=12, LLF) 1.70 [1.68, 1.71]x" in text.speed(artefact)
    assert text.speed(artefact).startswith("vit_x, deployed, on this device: ")
    assert "undecided: Cropr (R=8, LLF)" in text.accuracy(artefact)
    assert "85.3 % (Cropr (R=50 @ 6,12,18, LLF))" in text.paper_says(artefact)
    assert "| Schedules | accuracy R=8; speed R=12 |" in setting.setting(artefact)


# Other tasks --------------------------------------------------------------------------------------------------------


def test_segmentation_is_judged_by_miou(small):
    artefact = load(small(task="segmentation"))
    assert artefact.primary == "miou"
    # As for top-1: pairs -1.0 and -0.5.
    assert artefact.interval("cropr", "miou_difference").mean == -0.75
    assert artefact.number("cropr", "miou_median.measured") == 90.25
    assert artefact.number("cropr", "macc.measured") == 90.25
    assert artefact.number("cropr", "miou_difference.published") == -0.5
    assert not [column for column in artefact.frame if column.startswith("top1")]
    table = tables.methods(artefact)
    assert {"measured.miou", "measured.miou_median", "measured.miou_difference", "published.miou"} <= set(table.heads)
    assert text.accuracy(artefact).startswith("**None** reaches 91.0 [78.3, 103.7] % mIoU.")
    assert "mIoU 85.8 % (None)" in text.paper_says(artefact)
    judgement = claims.judge(claim(), artefact)
    assert (judgement.quantity, judgement.measured) == ("miou", "+8.8 [+5.6, +11.9] points")


def test_one_seed_has_a_sampling_interval_only_where_images_are_right_or_wrong(small):
    table = tables.methods(load(small(seeds=1, task="segmentation")))
    assert "sampling" not in table.heads
    assert "Wilson" not in table.caption
    assert "One seed: accuracies have no interval." in table.caption


def test_detection_compares_boxes_and_masks(small):
    artefact = load(small(task="detection"))
    assert artefact.primary == "box_ap"
    assert artefact.interval("random", "mask_ap_difference").mean == -9.5
    heads = tables.methods(artefact).heads
    assert heads["measured.box_ap"] == "Box AP (%)"
    assert heads["measured.mask_ap_difference"] == "Mask AP, difference (points)"


def test_further_metrics_are_those_of_rows_that_were_trained(small):
    table = tables.further(load(small(task="segmentation")))
    assert list(table.heads) == ["label", "measured.macc"]  # no record has the other
    assert "—" not in table.cells["measured.macc"].to_list()
    assert not any(table.grey)


def test_whole_detectors_stand_beside_their_encoders(small):
    manifest = small(task="detection")
    (row,) = [row for row in json.loads(manifest.read_text())["rows"] if row["row"] == "cropr"]
    bench = manifest.parent / row["bench"]
    record = json.loads(bench.read_text())
    whole = {"speedup_whole": 1.4, "speedup_whole_low": 1.3, "speedup_whole_high": 1.5, "bound_whole": 1.6}
    record["metrics"] |= whole | {"images_per_s_whole": 1.2, "base_images_per_s_whole": 0.9}
    bench.write_text(json.dumps(record))
    artefact = load(manifest)
    assert artefact.interval("cropr", "speedup_whole").high == 1.5
    assert artefact.number("cropr", "speedup_whole.bound") == 1.6
    table = tables.speeds(artefact)
    heads = table.heads
    assert "No pruning" not in table.cells["label"].to_list()
    assert heads["measured.images_per_s_whole"] == "Throughput, whole model (images/s)"
    assert heads["measured.speedup_whole"] == heads["bound.speedup_whole"] == "Speed-up, whole model (x)"


def test_unpruned_row_without_a_measurement_has_that_of_the_row_beside_it(small):
    manifest = small()
    content = json.loads(manifest.read_text())
    for row in content["rows"]:
        if row["row"] == "random":
            row["bench"] = None
    manifest.write_text(json.dumps(content))
    frame = load(manifest).frame
    assert frame.at["none", "images_per_s.measured"] == 2.0
    assert frame.at["none", "gmacs.predicted"] == 54.0
    assert pd.isna(frame.at["none", "speedup.measured"])
    assert pd.isna(frame.at["random", "images_per_s.measured"])
    assert "Speed was measured of" in text.coverage(load(manifest))
    assert text.coverage(load(manifest)).endswith("and not of Random.")
    assert "Speed was measured of" not in text.coverage(load(small()))


def test_pruned_share_is_counted_from_tokens_unless_the_record_says_it(small):
    record = {"metrics": {}, "tokens": [65, 17, 17, 65],
              "spec": {"model": {"name": "vit_tiny_patch16_224", "args": {"patch_size": 8}},
                       "data": {"image_size": 64}}}  # fmt: skip
    assert pruned_share(record) == 75.0
    by_name = {**record, "tokens": [197, 188, 20, 197], "spec": {**record["spec"], "data": {"image_size": 224}}}
    by_name["spec"]["model"] = {"name": "vit_large_patch16_224.mae"}
    assert pruned_share(by_name) == pytest.approx(100 * 177 / 196)
    assert pruned_share({**record, "metrics": {"tpr": 94.0}}) == 94.0
    assert pruned_share({**record, "spec": {"model": {"name": "mine"}, "data": {"image_size": 64}}}) is None
    assert "tpr.measured" not in load(small()).frame  # the small model's name does not give its patches


def test_tpr_of_the_real_grid_is_in_the_table(ci):
    table = tables.methods(ci[1]["imagenet_methods"])
    cells = table.cells.assign(group=table.group).query("label == 'Cropr'")["measured.tpr"].tolist()
    # 36 patches: 17 pruned with fusion, 25 without, 18 in two stages.
    assert cells == ["47", "69", "50", "50"]
    assert table.cells["measured.tpr"][0] == "0"
