"""Claims are decided by intervals: each can hold, be contradicted, or stay undecided."""

import pytest
from synthetic import EXPERIMENTS, bench_record, row_configs, write_results

from cropr.records import write_record
from workflow.paper.claims import decide, load_claims, verdicts

HIGH, LOW = [80.0, 80.4, 80.2], [70.0, 70.3, 70.1]


@pytest.mark.parametrize(
    ("relation", "bounds", "outcome"),
    [
        ("> 0", (0.2, 1.0), "holds"),
        ("> 0", (-0.1, 1.0), "undecided"),
        ("> 0", (-1.0, -0.1), "contradicted"),
        ("> 0", (0.0, 1.0), "undecided"),
        ("> 0", (-1.0, 0.0), "contradicted"),
        (">= -2.0", (-2.0, 1.0), "holds"),
        (">= -2.0", (-2.1, 1.0), "undecided"),
        (">= -2.0", (-3.0, -2.1), "contradicted"),
        ("< 0", (-1.0, -0.1), "holds"),
        ("< 0", (0.0, 1.0), "contradicted"),
        ("<= 0.5", (0.6, 1.0), "contradicted"),
        ("<= 0.5", (0.1, 0.5), "holds"),
        (">= 0", (0.0, 0.0), "holds"),
        ("> 0", (0.0, 0.0), "contradicted"),
    ],
)
def test_decide(relation, bounds, outcome):
    assert decide(relation, *bounds) == outcome


@pytest.mark.parametrize(("cropr", "random", "verdict"), [(HIGH, LOW, "holds"), (LOW, HIGH, "contradicted")])
def test_reversed_data_contradict(tmp_path, cropr, random, verdict):
    results = write_results(tmp_path, "imagenet_methods", cropr_r8_llf=cropr, random_r8_llf=random)
    found = verdicts("imagenet_methods", results).set_index("claim")["verdict"]
    assert found["Cropr is more accurate than random pruning at the same rate."] == verdict


def test_one_seed_and_few_rounds_decide_nothing(tmp_path):
    results = write_results(tmp_path, "imagenet_methods", seeds=1)
    record = bench_record("cropr_r8_llf", "classification", rounds=5)
    write_record(results / "bench" / "cropr_r8_llf" / "record.json", record)
    table = verdicts("imagenet_methods", results)
    assert set(table["verdict"]) == {"undecided"}
    assert {"one seed: no interval", "5 rounds; a 95 % interval needs 6"} <= set(table["why"])


@pytest.mark.parametrize(("seconds", "verdict"), [(0.5, "holds"), (0.9, "contradicted")])
def test_speed_is_decided_by_rounds(tmp_path, seconds, verdict):
    results = write_results(tmp_path, "ade20k")
    record = bench_record("cropr", "segmentation")
    record["series"] = {"base_seconds": [1.0] * 7, "seconds": [seconds] * 7}
    write_record(results / "bench" / "cropr" / "record.json", record)
    table = verdicts("ade20k", results)
    assert list(table[table["claimed"] == ">= 95"]["verdict"]) == [verdict]


def test_claims_are_about_rows_that_exist():
    for claim in load_claims():
        rows = {row["row"] for row in row_configs(claim.artefact)}
        assert {claim.left, claim.right or claim.left} <= rows
        assert (EXPERIMENTS / f"{claim.artefact}.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"relation": "about 3"}, "write one of"), ({"who": "x"}, "Extra inputs"), ({"id": "a"}, "given twice")],
)
def test_unreadable_claims_are_refused(tmp_path, change, message):
    good = {"id": "a", "artefact": "x", "text": "t", "left": "r", "quantity": "top1", "relation": "> 0", "source": "s"}
    path = tmp_path / "claims.yaml"
    path.write_text(f"claims: [{good}, {good | {'id': 'b'} | change}]".replace("'", '"'))
    with pytest.raises(ValueError, match=message):
        load_claims(path)
