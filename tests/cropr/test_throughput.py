"""A row of a throughput table: models, kernels, record, command. No test depends on how long anything takes."""

import json

import numpy as np
import pytest
import timm
import torch

from cropr.bench import attention, contest, models, peak, throughput, timing
from cropr.bench.contest import Case
from cropr.bench.device import Unsupported, weights_dtype
from cropr.bench.specs import BenchSpec
from cropr.cli import main
from cropr.records import read_record

TINY = {"name": "vit_tiny_patch16_224", "args": {"depth": 4, "embed_dim": 48, "num_heads": 3}}
EVA = {"name": "eva02_tiny_patch14_224", "args": {"depth": 3, "embed_dim": 48, "num_heads": 3}}
PRUNE = {"reducer": "cropr", "schedule": {"constant": {"rate": 3}}, "fusion": "llf"}


def make(**changes):
    values = {"model": TINY, "prune": PRUNE, "image_size": 64, "batch_size": 2, "rounds": 3, **changes}
    return BenchSpec.model_validate(values)


@pytest.fixture
def instant(monkeypatch):
    """One forward pass a round will do, and no large matrix product."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0)
    monkeypatch.setattr(peak, "SIZES", {"cpu": (16,), "cuda": (16,)})
    monkeypatch.setattr(peak, "SECONDS", 0)


def images(pair, which=0, dtype=torch.float32):
    return models.random_images(2, pair.sizes[which], "cpu", dtype, channels_last=False)


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
        logits = pair.base(images(pair))
        torch.testing.assert_close(logits, expected(images(pair)), rtol=0, atol=1e-6)
        assert logits.std() > 1e-3
        assert pair.pruned(images(pair, 1)).isfinite().all()


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
    kept = pair.pruned.detailed(images(pair, 1)).kept[2]
    assert kept[0].tolist() != kept[1].tolist()


def test_a_classifier_has_no_metrics_of_a_detector(instant):
    metrics = throughput.measure(make(), "cpu")["metrics"]
    assert not [name for name in metrics if name.endswith(("_whole", "_linear"))]


def test_second_image_size_makes_a_second_host():
    pair = throughput.build(make(prune={"reducer": "none"}, image_size=96, pruned_image_size=64), "cpu")
    assert pair.base is not pair.pruned.model.backbone.host
    assert pair.sizes == (96, 64)
    assert pair.pruned.model.token_trace == (17,) * 5
    torch.testing.assert_close(pair.base.head.weight, pair.pruned.model.backbone.host.head.weight)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("amp_bf16", torch.float32)])
def test_a_cast_model_is_stored_in_its_precision_and_a_mixed_one_in_full(precision, dtype):
    assert weights_dtype(precision) == dtype
    pair = throughput.build(make(precision=precision), "cpu")
    assert {p.dtype for p in pair.pruned.parameters()} == {dtype}
    full = throughput.build(make(), "cpu")
    assert models.weights_mb(pair.base) == pytest.approx(models.weights_mb(full.base) * dtype.itemsize / 4)


def test_channels_last_lays_out_the_patch_embedding():
    pair = throughput.build(make(channels_last=True), "cpu")
    assert pair.base.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    noise = models.random_images(2, 64, "cpu", torch.float32, channels_last=True)
    assert noise.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pair.base(noise), pair.base(images(pair)), rtol=0, atol=1e-5)


def test_deployed_weights_are_one_vector_a_module_larger():
    pair = throughput.build(make(), "cpu")
    extra = models.weights_mb(pair.pruned) - models.weights_mb(pair.base)
    assert extra == pytest.approx(2 * 48 * 4 / 1e6)


def test_variants_share_the_weights_of_one_host():
    spec = make()
    built = models.build_variants(spec.model, {"a": spec.prune, "b": spec.prune}, 64, "cpu", torch.float32)
    assert list(built) == ["unpruned", "a", "b"]
    host = built["unpruned"]
    assert all(built[name].model.backbone.host is host for name in "ab")
    assert built["a"].model.reducers["1"] is not built["b"].model.reducers["1"]
    assert models.token_trace(host) == [17] * 5


# Attention kernels and other ways to run -----------------------------------------------------------------------------


def outcome(model, noise, **changes):
    values = {"name": "model", "model": model, "images": noise, **changes}
    return contest.contest([Case(**values)], rounds=3, warmup=1, device="cpu")[0]


@pytest.mark.parametrize("kernel", ["math", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp_bf16"])
def test_a_forced_kernel_really_runs(instant, kernel, precision):
    pair = throughput.build(make(precision=precision), "cpu")
    found = outcome(pair.pruned, images(pair, 1, weights_dtype(precision)), attention=kernel, precision=precision)
    assert found.kernels == {kernel: 4}
    assert (found.unsupported, len(found.seconds)) == (None, 3)


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_the_device_lacks_is_said(instant, kernel):
    pair = throughput.build(make(), "cpu")
    found = outcome(pair.base, images(pair), attention=kernel)
    assert found.unsupported.startswith(f"attention {kernel}: torch has no such kernel here: No viable backend")
    assert found.seconds == []


def test_another_kernel_than_the_forced_one_is_not_measured_as_if_it_were():
    with pytest.raises(Unsupported, match="attention flash: forced, but 4 calls of math ran"):
        attention.verify({"math": 4}, "flash")
    with pytest.raises(Unsupported, match=r"forced, but no attention kernel at all ran after torch\.compile"):
        attention.verify({}, "flash", compiled=True)
    attention.verify({}, "math", compiled=True)  # compiled, math is a few products without a name
    attention.verify({"flash": 3, "math": 1}, "auto")


def test_logits_that_are_not_finite_are_said(instant):
    pair = throughput.build(make(), "cpu")
    pair.base.head.bias.fill_(float("inf"))
    found = outcome(pair.base, images(pair))
    assert found.unsupported == "VisionTransformer gives non-finite logits in fp32; use another precision"


def test_one_case_that_cannot_run_does_not_stop_the_others(instant):
    pair = throughput.build(make(), "cpu")
    cases = [Case(name=kernel, model=pair.base, images=images(pair), attention=kernel) for kernel in ("cudnn", "flash")]
    missing, found = contest.contest(cases, rounds=3, warmup=1, device="cpu")
    assert missing.unsupported
    assert missing.seconds == []
    assert len(found.seconds) == 3


def test_compiled_models_are_what_is_timed(instant, monkeypatch):
    compiled = []

    def fake(model, **options):
        compiled.append((model, options))
        return model

    monkeypatch.setattr(torch, "compile", fake)
    pair = throughput.build(make(), "cpu")
    outcome(pair.pruned, images(pair, 1), compile=True)
    assert compiled == [(pair.pruned, {"fullgraph": True, "dynamic": False})]


def test_what_the_compiler_refuses_is_said(instant, monkeypatch):
    from torch._dynamo.exc import Unsupported as Refused

    def refuse(model, **options):
        def forward(images):
            raise Refused("cannot trace this\nand more")

        return forward

    monkeypatch.setattr(torch, "compile", refuse)
    pair = throughput.build(make(), "cpu")
    assert outcome(pair.base, images(pair), compile=True).unsupported == "torch.compile: cannot trace this"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"])
def test_record_on_cuda(precision):
    record = throughput.measure(make(precision=precision), "cuda")
    assert record["metrics"]["working_memory_mb"] > 0
    assert record["provenance"]["attention"]["base"].keys() <= {"flash", "efficient", "cudnn", "math"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["math", "flash", "efficient", "cudnn"])
def test_forced_kernel_on_cuda(kernel):
    record = throughput.measure(make(precision="fp16", attention=kernel), "cuda")
    assert record["provenance"]["attention"]["pruned"] == {kernel: 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_out_of_memory_on_cuda_halves_the_batch():
    free, _ = torch.cuda.mem_get_info()
    batch = 2 ** int(np.log2(free / (3 * 64 * 64 * 4)))  # its images alone take half of the memory or more
    record = throughput.measure(make(batch_size=2 * batch), "cuda")
    assert record["metrics"]["batch_size"] < 2 * batch


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
    rounds = ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert told == ["build", "warm up base", "warm up pruned", *rounds, "matrix product"]
    flops = 2e9 * metrics["gmacs"] * metrics["images_per_s"]
    assert metrics["mfu"] == pytest.approx(flops / (1e9 * metrics["matmul_gflops"]))


@pytest.mark.model
def test_a_batch_that_did_not_fit_is_in_the_record(instant, monkeypatch, tmp_path, capsys):
    attempt = throughput._attempt

    def hungry(*arguments):
        if arguments[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attempt(*arguments)

    monkeypatch.setattr(throughput, "_attempt", hungry)
    spec = make(batch_size=8).model_dump_json()
    assert main(["bench", "--device", "cpu", "--spec", spec, "--out", str(tmp_path)]) == 0
    assert read_record(tmp_path)["metrics"]["batch_size"] == 2
    assert "batch 2 (out of memory with 8)" in capsys.readouterr().out


def test_new_settings_leave_the_names_of_old_measurements_alone():
    old = {"model": {"name": "m"}, "prune": {}, "image_size": 224, "batch_size": 4, "precision": "fp32"}
    assert BenchSpec.model_validate(old).digest() == "69e167ff05"
    assert BenchSpec.model_validate(old | {"attention": "math"}).digest() != "69e167ff05"


@pytest.mark.model
def test_unpruned_against_itself_has_bound_one(instant):
    record = throughput.measure(make(prune={"reducer": "none"}))
    assert record["metrics"]["bound"] == 1
    assert record["metrics"]["weights_mb"] == record["metrics"]["base_weights_mb"]


# Command -------------------------------------------------------------------------------------------------------------


@pytest.mark.model
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
    assert record["provenance"]["cpu"]
    assert main(["bench", "--device", "cpu", "--spec", text]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a model with --model"),
        (["--model", "vit_tiny_patch16_224", "--spec", "{}"], "--spec and --model: the spec says it all"),
        (["--model", "m", "--rate", "4", "--schedule", "{}"], "give one of them"),
        (["--model", "m", "--reducer", "none", "--rate", "4"], "--reducer none prunes nothing"),
        (["--model", "m", "--rounds", "2"], "spec.rounds = 2: must be >= 3"),
        (["--model", "m", "--batch-size", "0"], "spec.batch_size = 0: must be >= 1"),
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
