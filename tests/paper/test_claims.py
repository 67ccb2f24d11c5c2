"""Published numbers, and claims that intervals decide: each can hold, be contradicted, or stay undecided."""

import json

import pandas as pd
import pytest
from synthetic import bench_record, row_configs, write_results

from cropr.records import write_record
from workflow.paper import claims
from workflow.paper.claims import CELLS, TIMED, VERDICTS, decide, load_claims, verdicts
from workflow.paper.records import REPOSITORY, load_published

SPEEDS = ("precision", "alignment", "memory")
HIGH, LOW = [80.0, 80.4, 80.2], [70.0, 70.3, 70.1]


DECISIONS = {
    "> 0": {"holds": [(0.2, 1)], "undecided": [(-0.1, 1), (0, 1)], "contradicted": [(-1, -0.1), (-1, 0), (0, 0)]},
    ">= -2": {"holds": [(-2, 1)], "undecided": [(-2.1, 1)], "contradicted": [(-3, -2.1)]},
    "< 0": {"holds": [(-1, -0.1)], "contradicted": [(0, 1)]},
    "<= 0.5": {"holds": [(0.1, 0.5)], "contradicted": [(0.6, 1)]},
    ">= 0": {"holds": [(0, 0)]},
}


@pytest.mark.parametrize("relation", DECISIONS)
def test_decide(relation):
    for outcome, intervals in DECISIONS[relation].items():
        assert [decide(relation, *bounds) for bounds in intervals] == [outcome] * len(intervals)


def test_one_seed_and_few_rounds_decide_nothing(tmp_path):
    results = write_results(tmp_path, "imagenet_methods", seeds=1)
    record = bench_record("cropr_r8_llf", "classification", rounds=5)
    write_record(results / "bench" / "cropr_r8_llf" / "record.json", record)
    table = verdicts("imagenet_methods", results)
    assert set(table["verdict"]) <= {"undecided", "not run"}
    assert "5 rounds; a 95 % interval needs 6" in set(table["why"])
    assert set(table[table["verdict"] == "undecided"]["over"]) == {"", "rounds"}


def test_speed_is_decided_by_rounds(tmp_path):
    results, record = write_results(tmp_path, "ade20k"), bench_record("cropr", "segmentation")
    for seconds, verdict in ((0.5, "holds"), (0.9, "contradicted")):
        record["series"] = {"base_seconds": [1.0] * 7, "seconds": [seconds] * 7}
        write_record(results / "bench" / "cropr" / "record.json", record)
        table = verdicts("ade20k", results)
        assert list(table[table["claimed"] == ">= 95"]["verdict"]) == [verdict]


def made_up(monkeypatch, claim, value):
    """Records of both sides in which the claimed quantity is ``value``, give or take a hundredth of a percent."""
    monkeypatch.setattr(claims, "load_claims", lambda path: [claim])
    names = [side["row"] if isinstance(side, dict) else side for side in claim.sides]
    monkeypatch.setattr(claims, "load_manifest", lambda *_: {"rows": [{"row": name, "why": None} for name in names]})
    both = (value, None) if claim.right is None else (10 * value, 10) if claim.ratio else (50 + value, 50)
    if claim.quantity in CELLS:
        saved = 1.5 if claim.quantity != "macs_saved" else 1 / (1 - value / 100)
        cells = [{**side, "mac_ratio": saved} for side in claim.sides]
        both = (1, value / (100 if claim.quantity == CELLS[1] else 1))
        settings = {tuple(map(side.get, ("precision", "attention", "batch_size"))) for side in claim.sides}
        bases = both if len(settings) == 2 else (2, 2) if "variant" in claim.left else (None, None)
        if claim.quantity == "cell_speedup":
            both, bases = (1, 1), ((value,) if claim.right is None else (9 + value, 9))
        rounds = [
            {**side, "round": k, "base_seconds": base, "seconds": own * (1 + 1e-4 * (k % 3) * (k % 2))}
            for side, own, base in zip(claim.sides, both, bases, strict=False)
            for k in range(7)
        ]
        monkeypatch.setattr(claims, "load_cells", lambda *_: pd.DataFrame(cells))
        monkeypatch.setattr(claims, "load_rounds", lambda *_: pd.DataFrame(rounds))
        return
    lines = [
        {"row": row, "seed": seed, claim.quantity: own * (1 + 1e-4 * seed * (row == claim.left))}
        for row, own in zip(claim.sides, both, strict=False)
        for seed in range(7)
    ]
    name = "load_speed" if claim.quantity in TIMED else "load_records"
    monkeypatch.setattr(claims, name, lambda *_, **__: pd.DataFrame(lines))


@pytest.mark.parametrize("claim", load_claims(), ids=lambda claim: claim.id)
def test_each_claim_can_hold_and_is_contradicted_by_reversed_data(monkeypatch, claim):
    rows = {row["row"] for row in row_configs(claim.artefact)}
    assert {side["row"] if isinstance(side, dict) else side for side in claim.sides} <= rows
    assert all(isinstance(side, dict) == (claim.quantity in CELLS) for side in claim.sides)
    up = 1 if claim.relation.startswith(">") else -1
    step = 0.3 * abs(claim.limit) or 5.0 if claim.quantity in CELLS or claim.ratio else 5.0
    for sign, verdict in ((up, "holds"), (-up, "contradicted")):
        made_up(monkeypatch, claim, claim.limit + sign * step)
        (line,) = verdicts(claim.artefact, "anywhere").to_dict("records")
        assert (line["verdict"], line["why"]) == (verdict, "")
        assert line["over"]
        assert bool(line["predicted"]) == (line["over"] == "formula") != bool(line["measured"])
        assert claim.place in line["source"]


def test_claims_cover_the_paper():
    about = {claim.artefact for claim in load_claims()}
    assert {"imagenet_methods", "relevance", "ablations", "reactivation", "coco", *SPEEDS} <= about
    assert any(claim.quantity.endswith("over_mac_ratio") for claim in load_claims())


def test_rows_without_records_have_not_run(tmp_path):
    results = write_results(tmp_path, "ade20k")
    manifest = json.loads((results / "manifests" / "ade20k.json").read_text())
    for row in manifest["rows"]:
        if row["row"] == "random":
            row |= {"records": [], "bench": None}
    (results / "manifests" / "ade20k.json").write_text(json.dumps(manifest))
    table = verdicts("ade20k", results).set_index("claim")["verdict"]
    assert table["Cropr segments better than random pruning at the same rate."] == "not run"
    assert set(table) <= set(VERDICTS)


@pytest.mark.parametrize("gap", [1.0, 0.2, 0.0])
def test_an_undecided_claim_says_what_would_decide_it(tmp_path, gap):
    top = {"cropr": [50 + gap, 51 + gap, 49 + gap], "random": [50.0, 50.0, 50.0], "none": [60.0] * 3}
    table = verdicts("ade20k", write_results(tmp_path, "ade20k", **top))
    (line,) = table.query("claim.str.contains('random')").to_dict("records")
    assert line["verdict"] == "undecided"
    assert ("7 seeds" in line["why"]) == (gap == 1.0)  # 2.447 / sqrt(7) = 0.92, with six 1.05


def test_unreadable_claims_are_refused(tmp_path):
    good = {"id": "a", "artefact": "x", "text": "t", "left": "r", "quantity": "top1", "relation": "> 0"}
    good |= {"place": "Table 9", "published": "1 and 2", "threshold": "paper"}
    path, wrong = tmp_path / "claims.yaml", {"write one of": {"relation": "about 3"}, "Extra inputs": {"who": "x"}}
    for message, change in (wrong | {"given twice": {"id": "a"}}).items():
        path.write_text(f"claims: [{good}, {good | {'id': 'b'} | change}]".replace("'", '"'))
        with pytest.raises(ValueError, match=message):
            load_claims(path)


def test_every_number_has_a_row_a_source_and_a_confidence():
    for artefact in ("imagenet_methods", "ablations", "ade20k", "reactivation", "coco"):
        table = load_published(artefact)
        assert set(table["row"]) <= {row["row"] for row in row_configs(artefact)}
        assert set(table["confidence"]) <= {"T", "L", "R", "I"}
        assert table["source"].str.len().min() > 0


def test_table_1_is_complete_and_consistent():
    table = load_published("imagenet_methods").pivot(index="row", columns="quantity", values="value")
    rows = {row["row"] for row in row_configs("imagenet_methods")} - {"small_image", "cropr_r8_llf_full"}
    assert set(table.index) == {row for row in rows if not row.endswith(("_corrected", "_teacher"))}
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
