"""Planning: the search on curves written by hand, the statistics of the costs, the cache, a tiny model end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import cropr
from cropr.bench import costs as parts
from cropr.bench import planner
from cropr.bench.costs import Costs, load_costs, monotone, sample_counts, typical
from cropr.bench.flops import BlockDims, macs
from cropr.bench.models import build_variants, hosted
from cropr.bench.planner import FAMILIES, Layout, layout_of, predict, search
from cropr.bench.specs import PlanSpec
from cropr.cli import main
from cropr.pruning.schedule import Schedule, attended
from cropr.records import read_record
from cropr.specs import ModelSpec, PruneSpec

TINY = {"name": "vit_tiny_patch16_224", "args": {"depth": 5, "embed_dim": 48, "num_heads": 3}}
LINEAR = Costs(block={0: 0.0, 1000: 1000.0}, reduce={0: 0.0, 1000: 0.0}, fixed=0.0)
"""A block on N tokens takes N seconds, all else nothing: latency is the sum of the token counts."""


def spec(**changes):
    values = {"model": TINY, "prune": {"reducer": "cropr", "fusion": "llf"}, "image_size": 64, "rounds": 3, **changes}
    return PlanSpec.model_validate(values)


def layout(patches=100, depth=8, prefix=0, fused=False):
    dims = BlockDims(attention_weights=1, attention_width=0, mlp_weights=0)
    return Layout(num_patches=patches, depth=depth, prefix=prefix, fused=fused, dims=(dims,) * depth, fixed_macs=0)


def names(plans):
    return [found.schedule.describe() for found in plans]


# Search --------------------------------------------------------------------------------------------------------------


def test_constant_rate_is_the_smallest_that_reaches_the_target():
    """Blocks see 100, 99 - R, 99 - 2 R, ...: 800 - 7 - 28 R tokens of 800. 1.5x needs 533 1/3 or less: R = 10 (513)."""
    (found,) = search(spec(family="constant", targets=(1.5,)), layout(), LINEAR)
    assert found.schedule == Schedule.constant(10)
    assert found.speedup == pytest.approx(800 / 513)
    assert found.latency_ms == pytest.approx(513e3)
    assert found.base_latency_ms == pytest.approx(800e3)
    assert found.tokens == (100, 89, 79, 69, 59, 49, 39, 29, 29)
    assert found.pruned == pytest.approx(0.71)


def test_stages_are_at_quarters():
    """After blocks 2, 4, 6: 200 + 2 (100 - S) + 2 (100 - 2 S) + 2 (100 - 3 S) = 800 - 12 S; 640 at 1.25x: S = 14."""
    (found,) = search(spec(family="stages", targets=(1.25,)), layout(), LINEAR)
    assert found.schedule == Schedule.stages({2: 14, 4: 14, 6: 14})
    assert found.speedup == pytest.approx(800 / 632)


def test_early_prunes_once_and_fusion_brings_all_back():
    """After block 1, with the last block on all 100: 200 + 6 (100 - S); 400 at 2x needs S = 66 2/3."""
    (found,) = search(spec(family="early", targets=(2,)), layout(fused=True), LINEAR)
    assert found.schedule == Schedule.stages({1: 67})
    assert found.tokens == (100, *[33] * 7, 100)


def test_everything_around_the_blocks_counts():
    """One site at 10 tokens: 1 around the blocks, 2 once, reducer 16 on top of 10 + 2 (10 - S) + 10 tokens."""
    costs = Costs(block={0: 0.0, 10: 10.0}, reduce={0: 16.0, 10: 16.0}, fixed=1.0, extra=2.0)
    plans = predict("early", 1, layout(patches=10, depth=4, fused=True), costs)
    assert plans[0].latency_ms == pytest.approx((1 + 40) * 1e3)  # unpruned: no reducer, nothing to bring back
    assert plans[3].latency_ms == pytest.approx((1 + 2 + 16 + 10 + 2 * 7 + 10) * 1e3)


def test_auto_takes_the_family_that_prunes_latest():
    """Without fusion over 8 blocks, constant reaches 793 - 28 * 14 = 401 of 800 tokens, stages 800 - 12 * 33 = 404."""
    plans = search(spec(targets=(1.99, 2.0, 4.0)), layout(), LINEAR)
    assert [found.family for found in plans] == ["constant", "early", "early"]


def test_more_speed_never_prunes_less():
    targets = [1 + step / 10 for step in range(25)]
    for family in ("early", "constant", "stages"):
        reachable = [t for t in targets if t <= max(p.speedup for p in predict(family, 1, layout(), LINEAR))]
        assert len(reachable) > 3
        pruned = [found.pruned for found in search(spec(family=family, targets=reachable), layout(), LINEAR)]
        assert pruned == sorted(pruned)
        assert pruned[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_aligned_counts_are_multiples_and_still_reach_the_target(family):
    place = layout(patches=196, depth=24, prefix=1, fused=True)
    (found,) = search(spec(family=family, align=8, targets=(1.3,)), place, LINEAR)
    assert {count % 8 for count in found.tokens[1:-1]} - {197 % 8} == {0}
    assert found.speedup >= 1.3
    free = search(spec(family=family, targets=(1.3,)), place, LINEAR)[0]
    assert found.tokens != free.tokens


def test_latency_and_flops_are_targets_too():
    (by_latency,) = search(spec(quantity="latency_ms", targets=(533_400,), family="constant"), layout(), LINEAR)
    (by_flops,) = search(spec(quantity="flops", targets=(0.66675,), family="constant"), layout(), LINEAR)
    assert names([by_latency, by_flops]) == ["R=10", "R=10"]
    assert by_flops.flops == pytest.approx(513 / 800)
    (enough,) = search(spec(quantity="latency_ms", targets=(1e6,)), layout(), LINEAR)
    assert enough.schedule == Schedule.constant(0)  # the unpruned model meets it


def test_a_target_out_of_reach_names_the_largest_speed_up():
    with pytest.raises(ValueError, match=r"speedup 3 is out of reach.* constant 1\.995x \(R=14\)"):
        search(spec(family="constant", targets=(3,)), layout(), LINEAR)
    with pytest.raises(ValueError, match=r"constant .*x \(R=14\), stages .*, early .*x .*fusion 'none'"):
        search(spec(targets=(100,)), layout(), LINEAR)
    with pytest.raises(ValueError, match=r"at best .* ms a batch"):
        search(spec(quantity="latency_ms", targets=(1,)), layout(), LINEAR)


# Costs ---------------------------------------------------------------------------------------------------------------


def test_monotone_fit_averages_neighbours_that_fall():
    assert monotone({8: 1.0, 16: 3.0, 24: 2.0, 32: 4.0}) == {8: 1.0, 16: 2.5, 24: 2.5, 32: 4.0}
    assert monotone({8: 3.0, 16: 2.0, 24: 1.0}) == {8: 2.0, 16: 2.0, 24: 2.0}


def test_a_slow_round_does_not_change_the_ratio_of_two_clocks():
    found = typical({"a": [1.0, 5.0, 1.0], "b": [2.0, 10.0, 2.0]})
    assert found == pytest.approx({"a": 1.0, "b": 2.0})
    odd = typical({"a": [1.0, 1.0, 1.0], "b": [2.0, 7.0, 2.0]})  # one reading of one clock is off
    assert odd["b"] / odd["a"] == pytest.approx(2.0)


@pytest.mark.parametrize(("full", "prefix"), [(197, 1), (1025, 1), (17, 1), (16, 0), (4096, 0), (5, 1)])
def test_sampled_counts_are_multiples_of_8_and_the_full_count(full, prefix):
    counts = sample_counts(full, prefix)
    assert counts[-1] == full
    assert all(count % 8 == 0 for count in counts[:-1])
    assert counts[0] > prefix + 1
    assert len(counts) <= parts.POINTS + 1


@pytest.fixture
def instant(monkeypatch):
    """One pass a round will do: nothing here depends on how long anything takes."""
    monkeypatch.setattr("cropr.bench.timing.MIN_SAMPLE_S", 0)


@pytest.mark.parametrize("reducer", ["cropr", "attn_topk", "variance"])
def test_all_parts_are_measured(instant, reducer):
    fusion = "none" if reducer == "variance" else "llf"
    found = parts.measure_costs(spec(prune={"reducer": reducer, "fusion": fusion}, batch_size=2))
    assert list(found.block) == [8, 16, 17]
    assert set(found.reduce) == {16, 17}
    assert min(*found.block.values(), *found.reduce.values(), found.fixed) > 0


FIXED, FUSION = 0.75, 0.0625
BLOCK = {8: 1.0, 16: 4.0, 17: 2.0}
"""Of one block by its tokens; the last two fall."""
REDUCE = {16: 0.125, 17: 0.25}


@pytest.mark.parametrize(
    ("reducer", "fusion", "besides", "extra"),
    [
        ("cropr", "none", 0.0, 0.0),
        ("cropr", "llf", 0.0, FUSION),
        ("attn_topk", "llf", 0.0, FUSION),
        ("variance", "none", 0.5, 0.5),  # pixels are read before the first block
        ("cropr", "llf", -0.5, 0.0),  # noise that is larger than what is measured: never below zero
    ],
)
def test_known_times_are_given_back_part_by_part(instant, monkeypatch, reducer, fusion, besides, extra):
    """Passes run for real and say what their blocks are given; the clock's readings are written by hand."""

    def fake(run, blocks, device):
        counts = []
        handles = [b.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1])) for b in blocks]
        run.forward()
        for handle in handles:
            handle.remove()
        found = [FIXED - 0.25 + (besides if min(counts) < 17 else 0.0)]
        for count, following in zip(counts, [*counts[1:], counts[-1]], strict=True):
            found += [BLOCK[count], REDUCE[count] if following < count else FUSION if following > count else 0.0]
        found[-1] = 0.25  # norm and head
        return np.array(found)

    monkeypatch.setattr(parts, "dissect", fake)
    found = parts.measure_costs(spec(prune={"reducer": reducer, "fusion": fusion}, batch_size=2))
    assert found.block == pytest.approx({8: 1.0, 16: 3.0, 17: 3.0})
    assert found.reduce == pytest.approx(REDUCE)
    assert (found.fixed, found.extra) == pytest.approx((FIXED, extra))


@pytest.mark.parametrize(("depth", "fusion"), [(12, "llf"), (24, "none"), (4, "llf"), (3, "llf")])
def test_probes_run_a_block_on_every_sampled_count(depth, fusion):
    model = {"name": "vit_tiny_patch16_224", "args": {"depth": depth, "embed_dim": 48, "num_heads": 3}}
    prune = {"reducer": "cropr", "fusion": fusion}
    seen = set()
    for probe in parts._probes(spec(model=model, prune=prune, image_size=224)).values():
        counts = Schedule.from_config(probe.schedule).resolve(196, depth, fusion == "llf", 1)
        seen |= set(attended(counts, 196, fusion == "llf", 1))
    assert seen == set(sample_counts(197, 1))


def test_a_model_without_room_for_a_reducer_has_costs(instant):
    """Two blocks with a fusion before the second: nothing can be pruned."""
    model = {"name": "vit_tiny_patch16_224", "args": {"depth": 2, "embed_dim": 48, "num_heads": 3}}
    found = parts.measure_costs(spec(model=model, batch_size=1))
    assert (list(found.block), found.extra) == ([17], 0.0)


def test_parts_of_a_pass_are_sorted_by_what_they_are():
    """Three blocks on 17, 17 and 17 tokens, and on 17, 13 and (with what a fusion brings back) 17."""
    asked = PruneSpec(reducer="cropr", fusion="llf", schedule={"stages": {"at": {1: 4}}})
    model = ModelSpec(name=TINY["name"], args=TINY["args"] | {"depth": 3})
    models = build_variants(model, {"probe": asked}, 64, "cpu", torch.float32)
    parts_of = [np.array([1.0, 10, 2, 20, 3, 30, 4]), np.array([5.0, 40, 6, 50, 7, 60, 8])]
    assert parts._sort(models, parts_of) == {
        ("block", 17): (10 + 20 + 30 + 40 + 60) / 5,
        ("block", 13): 50,
        ("reduce", 17): 6,
        ("rest", 0): 1 + 2 + 3 + 4,
        ("rest", 1): 5 + 7 + 8,
    }


def test_costs_are_kept_by_what_they_depend_on(tmp_path, monkeypatch):
    calls = []

    def fake(asked, device, tell):
        calls.append(asked.batch_size)
        return Costs(block={8: 1.0}, reduce={8: 0.5}, fixed=float(len(calls)))

    monkeypatch.setattr(parts, "measure_costs", fake)
    first = load_costs(spec(), cache=tmp_path)
    again = load_costs(spec(targets=(2, 3), align=8, family="early", verify=True), cache=tmp_path)
    assert again == first  # the goal does not matter
    assert load_costs(spec(batch_size=2), cache=tmp_path).fixed == 2
    assert load_costs(spec(), cache=tmp_path, fresh=True).fixed == 3
    assert load_costs(spec(), cache=tmp_path).fixed == 3  # and was kept
    assert calls == [4, 2, 4]


# A model -------------------------------------------------------------------------------------------------------------


def test_layout_counts_what_the_model_counts():
    asked = spec()
    place = layout_of(asked)
    assert (place.num_patches, place.depth, place.prefix, place.last) == (16, 5, 1, 3)
    prune = PruneSpec(reducer="cropr", fusion="llf", schedule={"constant": {"rate": 3}})
    counted = macs(hosted(asked.model, prune, 64))
    assert place.macs([17, 13, 10, 7, 17]) == counted.total - counted.scoring


@pytest.mark.model
def test_plan_is_found_measured_and_recorded(instant, tmp_path, monkeypatch):
    """End to end on a tiny model; its costs are given, since those of a loaded machine may allow no speed-up at all."""
    given = Costs(block={0: 0.0, 17: 17.0}, reduce={0: 0.0, 17: 0.0}, fixed=0.0)
    monkeypatch.setattr(parts, "measure_costs", lambda *_: given)
    arguments = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path), "--device", "cpu"]
    value = spec(targets=(1.2, 1.5), batch_size=1).model_dump_json()
    assert main(["plan", "--spec", value, "--verify", *arguments]) == 0
    record = read_record(tmp_path / "out")
    assert record["kind"] == "plan"
    assert isinstance(record["provenance"]["freed_memory_reused"], bool)  # also where costs are not measured
    assert record["metrics"]["targets"] == 2
    for line in record["series"]["plans"]:
        assert line["predicted_speedup"] >= line["target"]
        assert line["measured_speedup_low"] <= line["measured_speedup"] <= line["measured_speedup_high"]
        ratio = line["predicted_speedup"] / line["measured_speedup"]
        assert line["error_percent"] == pytest.approx(100 * (ratio - 1))
    worst = max(abs(line["error_percent"]) for line in record["series"]["plans"])
    assert record["metrics"]["largest_error_percent"] == pytest.approx(worst)
    assert [line["family"] for line in record["series"]["reach"]] == list(FAMILIES)
    json.dumps(record)


def test_plan_from_python(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "load_costs", lambda *_: LINEAR)
    model = {"name": TINY["name"], "args": TINY["args"]}
    found = cropr.plan(PlanSpec.model_validate({"model": model, "prune": {"reducer": "cropr"}}).model, speedup=1.3)
    assert found.speedup >= 1.3
    for wrong in ({}, {"speedup": 2, "flops": 0.5}):
        with pytest.raises(ValueError, match="give one target"):
            cropr.plan("vit_tiny_patch16_224", **wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prune": {"reducer": "none"}}, "name a reducer"),
        ({"prune": {"reducer": "cropr", "schedule": {"constant": {"rate": 8}}}}, "leave it out"),
        ({"targets": (0,)}, "must be a positive number"),
    ],
)
def test_specs_that_cannot_be_planned(change, message):
    with pytest.raises(ValueError, match=message):
        spec(**change)


@pytest.mark.parametrize("quantity", ["latency_ms", "flops"])
def test_command_prints_what_the_target_is_about(tmp_path, monkeypatch, capsys, quantity):
    monkeypatch.setattr(parts, "measure_costs", lambda *_: LINEAR)
    value = spec(targets=(0.7 if quantity == "flops" else 70_000,), quantity=quantity).model_dump_json()
    assert main(["plan", "--spec", value, "--cache", str(tmp_path), "--device", "cpu"]) == 0
    assert {"latency_ms": " ms", "flops": "of the"}[quantity] in capsys.readouterr().out


def test_command_says_what_is_missing(capsys):
    assert main(["plan"]) == 2
    assert main(["plan", "--model", "no_such_vit", "--targets", "2"]) == 2
    assert main(["plan", "--spec", "{}", "--model", "x"]) == 2
