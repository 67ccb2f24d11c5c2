"""The laboratory's measurements on a tiny model. No test depends on how long anything takes."""

import json

import lab_tiny
import pytest
import torch
from lab_tiny import spec

from cropr.bench import blocks, models, peak, profiling, scoring, sweep, timing, training_step
from cropr.bench.lab import measure
from cropr.bench.specs import MEASURES
from cropr.cli import main
from cropr.pruning.reducers import Context
from cropr.pruning.schedule import Schedule
from cropr.pruning.tokens import Tokens
from cropr.records import read_record
from cropr.specs import ModelSpec, PruneSpec

MODEL = ModelSpec.model_validate(lab_tiny.MODEL)
EVA = ModelSpec(name="eva02_tiny_patch14_224", args={"depth": 4, "embed_dim": 48, "num_heads": 3})


@pytest.fixture(autouse=True)
def _instant(monkeypatch):
    """One forward pass a round will do, and no large matrix product."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0)
    monkeypatch.setattr(peak, "SIZES", {"cpu": (16,)})
    monkeypatch.setattr(peak, "SECONDS", 0)


# Specifications ------------------------------------------------------------------------------------------------------


def test_defaults_are_complete_and_kinds_have_names_of_their_own():
    found = [kind.model_validate({"measure": name}) for name, kind in MEASURES.items()]
    assert len({one.digest() for one in found}) == len(MEASURES)
    for one in found:
        for prune in getattr(one, "variants", {}).values():
            depth = 12 if "small" in one.model.name else 24
            counts = Schedule.from_config(prune.schedule).resolve(196, depth, prune.fusion == "llf", prefix=1)
            assert min(counts) < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"unpruned": {}}}, "'unpruned' is measured in any case"),
        ({"precisions": ["fp32", "fp32"]}, "give every value once"),
        ({"batch_sizes": [0, 4]}, "0 must be 1 or more"),
    ],
)
def test_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        spec("sweep", **changes)


# Sweep ---------------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_sweep_has_a_cell_for_every_combination(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    told = []
    asked = spec("sweep", precisions=["fp32", "amp_bf16"], attentions=["flash", "cudnn"], batch_sizes=[1, 2])
    record = measure(asked, "cpu", told.append)
    json.dumps(record, allow_nan=False)
    cells = record["cells"]
    places = [(c["batch_size"], c["precision"], c["attention"], c["variant"]) for c in cells]
    assert len(set(places)) == len(places) == 2 * 2 * 2 * 3
    reasons = {(c["precision"], c["attention"]): c.get("unsupported") for c in cells}
    assert reasons["fp32", "flash"] is None
    assert reasons["fp32", "cudnn"].startswith("attention cudnn: torch has no such kernel here")
    assert all("no fast bfloat16" in reasons["amp_bf16", kernel] for kernel in ("flash", "cudnn"))
    assert record["metrics"] == {"cells": 24, "measured": 6}
    for cell in cells:
        if "metrics" in cell:
            assert cell["attention_calls"] == {cell["attention"]: 4}
            assert len(cell["seconds"]) == 3
    assert told[0] == "build"
    assert told.count("round 3 of 3") == 2


def test_sweep_compares_with_its_own_setting_and_with_the_first(monkeypatch):
    seconds = iter([8.0, 4.0, 2.0, 1.0])  # unpruned and Cropr in the first setting, then in the second

    def instead(cases, rounds, warmup, device, tell):
        return [sweep.Outcome(seconds=[next(seconds)] * 3, kernels={"flash": 4}) for _ in cases]

    monkeypatch.setattr(sweep, "contest", instead)
    asked = spec("sweep", precisions=["fp32", "bf16"], batch_sizes=[2], variants={"c": lab_tiny.VARIANTS["cropr"]})
    cells = measure(asked)["cells"]
    assert [c["metrics"]["speedup"] for c in cells] == [1, 2, 1, 2]
    assert [c["metrics"]["gain"] for c in cells] == [1, 2, 4, 8]
    assert [c["metrics"]["images_per_s"] for c in cells] == [2 / 8, 2 / 4, 2 / 2, 2 / 1]
    assert cells[1]["metrics"]["bound"] == cells[3]["metrics"]["bound"] > 1
    assert cells[2]["metrics"]["weights_mb"] == pytest.approx(cells[0]["metrics"]["weights_mb"] / 2)


@pytest.mark.model
def test_sweep_halves_a_batch_for_all_of_its_cells(monkeypatch):
    attempt = sweep._attempt

    def hungry(*arguments):
        if arguments[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attempt(*arguments)

    monkeypatch.setattr(sweep, "_attempt", hungry)
    cells = measure(spec("sweep", batch_sizes=[8]))["cells"]
    assert [(c["batch_size"], c["metrics"]["batch_size"]) for c in cells] == [(8, 2)] * 3


def test_sweep_says_of_every_cell_that_not_one_image_fits(monkeypatch):
    def starved(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sweep, "_attempt", starved)
    record = measure(spec("sweep", batch_sizes=[2]))
    assert [c["unsupported"] for c in record["cells"]] == ["out of memory with a single image: CUDA out of memory"] * 3


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, EVA], ids=["vit", "eva"])
def test_block_series_by_token_count(model):
    found = blocks.block_series(model, [9, 30, 9, 17], batch_size=2, rounds=3)
    assert list(found) == [9, 17, 30]
    assert all(len(readings) == 3 and min(readings) > 0 for readings in found.values())


def test_blocks_run_on_the_counts_asked_for(monkeypatch):
    seen, forward = set(), blocks._forward

    def spy(backbone, tokens, position):
        seen.add(tuple(tokens.x.shape))
        return forward(backbone, tokens, position)

    monkeypatch.setattr(blocks, "_forward", spy)
    blocks.block_series(MODEL, [17, 5], batch_size=3, rounds=3)
    assert seen == {(3, 5, 48), (3, 17, 48)}
    with pytest.raises(ValueError, match="1 tokens: the model has 1 prefix tokens"):
        blocks.block_series(MODEL, [1, 5])


def test_latency_is_that_of_one_block(monkeypatch):
    """A clock that reads the number of blocks run: whatever their number, one block takes a second."""
    monkeypatch.setattr(blocks, "clock", lambda run, device: float(blocks.DEPTH))
    assert blocks.block_series(MODEL, [9], rounds=3) == {9: [1.0] * 3}


def test_blocks_record():
    record = measure(spec("blocks", tokens=[8, 9, 16, 17], rounds=3))
    json.dumps(record, allow_nan=False)
    assert [cell["tokens"] for cell in record["cells"]] == [8, 9, 16, 17]
    cost = [cell["metrics"]["block_gmacs"] for cell in record["cells"]]
    assert cost == sorted(cost)
    assert cost[0] == pytest.approx((8 * 12 * 48 * 48 + 2 * 64 * 48) / 1e9)


def test_blocks_record_says_what_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    record = measure(spec("blocks", tokens=[8, 9, 16, 17], precision="bf16"))
    assert [set(cell) & {"unsupported", "metrics"} for cell in record["cells"]] == [{"unsupported"}] * 4


# Profile -------------------------------------------------------------------------------------------------------------


def test_parts_of_a_profile_add_up_to_the_whole():
    asked = spec("profile", batch_size=2)
    built = models.build_variants(asked.model, asked.variants, 64, "cpu", torch.float32)
    model, noise = built["cropr_llf"], models.random_images(2, 64, "cpu", torch.float32, channels_last=False)
    with torch.inference_mode(), profiling.labelled(model), profiling.quiet_profile() as profile:  # noqa: SIM117
        with profiling.record_function("part:other"):
            model(noise)
    (root,) = [e for e in profile.function_events if e.name == "part:other" and e.cpu_parent is None]
    sums = profiling._sums(root, cuda=False)
    assert set(sums) == set(profiling.CATEGORIES)
    assert sum(sums.values()) == pytest.approx(root.cpu_time_total / 1e6)
    assert all(seconds > 0 for seconds in sums.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_profile_record():
    record = measure(spec("profile", batch_size=2, passes=3))
    json.dumps(record, allow_nan=False)
    parts = {cell["variant"]: cell["seconds"] for cell in record["cells"]}
    assert [parts["unpruned"][name] for name in profiling.PRUNING] == [0, 0, 0, 0]
    assert parts["cropr"]["fusion"] == 0
    assert parts["cropr_llf"]["fusion"] > 0
    for cell in record["cells"]:
        metrics = cell["metrics"]
        assert metrics["total_s"] == pytest.approx(sum(cell["seconds"].values()))
        own = sum(cell["seconds"][name] for name in profiling.PRUNING)
        assert metrics["pruning_share"] == pytest.approx(own / metrics["total_s"])


def test_profile_of_a_rotary_model_counts_its_rows_as_gathered():
    variants = {"cropr": PruneSpec.model_validate(lab_tiny.VARIANTS["cropr"])}
    built = models.build_variants(EVA, variants, 56, "cpu", torch.float32)
    noise = models.random_images(1, 56, "cpu", torch.float32, channels_last=False)
    found = {}
    with torch.inference_mode():
        for name, model in built.items():
            found[name] = profiling.profile_forward(model, lambda model=model: model(noise), passes=1, device="cpu")
    assert found["cropr"]["gather"] > 0
    assert found["unpruned"]["gather"] == 0


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("queries", [None, 5])
def test_one_vector_keeps_the_tokens_that_all_queries_keep(queries):
    record = measure(spec("scoring", queries=queries, rounds=3))
    json.dumps(record, allow_nan=False)
    cells = {cell["variant"]: cell for cell in record["cells"]}
    assert list(cells) == ["unpruned", scoring.ONE, scoring.ALL]
    one, every = (cells[name]["metrics"] for name in (scoring.ONE, scoring.ALL))
    assert one["kept_in_both"] == 1
    assert isinstance(record["provenance"]["freed_memory_reused"], bool)
    # 17 and 13 tokens are scored, by one vector or by as many as there are patches.
    assert every["gmacs"] - one["gmacs"] == pytest.approx(((queries or 16) - 1) * (17 + 13) * 48 / 1e9)
    assert cells[scoring.ONE]["tokens"] == cells[scoring.ALL]["tokens"] == [17, 13, 10, 10, 17]
    ratios = [a / b for a, b in zip(cells[scoring.ALL]["seconds"], cells[scoring.ONE]["seconds"], strict=True)]
    assert one["over_all_queries"] == pytest.approx(sorted(ratios)[1])


def test_all_queries_score_as_the_training_form_does():
    found = scoring.build(spec("scoring"), "cpu")
    reducer = found[scoring.ALL].model.reducers["1"]
    tokens = Tokens.full(torch.randn(2, 17, 48), prefix=1)
    logits, _ = reducer.scorer(tokens.x)
    assert logits.shape == (2, 1, 16, 17)
    torch.testing.assert_close(reducer.score(tokens, Context()), logits.sum(dim=(1, 2))[:, 1:])
    folded = found[scoring.ONE].model.reducers["1"].score(tokens, Context())
    torch.testing.assert_close(folded, reducer.score(tokens, Context()), rtol=0, atol=1e-4)


def test_a_wrong_fold_is_found_before_anything_is_timed(monkeypatch):
    asked = spec("scoring")
    found = scoring.build(asked, "cpu")
    assert scoring.score_difference(asked, found, "cpu") < scoring.ROUNDING
    found[scoring.ONE].model.reducers["1"].scorer.weight += 0.01
    assert scoring.score_difference(asked, found, "cpu") > 100 * scoring.ROUNDING
    monkeypatch.setattr(scoring, "build", lambda *_: found)
    monkeypatch.setattr(scoring, "contest", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="scores differ by"):
        measure(asked)


def test_scoring_without_queries_is_refused_and_what_cannot_run_says_why(monkeypatch):
    with pytest.raises(ValueError, match="queries are Cropr's"):
        spec("scoring", prune={"reducer": "random", "schedule": lab_tiny.RATE})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    record = measure(spec("scoring", precision="bf16"))
    assert all("no fast bfloat16" in cell["unsupported"] for cell in record["cells"])


@pytest.mark.model
def test_training_record():
    record = measure(spec("training", batch_size=2))
    json.dumps(record, allow_nan=False)
    cells = {cell["variant"]: cell for cell in record["cells"]}
    assert list(cells) == ["unpruned", "cropr", "cropr_llf"]
    base, pruned = cells["unpruned"]["metrics"], cells["cropr_llf"]["metrics"]
    assert (base["speedup"], base["bound"]) == (1, 1)
    assert pruned["bound"] > 1
    # AdamW remembers two numbers a weight, and pruned models have auxiliary heads besides.
    host = models.build_variants(MODEL, {}, 64, "cpu", torch.float32)["unpruned"]
    assert base["state_mb"] == pytest.approx(3 * models.weights_mb(host), rel=0.01)
    assert pruned["state_mb"] > base["state_mb"]
    assert cells["cropr"]["tokens"] == [17, 13, 10, 7, 7]


@pytest.mark.model
def test_memory_of_inference_is_that_of_the_deployed_model(monkeypatch):
    """The auxiliary heads, half as large as the encoder here, are not part of it."""
    monkeypatch.setattr(training_step, "working_memory", lambda work, device: (work(), 0.0))
    cells = {cell["variant"]: cell["metrics"] for cell in measure(spec("training", batch_size=2))["cells"]}
    assert cells["cropr_llf"]["state_mb"] > 1.2 * cells["unpruned"]["state_mb"]
    inference = [cells[name]["inference_memory_mb"] for name in ("unpruned", "cropr_llf")]
    assert inference[1] == pytest.approx(inference[0], rel=0.01)


def test_a_training_step_changes_the_weights():
    asked = spec("training", batch_size=2)
    trainee = training_step._Trainee(asked, asked.variants["cropr"], "cpu", batch_size=2)
    weight = trainee.model.backbone.host.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    trainee.step()
    trainee.step()
    assert (weight != before).any()


def test_training_in_half_precision_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    record = measure(spec("training", precision="fp16"))
    assert [cell["unsupported"] for cell in record["cells"]] == [
        "precision fp16: training scales its loss on CUDA only; use fp32 or bf16"
    ] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", sorted(MEASURES))
def test_records_on_cuda(kind):
    changes = {"tokens": [8, 9, 16, 17]} if kind == "blocks" else {}
    record = measure(spec(kind, **changes), "cuda")
    assert record["metrics"]["measured"] == record["metrics"]["cells"] > 0


# Command -------------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_command_writes_a_record_that_it_reads_again(tmp_path, capsys):
    lab = ["lab", "sweep", "--device", "cpu"]
    first, again = tmp_path / "a", tmp_path / "b"
    text = spec("sweep", attentions=["flash", "efficient"]).model_dump_json()
    assert main([*lab, "--spec", text, "--out", str(first)]) == 0
    assert main([*lab, "--spec", str(first / "record.json"), "--set", "batch_sizes=[1]", "--out", str(again)]) == 0
    shown = capsys.readouterr().out
    assert "17 to 7" in shown
    assert "not measured: attention efficient: torch has no such kernel here" in shown
    assert read_record(again)["spec"]["batch_sizes"] == [1]
    assert read_record(again)["spec"]["attentions"] == read_record(first)["spec"]["attentions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", "--spec", '{"measure": "sweep"}'], "lab profile: --spec is of a measurement of kind sweep"),
        (
            ["sweep", "--set", "variants.cropr.reducers=x"],
            "spec.variants.cropr.reducers: unknown key; allowed: reducer",
        ),
        (["sweep", "--set", "rounds=1"], "spec.rounds = 1: must be >= 3"),
        (["blocks", "--spec", "missing.json"], "--spec missing.json: no such file"),
        (["training", "--threads", "0"], "--threads 0: must be 1 or more"),
        (["profile", "--set", "model.name=vit_nonsense"], "timm has no model 'vit_nonsense'"),
    ],
)
def test_command_says_what_is_wrong(words, message, caplog):
    assert main(["lab", *words]) == 2
    assert message in caplog.text
