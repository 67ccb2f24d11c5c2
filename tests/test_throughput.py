"""The benchmark's logic: order, statistics, models, record. No test depends on how long anything takes."""

import json

import numpy as np
import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cropr.bench import throughput
from cropr.bench.throughput import Run, Unsupported
from cropr.cli import main
from cropr.records import read_record
from cropr.specs import BenchSpec

TINY = {"name": "vit_tiny_patch16_224", "args": {"depth": 4, "embed_dim": 48, "num_heads": 3}}
EVA = {"name": "eva02_tiny_patch14_224", "args": {"depth": 3, "embed_dim": 48, "num_heads": 3}}
PRUNE = {"reducer": "cropr", "schedule": {"constant": {"rate": 3}}, "fusion": "llf"}


def make(**changes):
    values = {"model": TINY, "prune": PRUNE, "image_size": 64, "batch_size": 2, "rounds": 3, **changes}
    return BenchSpec.model_validate(values)


@pytest.fixture
def instant(monkeypatch):
    """One forward pass a round will do."""
    monkeypatch.setattr(throughput, "MIN_SAMPLE_S", 0)


class FakeTime:
    """A clock that only a forward pass moves."""

    def __init__(self, monkeypatch, step):
        self.now, self.step, self.passes = 0.0, step, 0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)

    def forward(self):
        self.passes += 1
        self.now += self.step


# Time ----------------------------------------------------------------------------------------------------------------


def test_rounds_alternate_who_runs_first():
    order = []
    clocks = [lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0]
    seconds = throughput.interleave(clocks, 3)
    assert "".join(order) == "abbaab"
    assert seconds == [[1.0] * 3, [2.0] * 3]


def test_clock_gives_seconds_of_one_pass(monkeypatch):
    fake = FakeTime(monkeypatch, step=0.25)
    assert throughput.clock(Run(fake.forward, repeats=4)) == pytest.approx(0.25)
    assert fake.passes == 4


@pytest.mark.parametrize(
    ("step", "first", "warmup", "ran", "repeats"),
    [
        (0.03, 0.5, 1, 1, 4),  # fast: one pass more, 4 of 0.03 s make 0.1 s
        (0.03, 0.5, 3, 2, 4),
        (2.0, 3.0, 1, 0, 1),  # slow: the pass that ran already is the whole warm-up
        (2.0, 3.0, 3, 2, 1),
    ],
)
def test_warm_up_finds_a_round_long_enough(monkeypatch, step, first, warmup, ran, repeats):
    fake = FakeTime(monkeypatch, step)
    assert throughput.warm_up(fake.forward, warmup, "cpu", first).repeats == repeats
    assert fake.passes == ran


# Numbers -------------------------------------------------------------------------------------------------------------


def test_speed_up_is_the_median_of_paired_ratios():
    # Ratios 2, 2 and 1.5 have the median 2; the ratio of the medians, 4 s over 1.5 s, would be 2.67.
    found = throughput.summary([2.0, 4.0, 6.0], [1.0, 2.0, 4.0], batch_size=8, bound=2.5)
    assert found["speedup"] == pytest.approx(2)
    assert found["share_of_bound"] == pytest.approx(0.8)
    assert found["base_images_per_s"] == pytest.approx(2)
    assert found["images_per_s"] == pytest.approx(4)
    assert found["base_images_per_s_iqr"] == pytest.approx((4 + 2) / 2 - (2 + 8 / 6) / 2)
    assert 1.5 <= found["speedup_low"] <= 2 <= found["speedup_high"] <= 2


def test_bootstrap_of_equal_values_is_a_point():
    assert throughput.bootstrap_median([1.7] * 5) == pytest.approx((1.7, 1.7))


def test_bootstrap_has_the_width_that_theory_gives():
    """Standard error of a normal sample's median: 1.2533 / sqrt(n); checked on the mean of 20 samples."""
    draws = np.random.default_rng(1).normal(size=(20, 100))
    intervals = np.array([throughput.bootstrap_median(row, draws=400) for row in draws])
    half = (intervals[:, 1] - intervals[:, 0]).mean() / 2
    assert half == pytest.approx(1.96 * 1.2533 / 10, rel=0.2)
    assert throughput.bootstrap_median(draws[0]) == throughput.bootstrap_median(draws[0])


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TINY, EVA])
def test_base_is_the_timm_model(model):
    """The host that was built without memory computes what timm's own construction computes with these weights."""
    size = 56 if model is EVA else 64
    pair = throughput.build(make(model=model, image_size=size), "cpu")
    assert pair.base is pair.pruned.model.backbone.host
    expected = timm.create_model(model["name"], num_classes=1000, img_size=size, **model["args"]).eval()
    expected.load_state_dict(pair.base.state_dict())
    with torch.inference_mode():
        logits = pair.base(pair.base_images)
        torch.testing.assert_close(logits, expected(pair.base_images), rtol=0, atol=1e-6)
        assert logits.std() > 1e-3
        assert pair.pruned(pair.pruned_images).isfinite().all()


def test_random_weights_are_like_timms():
    pair = throughput.build(make(), "cpu")
    block = pair.base.blocks[0]
    assert block.mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert (block.norm1.weight == 1).all()
    assert (block.mlp.fc1.bias == 0).all()
    assert pair.pruned.model.reducers["1"].scorer.weight.std() > 0
    assert not any(t.is_meta or t.requires_grad for t in pair.pruned.state_dict(keep_vars=True).values())


def test_scores_choose_different_tokens_per_image():
    pair = throughput.build(make(), "cpu")
    kept = pair.pruned.detailed(pair.pruned_images).kept[2]
    assert kept[0].tolist() != kept[1].tolist()


def test_second_image_size_makes_a_second_host():
    pair = throughput.build(make(prune={"reducer": "none"}, image_size=96, pruned_image_size=64), "cpu")
    assert pair.base is not pair.pruned.model.backbone.host
    assert pair.base_images.shape[-1] == 96
    assert pair.pruned_images.shape[-1] == 64
    assert pair.pruned.model.token_trace == (17,) * 5
    torch.testing.assert_close(pair.base.head.weight, pair.pruned.model.backbone.host.head.weight)


def test_precision_is_a_cast():
    pair = throughput.build(make(precision="bf16"), "cpu")
    assert pair.base_images.dtype == torch.bfloat16
    assert {p.dtype for p in pair.pruned.parameters()} == {torch.bfloat16}
    full = throughput.build(make(), "cpu")
    assert throughput.weights_mb(pair.base) == pytest.approx(throughput.weights_mb(full.base) / 2)


def test_deployed_weights_are_one_vector_a_module_larger():
    pair = throughput.build(make(), "cpu")
    extra = throughput.weights_mb(pair.pruned) - throughput.weights_mb(pair.base)
    assert extra == pytest.approx(2 * 48 * 4 / 1e6)


def test_trial_names_the_attention_kernel_that_ran():
    pair = throughput.build(make(), "cpu")
    assert throughput.trial(pair.base, pair.base_images) == {"flash": 4}
    with sdpa_kernel(SDPBackend.MATH):
        assert throughput.trial(pair.pruned, pair.pruned_images) == {"math": 4}


def test_trial_refuses_logits_that_are_not_finite():
    pair = throughput.build(make(), "cpu")
    pair.base.head.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"VisionTransformer gives non-finite logits in torch\.float32"):
        throughput.trial(pair.base, pair.base_images)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_refuses_a_precision_that_the_cpu_lacks(monkeypatch, precision):
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda: False)
    with pytest.raises(Unsupported, match=f"precision {precision}: this CPU has no fast .*; use fp32"):
        throughput.measure(make(precision=precision))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA")
def test_refuses_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device cuda:0: torch sees no CUDA device; use cpu"):
        throughput.measure(make(), "cuda:0")


def test_refuses_a_device_without_a_clock():
    with pytest.raises(ValueError, match=r"device mps: measured are cpu and cuda"):
        throughput.measure(make(), "mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_record_on_cuda(precision):
    record = throughput.measure(make(precision=precision), "cuda")
    assert record["metrics"]["pruned_peak_memory_mb"] > record["metrics"]["weights_mb"]
    assert record["provenance"]["attention"]["base"].keys() <= {"flash", "efficient", "cudnn", "math"}


# Record --------------------------------------------------------------------------------------------------------------


def test_record(instant):
    told = []
    spec = make()
    record = throughput.measure(spec, "cpu", told.append)
    json.dumps(record, allow_nan=False)
    assert (record["kind"], record["id"]) == ("bench", spec.digest())
    assert BenchSpec.model_validate(record["spec"]) == spec
    assert record["tokens"] == [17, 13, 10, 10, 17]
    metrics = record["metrics"]
    assert metrics["bound"] == pytest.approx(metrics["base_gmacs"] / metrics["gmacs"])
    assert metrics["bound"] > 1
    assert metrics["speedup_low"] <= metrics["speedup"] <= metrics["speedup_high"]
    assert metrics["base_tokens"] == 17
    assert 0 < metrics["base_weights_mb"] < metrics["weights_mb"] < 1.01 * metrics["base_weights_mb"]
    ratio = np.array(record["series"]["base_seconds"]) / record["series"]["seconds"]
    assert metrics["speedup"] == pytest.approx(np.median(ratio))
    assert len(ratio) == spec.rounds
    origin = record["provenance"]
    assert origin["attention"] == {"base": {"flash": 4}, "pruned": {"flash": 4}}
    assert (origin["precision"], origin["device"]) == ("fp32", "cpu")
    assert told == ["build", "warm up base", "warm up pruned", "round 1 of 3", "round 2 of 3", "round 3 of 3"]


def test_unpruned_against_itself_has_bound_one(instant):
    record = throughput.measure(make(prune={"reducer": "none"}))
    assert record["metrics"]["bound"] == 1
    assert record["metrics"]["weights_mb"] == record["metrics"]["base_weights_mb"]


# Command -------------------------------------------------------------------------------------------------------------


def test_command_writes_a_record_that_it_reads_again(instant, tmp_path, capsys):
    bench = ["bench", "--device", "cpu"]
    assert main([*bench, "--spec", make().model_dump_json(), "--out", str(tmp_path / "a")]) == 0
    assert main([*bench, "--spec", str(tmp_path / "a" / "record.json"), "--out", str(tmp_path / "b")]) == 0
    first, second = read_record(tmp_path / "a"), read_record(tmp_path / "b")
    assert first["id"] == second["id"] == make().digest()
    shown = capsys.readouterr().out
    assert "17 to 10" in shown
    assert f"bound {first['metrics']['bound']:.3f}x" in shown


def test_command_writes_down_why_a_row_cannot_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    text = make(precision="bf16").model_dump_json()
    assert main(["bench", "--device", "cpu", "--spec", text, "--out", str(tmp_path)]) == 0
    record = read_record(tmp_path)
    assert record["metrics"] == {}
    assert "this CPU has no fast bfloat16" in record["unsupported"]
    assert main(["bench", "--device", "cpu", "--spec", text]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a model with --model"),
        (["--model", "vit_tiny_patch16_224", "--spec", "{}"], "--spec and --model: the spec says it all"),
        (["--model", "m", "--rate", "4", "--schedule", "{}"], "give one of them"),
        (["--model", "m", "--reducer", "none", "--rate", "4"], "--reducer none prunes nothing"),
        (["--model", "m", "--rounds", "2"], "spec.rounds = 2: must be >= 3"),
        (["--model", "m", "--threads", "0"], "--threads 0: must be 1 or more"),
        (["--spec", "missing.json"], "--spec missing.json: no such file"),
        (["--spec", '{"model": {"name": "m"}, "prune": {}, "batch": 2}'], "spec.batch: unknown key; allowed: "),
        (["--model", "vit_tiny_patch15"], "no model 'vit_tiny_patch15'; of this family it has: vit_tiny_patch16_224"),
        (["--model", "vit_tiny_patch16_224", "--rate", "50"], "lower the rate to 19 or less"),
    ],
)
def test_command_says_what_is_wrong(words, message, caplog):
    assert main(["bench", "--device", "cpu", *words]) == 2
    assert message in caplog.text
