"""The report page, the headline table, the snapshot; tables are checked against their records."""

import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic import run_cells, write_results

from cropr.specs import ModelSpec
from cropr.tasks import TrainSpec
from workflow.paper import page, snapshot
from workflow.paper.records import load_manifest, load_pruned_after, load_records, load_speed, not_run, rerun
from workflow.paper.stats import mean_interval, median_interval, with_interval
from workflow.paper.verify import sources, wrong_record, wrong_tables


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Records, tables and a report, which tests only read."""
    root = tmp_path_factory.mktemp("results")
    for name in ("imagenet_methods", "ade20k"):
        write_results(root, name)
    (root / "tables").mkdir()
    (root / "notebooks").mkdir()
    (root / "notebooks" / "ade20k.ipynb").write_text("[reading](../docs/reading.md)")
    (root / "tables" / "ade20k.md").write_text("| name | mIoU |\n| --- | --- |\n| <Cropr> |  |\n")
    (root / "tables" / "ade20k_speed.csv").write_text('name,speed-up\nCropr,"1.70 [1.63, 1.74]"\n')
    assert page.main(["--results", str(root), "--out", str(root / "report.html")]) == 0
    return root


@pytest.mark.parametrize(
    ("pattern", "key"),
    [("runs/*/*/record.json", "metrics"), ("bench/*/record.json", "series"), ("manifests/*", "rows")],
)
def test_a_file_that_lacks_a_value_is_named_with_the_value(tmp_path, pattern, key):
    root = write_results(tmp_path, "imagenet_methods", seeds=1)
    for file in root.glob(pattern):
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"json: lacks a value.*{key}"):
        (load_speed if "bench" in pattern else load_records)("imagenet_methods", root)


def test_page_shows_every_artefact_and_claim_and_loads_nothing(results):
    html = (results / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?:https?:)?//', html)
    assert {"notebooks/ade20k.html", "notebooks/imagenet_methods.html"} <= set(re.findall(r'href="([^"#]+)"', html))
    assert "&lt;Cropr&gt;" in html, "tables are escaped"
    claims = (results / "tables" / "claims.csv").read_text().splitlines()
    assert html.count('class="verdict ') == len(claims) - 1
    assert len((results / "tables" / "claims.md").read_text().splitlines()) == len(claims) + 1


def headline(results):
    lines = (results / "tables" / "headline.md").read_text().splitlines()
    (line,) = [line for line in lines if "mIoU" in line and "| Cropr" in line]
    return line


def test_headline_has_the_numbers_of_the_notebooks_and_leaves_out_an_empty_column(results, tmp_path):
    accuracy = with_interval(mean_interval(load_records("ade20k", results), "miou"))["cropr"]
    cells = [cell.strip() for cell in headline(results).strip("|").split("|")]
    assert cells[3:] == ["56.6", accuracy, "2.0", "1.70 [1.63, 1.74]"]
    copy = shutil.copytree(results, tmp_path / "copy")
    (copy / "tables" / "ade20k_speed.csv").unlink()
    page.main(["--results", str(copy), "--out", str(copy / "report.html")])
    assert headline(copy).endswith("| 2.0 |")


def test_headline_of_an_experiment_that_the_paper_lacks_shows_what_was_measured(tmp_path):
    table = page.headline(write_results(tmp_path, "fashion"), ["fashion"])
    accuracy = with_interval(mean_interval(load_records("fashion", tmp_path), "top1"))
    assert all(text in table for text in accuracy)
    assert "published" not in table


def test_pruned_patches_are_read_image_by_image(tmp_path):
    found = load_pruned_after("similarity", write_results(tmp_path, "similarity"))
    assert set(found) == {row["name"] for row in load_manifest("similarity", tmp_path)["rows"]}
    assert found["Cropr"].shape == (15, 16)
    assert found["Cropr"].index.names == ["seed", "image"]
    assert found["Cropr"][0].isna().all(), "patch 0 is never pruned"
    assert set(found["Cropr"].stack().dropna()) == {1, 2, 3}


def test_snapshot_copies_files_and_puts_in_the_headline(results, tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    (root / "README.md").write_text("a\n<!-- headline -->\nold\n<!-- end -->\nb\n")
    (root / "docs" / "rendered").mkdir(parents=True)
    (root / "docs" / "rendered" / "gone.csv").write_text("")
    snapshot.main([str(results), "--root", str(root)])
    text = (root / "README.md").read_text()
    table = (results / "tables" / "headline.md").read_text()
    assert text == f"a\n<!-- headline -->\n{table}<!-- end -->\nb\n"
    assert snapshot.with_headline(text, table) == text
    copied = {path.name for path in (root / "docs" / "rendered").iterdir() if path.suffix != ".png"}
    files = {"README.md", "ade20k.ipynb", "ade20k.md", "ade20k_speed.csv", "claims.csv", "claims.md", "headline.md"}
    assert copied == files
    snapshot.main([str(results), "--root", str(root), "--under", "ci"])
    snapshot.main([str(results), "--root", str(root)])
    assert (root / "README.md").read_text() == text
    for folder, link in (("rendered", "../reading.md"), ("rendered/ci", "../../reading.md")):
        assert f"({link})" in (root / "docs" / folder / "README.md").read_text()
        assert f"({link})" in (root / "docs" / folder / "ade20k.ipynb").read_text()
    with pytest.raises(ValueError, match="no lines"):
        snapshot.with_headline("a", table)
    with pytest.raises(FileNotFoundError, match="not finished"):
        snapshot.copy(root, root / "docs")


def test_names_tell_rows_of_one_label_apart_and_pruned_patches_are_counted_without_prefix(results):
    names = [row["name"] for row in load_manifest("imagenet_methods", results)["rows"]]
    assert len(set(names)) == len(names)
    runs = load_records("ade20k", results).set_index(["row", "seed"])
    assert runs.loc[("cropr", 0), "tpr"] == 50.0  # 17 tokens with one prefix, 9 in the end: 8 of 16 patches
    assert runs.loc[("none", 0), "tpr"] == 0.0


def test_rows_that_have_not_run_are_named_once(results, tmp_path):
    manifest = json.loads((results / "manifests" / "imagenet_methods.json").read_text())
    manifest["rows"] = [row | {"why": "left out here", "bench": None} for row in manifest["rows"]]
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "imagenet_methods.json").write_text(json.dumps(manifest))
    assert not_run("imagenet_methods", tmp_path).count("left out here") == 1
    assert not_run("ade20k", results) == ""
    assert "ade20k --config scale=ci seeds=3" in rerun("ade20k", results)


def test_a_speed_that_the_device_cannot_measure_is_named_with_its_reason(results, tmp_path):
    copy = shutil.copytree(results, tmp_path / "copy")
    for row in load_manifest("ade20k", copy)["rows"]:
        if row["bench"]:
            file = copy / Path(row["bench"]).relative_to("results/ci")
            record = json.loads(file.read_text())
            del record["series"]
            file.write_text(json.dumps({**record, "metrics": {}, "unsupported": "no bfloat16"}))
    speed = load_speed("ade20k", copy)
    assert speed.empty
    assert {"speedup", "mac_ratio", "speedup_whole", "images_per_s"} <= set(speed)
    assert with_interval(median_interval(speed, "speedup")).empty
    assert "no bfloat16" in not_run("ade20k", copy)


def test_a_table_that_does_not_follow_from_its_records_is_named(tmp_path: Path) -> None:
    results = write_results(tmp_path, "ablations")
    run_cells("ablations", results)
    assert list(wrong_tables(["ablations"], results, run_cells)) == []
    path = sources("ablations", results)["no_mlp"][0]
    record = json.loads(path.read_text())
    record["metrics"]["top1"] += 5
    path.write_text(json.dumps(record))
    assert "ablations.csv: does not follow" in next(wrong_tables(["ablations"], results, run_cells))


def test_a_record_has_the_id_of_its_specification(tmp_path: Path) -> None:
    spec = TrainSpec(model=ModelSpec(name="vit_tiny_patch16_224"), data={"num_classes": 3})
    path = tmp_path / spec.digest() / "record.json"
    path.parent.mkdir()
    record = {"kind": "train", "id": spec.digest(), "spec": spec.model_dump(mode="json")}
    path.write_text(json.dumps(record))
    assert wrong_record(path) is None
    record["spec"]["recipe"]["epochs"] = 3
    path.write_text(json.dumps(record))
    assert "its specification has the id" in str(wrong_record(path))
