"""Microbenchmarks on a tiny model. No test depends on how long anything takes."""

import json
from unittest.mock import Mock

import pytest
import torch
from instant import MODEL, RATE, VARIANTS, instant, on_cuda  # noqa: F401

from cropr.bench import models, timing
from cropr.pruning.schedule import Schedule
from cropr.records import read_record
from cropr.specs import ModelSpec, PruneSpec
from workflow.paper.microbench import MEASURES, profiling, scoring, sweep, time_blocks, training_step
from workflow.paper.microbench.__main__ import main
from workflow.paper.microbench.measure import measure

EVA = ModelSpec(name="eva02_tiny_patch14_224", args={"depth": 4, "embed_dim": 48, "num_heads": 3})


def spec(measure, **changes):
    """A specification for images of 64 px and a ViT of depth 4."""
    values = {"measure": measure, "model": MODEL, "image_size": 64}
    if measure == "scoring":
        values |= {"prune": VARIANTS["cropr_llf"], "precision": "fp32"}
    elif measure != "blocks":
        values["variants"] = VARIANTS
    return MEASURES[measure].model_validate({**values, **changes})


def cells_of(asked):
    """Cells of a record that can be written, by variant."""
    record = measure(asked)
    json.dumps(record, allow_nan=False)
    assert (record["kind"], record["id"]) == ("microbench", asked.digest())
    return {cell["variant"]: cell for cell in record["cells"]}


def starved(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")


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
        ({"batch_sizes": [0, 4]}, "greater than or equal to 1"),
        ({"measure": "scoring", "prune": {"reducer": "random", "schedule": RATE}}, "queries are Cropr's"),
    ],
)
def test_refuses_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**{"measure": "sweep", **changes})


@pytest.mark.parametrize("kind", sorted(MEASURES))
def test_precision_that_the_device_lacks_is_a_reason_in_every_cell(monkeypatch, kind):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    changes = {"precisions": ["bf16"]} if kind == "sweep" else {"precision": "bf16"}
    record = measure(spec(kind, **changes, **({"tokens": [8, 9, 16, 17]} if kind == "blocks" else {})))
    assert record["metrics"]["measured"] == 0 < record["metrics"]["cells"]
    assert all("no fast bfloat16" in cell["unsupported"] for cell in record["cells"])


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=on_cuda) for kind in sorted(MEASURES)])
def test_records_on_cuda(kind):
    record = measure(spec(kind, **({"tokens": [8, 9, 16, 17]} if kind == "blocks" else {})), "cuda")
    assert record["metrics"]["measured"] == record["metrics"]["cells"] > 0


@pytest.mark.model
def test_sweep_has_a_cell_for_every_combination(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    asked = spec("sweep", precisions=["fp32", "amp_bf16"], attentions=["flash", "cudnn"], batch_sizes=[1, 2])
    record = measure(asked, "cpu")
    cells = record["cells"]
    assert len({(c["batch_size"], c["precision"], c["attention"], c["variant"]) for c in cells}) == len(cells) == 24
    reasons = {(c["precision"], c["attention"]): c.get("unsupported") for c in cells}
    assert reasons["fp32", "flash"] is None
    assert reasons["fp32", "cudnn"].startswith("attention cudnn: torch has no such kernel here")
    assert all("no fast bfloat16" in reasons["amp_bf16", kernel] for kernel in ("flash", "cudnn"))
    assert record["metrics"] == {"cells": 24, "measured": 6}
    measured = [(c["attention_calls"], len(c["seconds"])) for c in cells if "metrics" in c]
    assert measured == [({"flash": 4}, 3)] * 6


def test_sweep_compares_with_its_own_setting_and_with_the_first(monkeypatch):
    seconds = iter([4.0, 8.0, 1.0, 2.0])  # Cropr and unpruned in the first setting, then in the second

    def instead(cases, batch_size, rounds, warmup, device, tell):
        return batch_size, [timing.Outcome(seconds=[next(seconds)] * 3, kernels={"flash": 4}) for _ in cases]

    monkeypatch.setattr(sweep, "time_interleaved", instead)
    asked = spec("sweep", precisions=["fp32", "bf16"], batch_sizes=[2], variants={"c": VARIANTS["cropr"]})
    found = [cell["metrics"] for cell in measure(asked)["cells"]]
    assert [m["speedup"] for m in found] == [1, 2, 1, 2]
    assert [m["gain"] for m in found] == [1, 2, 4, 8]
    assert [m["images_per_s"] for m in found] == [2 / 8, 2 / 4, 2 / 2, 2 / 1]
    assert found[1]["mac_ratio"] == found[3]["mac_ratio"] > 1
    assert found[2]["weights_mb"] == pytest.approx(found[0]["weights_mb"] / 2)


@pytest.mark.model
def test_sweep_halves_a_batch_for_all_of_its_cells(monkeypatch):
    prepare = timing._prepare
    monkeypatch.setattr(timing, "_prepare", lambda *a: starved() if a[2] > 2 else prepare(*a))
    cells = measure(spec("sweep", batch_sizes=[8]))["cells"]
    assert [(c["batch_size"], c["metrics"]["batch_size"]) for c in cells] == [(8, 2)] * 3
    monkeypatch.setattr(timing, "_prepare", starved)
    cells = measure(spec("sweep", batch_sizes=[2]))["cells"]
    assert [c["unsupported"] for c in cells] == ["out of memory with a single image: CUDA out of memory"] * 3


@pytest.mark.parametrize("model", [MODEL, EVA], ids=["vit", "eva"])
def test_blocks_run_on_the_counts_asked_for(monkeypatch, model):
    forward = Mock(side_effect=time_blocks._forward)
    monkeypatch.setattr(time_blocks, "_forward", forward)
    size = 64 if model is MODEL else 56
    cells = measure(spec("blocks", model=model, image_size=size, tokens=[9, 30, 17, 8], rounds=3))["cells"]
    assert [cell["tokens"] for cell in cells] == [8, 9, 17, 30]
    assert all(len(cell["seconds"]) == 3 and min(cell["seconds"]) > 0 for cell in cells)
    assert {call.args[1].x.shape for call in forward.call_args_list} == {(2, count, 48) for count in (8, 9, 17, 30)}
    with pytest.raises(ValueError, match="1 tokens: the model has 1 prefix tokens"):
        measure(spec("blocks", tokens=[2, 3, 4, 5]).model_copy(update={"tokens": [1, 9]}))
    for cell in cells if model is MODEL else ():
        n = cell["tokens"]
        assert cell["metrics"]["block_gmacs"] == pytest.approx((n * 12 * 48 * 48 + 2 * n * n * 48) / 1e9)


@pytest.mark.parametrize("model", [MODEL, EVA], ids=["vit", "eva"])
def test_profile_record(model):
    cells = cells_of(spec("profile", model=model, image_size=64 if model is MODEL else 56, batch_size=2))
    parts = {name: cell["seconds"] for name, cell in cells.items()}
    assert [parts["unpruned"][name] for name in profiling.PRUNING] == [0, 0, 0, 0]
    assert parts["cropr"]["fusion"] == 0 < parts["cropr_llf"]["fusion"]
    assert parts["cropr"]["gather"] > 0
    for cell in cells.values():
        assert set(cell["seconds"]) == set(profiling.CATEGORIES)
        assert cell["metrics"]["total_s"] == pytest.approx(sum(cell["seconds"].values()))
        own = sum(cell["seconds"][name] for name in profiling.PRUNING)
        assert cell["metrics"]["pruning_share"] == pytest.approx(own / cell["metrics"]["total_s"])


@pytest.mark.model
@pytest.mark.parametrize("queries", [None, 5])
def test_one_vector_keeps_the_tokens_that_all_queries_keep(queries):
    cells = cells_of(spec("scoring", queries=queries, rounds=3))
    assert list(cells) == ["unpruned", scoring.ONE, scoring.ALL]
    one, every = (cells[name]["metrics"] for name in (scoring.ONE, scoring.ALL))
    assert one["kept_in_both"] == 1
    # 17 and 13 tokens are scored, by one vector or by as many as there are patches.
    assert every["gmacs"] - one["gmacs"] == pytest.approx(((queries or 16) - 1) * (17 + 13) * 48 / 1e9)
    assert cells[scoring.ONE]["tokens"] == cells[scoring.ALL]["tokens"] == [17, 13, 10, 10, 17]
    ratios = [a / b for a, b in zip(cells[scoring.ALL]["seconds"], cells[scoring.ONE]["seconds"], strict=True)]
    assert one["over_all_queries"] == pytest.approx(sorted(ratios)[1])


@pytest.mark.model
def test_training_record(monkeypatch):
    monkeypatch.setattr(training_step, "working_memory", lambda work, device: (work(), 0.0))
    cells = cells_of(spec("training", batch_size=2))
    base, pruned = cells["unpruned"]["metrics"], cells["cropr_llf"]["metrics"]
    assert (base["speedup"], base["mac_ratio"]) == (1, 1)
    assert pruned["mac_ratio"] > 1
    # AdamW's state is two numbers a weight; auxiliary heads, half as large as the encoder here, are training's alone.
    host = models.build_variants(ModelSpec.model_validate(MODEL), {}, 64, "cpu", torch.float32)["unpruned"]
    assert base["state_mb"] == pytest.approx(3 * models.weights_mb(host), rel=0.01)
    assert pruned["state_mb"] > 1.2 * base["state_mb"]
    assert pruned["inference_memory_mb"] == pytest.approx(base["inference_memory_mb"], rel=0.01)
    assert cells["cropr"]["tokens"] == [17, 13, 10, 7, 7]


def test_a_training_step_changes_the_weights_and_half_precision_needs_a_gpu(monkeypatch):
    asked = spec("training", batch_size=2)
    trainee = training_step._Trainee(asked, PruneSpec.model_validate(VARIANTS["cropr"]), "cpu", batch_size=2)
    weight = trainee.model.backbone.host.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    trainee.step()
    trainee.step()
    assert (weight != before).any()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    cells = measure(spec("training", precision="fp16"))["cells"]
    assert all("training scales its loss on CUDA only" in cell["unsupported"] for cell in cells)


@pytest.mark.model
def test_command_writes_a_record_that_it_reads_again(tmp_path, capsys):
    text = spec("sweep", attentions=["flash", "cudnn"], batch_sizes=[2]).model_dump_json()
    first, again = tmp_path / "a", tmp_path / "b"
    main(["sweep", "--device", "cpu", "--spec", text, "--out", str(first)])
    assert "not measured: attention cudnn" in capsys.readouterr().out
    more = ["--set", "batch_sizes=[1]", "--out", str(again)]
    main(["sweep", "--device", "cpu", "--spec", str(first / "record.json"), *more])
    assert read_record(again)["spec"] == read_record(first)["spec"] | {"batch_sizes": [1]}


def test_command_refuses_in_one_message(capsys):
    for arguments, message in (
        (["profile", "--spec", '{"measure": "sweep"}'], "is of a measurement of kind sweep"),
        (["sweep", "--set", "variants.cropr.reducers=x"], "variants.cropr.reducers: unknown key"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
