"""Plans: schedules for target speed-ups, corrected by measurements, which are made up here."""

import json

import pytest
from instant import MODEL, instant  # noqa: F401

from cropr.__main__ import main
from cropr.bench import plan, timing
from cropr.bench.models import build_on_meta
from cropr.bench.specs import PlanSpec
from cropr.pruning.flops import Cost
from cropr.pruning.schedule import Schedule
from cropr.records import read_record
from cropr.specs import PruneSpec


def spec(**changes):
    model = {"name": "vit_tiny_patch16_224", "args": {"depth": 12, "embed_dim": 48, "num_heads": 3}}
    values = {"model": model, "prune": {"reducer": "cropr", "fusion": "llf"}, "targets": [1.2, 1.5, 2.0], "rounds": 3}
    return PlanSpec.model_validate(values | changes)


@pytest.fixture(scope="module")
def cost():
    return Cost(build_on_meta(spec().model, PruneSpec(), spec().image_size).backbone)


@pytest.fixture
def device(monkeypatch, cost):
    """Replaces measuring by a function of the ratio of multiply-adds; returns the schedules that were asked for."""
    asked = []

    def make(speedup):
        def measure(spec, pending, device, tell):
            asked.append(list(pending.values()))
            cells = {}
            for search, schedule in pending.items():
                found = speedup(plan.mac_ratio(spec, cost, schedule))
                metrics = {"speedup": found, "speedup_low": 0.99 * found, "speedup_high": 1.01 * found}
                cells[search] = {"metrics": metrics, "seconds": [1.0] * 3}
            return cells

        monkeypatch.setattr(plan, "_measure", measure)
        return asked

    return make


def test_without_verification_a_target_is_a_ratio_of_multiply_adds():
    record = plan.measure(spec())
    json.dumps(record, allow_nan=False)
    assert record["kind"] == "plan"
    assert record["metrics"] == {"targets": 3, "reached": 3}
    for cell in record["cells"]:
        assert cell["predicted"] >= cell["target"]
        assert (cell["metrics"], cell["rounds"], cell["reason"]) == ({}, 0, None)
        assert Schedule.from_config(cell["config"]).describe() == cell["schedule"]


@pytest.mark.parametrize("share", [0.85, 1.0, 1.1])
def test_schedules_are_corrected_until_the_device_reaches_the_target(device, share):
    asked = device(lambda ratio: 1 + share * (ratio - 1))
    record = plan.measure(spec(verify=True))
    for cell in record["cells"]:
        assert cell["reached"], cell["reason"]
        assert cell["metrics"]["speedup"] == pytest.approx(cell["target"], rel=plan.TOLERANCE)
        assert 1 <= cell["rounds"] <= plan.ATTEMPTS
    assert len(asked) == max(cell["rounds"] for cell in record["cells"])
    assert len(asked[0]) == 3  # all targets take turns with one unpruned model


def test_what_is_not_reached_has_a_reason(device, monkeypatch):
    device(lambda ratio: min(ratio, 1.3))
    easy, hard = plan.measure(spec(verify=True, targets=[1.2, 2.0]))["cells"]
    assert (easy["reached"], hard["reached"], hard["reason"] is None) == (True, False, False)
    assert hard["metrics"]["speedup"] == pytest.approx(1.3)
    (cell,) = plan.measure(spec(targets=[50]))["cells"]  # beyond all schedules
    assert (cell["reached"], cell["schedule"], cell["config"], cell["predicted"]) == (False, None, None, None)
    assert "out of reach" in cell["reason"]
    monkeypatch.undo()
    outcome = timing.Outcome(unsupported="no memory")
    monkeypatch.setattr(plan, "time_interleaved", lambda *_: (1, [outcome] * 2))
    (cell,) = plan.measure(spec(verify=True, targets=[1.5]))["cells"]
    assert (cell["reached"], cell["reason"], cell["metrics"]) == (False, "no memory", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [0.5]}, "greater than or equal to 1"),
        ({"targets": [2, 2]}, "give every value once"),
        ({"prune": {"reducer": "cropr", "schedule": {"constant": {"rate": 8}}}}, "schedule is the result of a plan"),
        ({"prune": {"reducer": "none"}}, "name a reducer that prunes"),
    ],
)
def test_refuses_impossible_plans(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


@pytest.mark.model
def test_command_measures_and_writes_a_record(tmp_path):
    text = spec(model=MODEL, image_size=64, targets=[1.2], batch_size=1).model_dump_json()
    assert main(["plan", "--device", "cpu", "--spec", text, "--verify", "--out", str(tmp_path)]) == 0
    (cell,) = read_record(tmp_path)["cells"]
    assert cell["rounds"] >= 1
    assert cell["metrics"]["speedup_low"] <= cell["metrics"]["speedup"] <= cell["metrics"]["speedup_high"]
    assert cell["reached"] == (cell["reason"] is None)
