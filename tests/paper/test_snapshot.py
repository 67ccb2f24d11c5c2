"""The README's tables of measurements: made from what docs/ holds, never by hand."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow"))
from workflow.paper import snapshot

ROOT = Path(__file__).parents[2]


CLAIMS = """| Claim | Measured, 95 % interval | Claimed | Verdict | Why | Source |
| --- | --- | --- | --- | --- | --- |
| A. | +1.0 [+0.5, +1.5] points | > 0 | ✓ holds | the interval lies above 0 | paper, Table 1 (2 and 1) |
| B. | +1.0 points | > 0 | ? undecided | one seed: no interval | ours; because |
| C. | — | > 0 | ? undecided | C is not available | ours |
"""


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Folders ``rendered`` and ``records``."""
    rendered = tmp_path / "rendered"
    rendered.mkdir(parents=True)
    (tmp_path / "records").mkdir()
    (rendered / "README.md").write_text("about", encoding="utf-8")
    (rendered / "claims.md").write_text(CLAIMS, encoding="utf-8")
    head = "row,label,seeds,miou.measured,miou.low,miou.high,miou.published,speedup.measured,speedup.low,speedup.high,"
    head += "speedup.bound,speedup.published"
    rows = ["none", "cropr", "variance", "attn_topk", "random"]
    lines = [f"{row},{row.title()},3,76.94,75.61,78.27,56.6,1.808,1.62,1.82,1.772,2.0" for row in rows]
    lines[0] = "none,No pruning,3,77.9,,,56.7,,,,,"
    (rendered / "ade20k.csv").write_text("\n".join([head, *lines]), encoding="utf-8")
    return tmp_path


def refreshed(text: str, docs: Path) -> str:
    return snapshot.refreshed(text, docs / "rendered", docs / "records")


def test_readme_shows_what_the_snapshot_holds() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- measured: ") == text.count("<!-- end -->") == 7
    assert refreshed(text, ROOT / "docs") == text, "run: python workflow/snapshot.py"


def test_a_region_is_replaced_and_the_rest_is_left(docs: Path) -> None:
    text = "above\n<!-- measured: ade20k -->\nold\n<!-- end -->\nbelow\n"
    found = refreshed(text, docs)
    assert found.startswith(
        "above\n<!-- measured: ade20k -->\n| pruning | mIoU, small EVA on scenes (3 seeds) | speed-up, EVA-02-L |"
    )
    assert "| No pruning | 77.9 |  |  | 56.7 |  |\n" in found
    assert "| Cropr | 76.9 [75.6, 78.3] | 1.81 [1.62, 1.82] | 1.77 | 56.6 | 2.0 |\n" in found
    assert found.endswith("<!-- end -->\nbelow\n")
    assert refreshed(found, docs) == found


def test_a_whole_detector_has_columns_of_its_own(docs: Path) -> None:
    head = "row,label,seeds,box_ap.measured,box_ap.published,mask_ap.measured,speedup.measured,speedup.bound,"
    head += "speedup.published,speedup_whole.measured,speedup_whole.bound,speedup_whole.published"
    lines = [f"{row},{row},1,50,63,40,2.2,2.4,2.4,1.7,1.9,1.9" for row in ("none", "cropr", "random")]
    (docs / "rendered" / "coco.csv").write_text("\n".join([head, *lines]), encoding="utf-8")
    first, _, second, *_ = refreshed("<!-- measured: coco -->\n<!-- end -->", docs).splitlines()[1:]
    assert "box AP, small detector on scenes (1 seed)" in first
    assert (
        "| speed-up, EVA-02-L's encoder | ratio of multiply-adds | speed-up, whole detector | ratio of multiply-adds |"
        in first
    )
    assert second == "| none | 50.0 | 40.0 | 2.20 | 2.40 | 1.70 | 1.90 | 63.0 | 2.4 | 1.9 |"


def test_claims_say_why_they_are_undecided_and_whose_they_are(docs: Path) -> None:
    _, *lines = snapshot._claims(docs / "rendered")
    assert lines == [
        ["A.", "+1.0 [+0.5, +1.5] points", "> 0", "✓ holds", "paper"],
        ["B.", "+1.0 points", "> 0", "? undecided (one seed: no interval)", "ours"],
    ]


def test_an_unknown_region_is_named(docs: Path) -> None:
    with pytest.raises(KeyError, match="has a region 'speed'; choose one of"):
        refreshed("<!-- measured: speed -->\n<!-- end -->", docs)


def test_single_measurements_come_from_their_records(docs: Path) -> None:
    prune = {"reducer": "cropr", "schedule": {"constant": {"rate": 8, "align": 1}}, "fusion": "llf"}
    model = {"name": "vit", "args": {"patch_size": 16}}
    spec = {"model": model, "image_size": 224, "prune": prune, "precision": "fp32", "batch_size": 8, "rounds": 9}
    metrics = {"speedup": 1.746, "speedup_low": 1.7, "speedup_high": 1.8, "bound": 1.776, "share_of_bound": 0.983}
    for name, schedule in (("a", prune["schedule"]), ("b", {"squares": {"at": {"5": 80}}})):
        changed = {**spec, "prune": {**prune, "schedule": schedule}}
        record = {"kind": "bench", "spec": changed, "metrics": metrics}
        (docs / "records" / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    _, one, other = snapshot._records(docs / "records")
    assert one[0] == "[vit](docs/records/a.json), 224 px, patches of 16, R = 8 + LLF"
    assert one[1:] == ["fp32, 8", "1.75 [1.70, 1.80]", "1.78", "0.98", "9"]
    assert other[0].endswith("squares {'5': 80} + LLF")


def test_differences_have_their_sign() -> None:
    line = {"miou_difference.measured": "-0.97", "miou_difference.low": "-2.19", "miou_difference.high": "0.26"}
    assert snapshot._interval(line, "miou_difference", 1) == "-1.0 [-2.2, +0.3]"
    assert snapshot._interval({}, "miou_difference", 1) == ""


def test_a_snapshot_wants_a_finished_run_of_the_readmes_scale(docs: Path) -> None:
    results, fresh = docs / "laptop", docs / "fresh"
    (results / "tables").mkdir(parents=True)
    (results / "tables" / "coco.csv").write_text("row", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no finished run; make reproduce SCALE=laptop"):
        snapshot.collect(results, docs / "rendered", fresh)
    with pytest.raises(ValueError, match="the README shows the scale laptop"):
        snapshot.collect(docs / "ci", docs / "rendered", fresh)
    (results / "report.html").touch()
    (results / "notebooks").mkdir()
    late = results / "notebooks" / "coco.ipynb"
    late.touch()
    os.utime(late, (2e9, 2e9))
    with pytest.raises(ValueError, match="older than coco"):
        snapshot.collect(results, docs / "rendered", fresh)
    os.utime(late, (1e9, 1e9))
    snapshot.collect(results, docs / "rendered", fresh)
    assert sorted(path.name for path in fresh.iterdir()) == ["README.md", "coco.csv", "coco.ipynb"]


def test_nothing_is_replaced_where_a_table_is_missing(docs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (docs / "docs").mkdir()
    for name in ("rendered", "records"):
        (docs / name).rename(docs / "docs" / name)
    (docs / "README.md").write_text("<!-- measured: ade20k -->\n<!-- end -->\n", encoding="utf-8")
    results = docs / "results" / "laptop"
    results.mkdir(parents=True)
    (results / "report.html").touch()
    monkeypatch.setattr(snapshot, "ROOT", docs)
    assert snapshot.main([str(results)]) == 2
    assert "ade20k.csv" in capsys.readouterr().err
    assert (docs / "docs" / "rendered" / "ade20k.csv").exists()
    assert [path.name for path in (docs / "docs").iterdir() if path.name not in ("rendered", "records")] == []
    assert snapshot.main([]) == 0
    assert "76.9 [75.6, 78.3]" in (docs / "README.md").read_text(encoding="utf-8")
