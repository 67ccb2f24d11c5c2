"""The README's tables of measurements: made from what docs/ holds, never by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))
import snapshot

ROOT = Path(__file__).parents[1]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    rendered = tmp_path / "docs" / "rendered"
    rendered.mkdir(parents=True)
    (rendered / "README.md").write_text("about", encoding="utf-8")
    head = "row,label,miou.measured,miou.low,miou.high,miou.published,speedup.measured,speedup.low,speedup.high,"
    head += "speedup.bound,speedup.published"
    rows = ["none", "cropr", "variance", "attn_topk", "random"]
    lines = [f"{row},{row.title()},76.94,75.61,78.27,56.6,1.808,1.62,1.82,1.772,2.0" for row in rows]
    lines[0] = "none,No pruning,77.9,,,56.7,,,,,"
    (rendered / "ade20k.csv").write_text("\n".join([head, *lines]), encoding="utf-8")
    return tmp_path / "docs"


def test_readme_shows_what_the_snapshot_holds() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- measured: ") == text.count("<!-- end -->") >= 6
    assert snapshot.refreshed(text, ROOT / "docs") == text, "run: python workflow/snapshot.py"


def test_a_region_is_replaced_and_the_rest_is_left(docs: Path) -> None:
    text = "above\n<!-- measured: ade20k -->\nold\n<!-- end -->\nbelow\n"
    found = snapshot.refreshed(text, docs)
    assert found.startswith("above\n<!-- measured: ade20k -->\n| pruning | mIoU, scenes | speed-up |")
    assert "| No pruning | 77.9 |  |  | 56.7 |  |\n" in found
    assert "| Cropr | 76.9 [75.6, 78.3] | 1.81 [1.62, 1.82] | 1.77 | 56.6 | 2.0 |\n" in found
    assert found.endswith("<!-- end -->\nbelow\n")
    assert snapshot.refreshed(found, docs) == found


def test_an_unknown_region_is_named(docs: Path) -> None:
    with pytest.raises(KeyError, match="has a region 'speed'; choose one of"):
        snapshot.refreshed("<!-- measured: speed -->\n<!-- end -->", docs)


def test_single_measurements_come_from_their_records(docs: Path) -> None:
    (docs / "records").mkdir()
    prune = {"reducer": "cropr", "schedule": {"constant": {"rate": 8}}, "fusion": "llf"}
    spec = {
        "model": {"name": "vit"},
        "image_size": 224,
        "prune": prune,
        "precision": "fp32",
        "batch_size": 8,
        "rounds": 9,
    }
    metrics = {"speedup": 1.746, "speedup_low": 1.7, "speedup_high": 1.8, "bound": 1.776, "share_of_bound": 0.983}
    record = {"kind": "bench", "spec": {**spec, "rounds": 9}, "metrics": metrics}
    (docs / "records" / "one.json").write_text(json.dumps(record), encoding="utf-8")
    (line,) = list(snapshot._records(docs))[1:]
    assert line == [
        "[vit](docs/records/one.json), 224 px, R = 8 + LLF",
        "fp32, 8",
        "1.75 [1.70, 1.80]",
        "1.78",
        "0.98",
        "9",
    ]


def test_differences_have_their_sign() -> None:
    line = {"miou_difference.measured": "-0.97", "miou_difference.low": "-2.19", "miou_difference.high": "0.26"}
    assert snapshot._interval(line, "miou_difference", 1) == "-1.0 [-2.2, +0.3]"
    assert snapshot._interval({}, "miou_difference", 1) == ""


def test_a_snapshot_replaces_the_last_one_and_wants_a_finished_run(docs: Path) -> None:
    results = docs.parent / "results" / "laptop"
    (results / "tables").mkdir(parents=True)
    (results / "tables" / "coco.csv").write_text("row", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no finished run; make reproduce SCALE=laptop"):
        snapshot.copy(results, docs / "rendered")
    assert (docs / "rendered" / "ade20k.csv").exists()
    (results / "report.html").touch()
    snapshot.copy(results, docs / "rendered")
    assert sorted(path.name for path in (docs / "rendered").iterdir()) == ["README.md", "coco.csv"]
