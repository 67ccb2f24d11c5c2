"""Rows of throughput tables, and plans: models, kernels, records. No test depends on how long anything takes."""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from instant import MODEL, RATE, VARIANTS, instant, on_cuda  # noqa: F401

from cropr.__main__ import main
from cropr.bench import device, heads, models, plan, throughput, timing
from cropr.bench.device import Unsupported, noise
from cropr.bench.models import build_on_meta
from cropr.bench.specs import BenchSpec, PlanSpec
from cropr.bench.timing import Case, time_interleaved
from cropr.pruning import flops
from cropr.pruning.flops import Cost
from cropr.pruning.schedule import Schedule
from cropr.records import read_record
from cropr.specs import PruneSpec
from cropr.tasks.detection.model import Detector, build_detector

EVA = {"name": "eva02_tiny_patch14_224", "args": {"depth": 3, "embed_dim": 48, "num_heads": 3}}
DETECTOR = {
    "model": {"name": "eva02_tiny_patch14_224", "args": {"patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}},
    "prune": {"reducer": "cropr", "schedule": {"squares": {"at": {1: 6, 2: 4}}}, "fusion": "llf"},
    "detector": {
        "window": 2, "global_blocks": (2, 4), "channels": 16, "stages": (0.5, 0.6), "box_convs": 1, "box_width": 32,
        "mask_convs": 1, "proposals_test": (50, 20), "max_detections": 5,
    },
}  # fmt: skip


def make(**changes):
    values = {"model": MODEL, "prune": VARIANTS["cropr_llf"], "image_size": 64, "batch_size": 2, "rounds": 3, **changes}
    return BenchSpec.model_validate(values)


def build(**changes):
    """The models by name."""
    cases = throughput.build(make(**changes), "cpu")
    return SimpleNamespace(**{name: case.model for name, case in cases.items()})


def images(size=64):
    return noise(2, (3, size, size), "cpu", "fp32")


@pytest.mark.parametrize("model", [MODEL, EVA])
def test_base_is_the_timm_model_with_weights_like_timms(model):
    """The host that was built without memory computes what timm's own construction computes with these weights."""
    size = 56 if model is EVA else 64
    pair = build(model=model, image_size=size)
    assert pair.base is pair.pruned.model.backbone.host
    expected = timm.create_model(model["name"], num_classes=1000, img_size=size, **model["args"]).eval()
    expected.load_state_dict(pair.base.state_dict())
    with torch.inference_mode():
        logits, found = pair.base(images(size)), pair.pruned.detailed(images(size))
        torch.testing.assert_close(logits, expected(images(size)), rtol=0, atol=1e-6)
    assert logits.std() > 1e-3
    assert found.logits.isfinite().all()
    assert not torch.equal(*found.kept[1]), "scores differ by image"
    block = pair.base.blocks[0]
    assert (block.norm1.weight == 1).all()
    if model is MODEL:
        assert block.mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
        assert (block.mlp.fc1.bias == 0).all()
    assert not any(t.is_meta or t.requires_grad for t in pair.pruned.state_dict(keep_vars=True).values())


def test_variants_share_one_host_and_a_second_image_size_makes_a_second():
    spec = make()
    built = models.build_variants(spec.model, {"a": spec.prune, "b": spec.prune}, 64, "cpu", torch.float32)
    assert list(built) == ["unpruned", "a", "b"]
    assert all(built[name].model.backbone.host is built["unpruned"] for name in "ab")
    assert built["a"].model.reducers["1"] is not built["b"].model.reducers["1"]
    assert models.token_trace(built["unpruned"]) == [17] * 5
    # Deployed weights are one vector a module larger.
    assert models.weights_mb(built["a"]) - models.weights_mb(built["unpruned"]) == pytest.approx(2 * 48 * 4 / 1e6)
    pair = build(prune={"reducer": "none"}, image_size=96, pruned_image_size=64)
    assert pair.base is not pair.pruned.model.backbone.host
    assert pair.pruned.model.token_trace == (17,) * 5
    torch.testing.assert_close(pair.base.head.weight, pair.pruned.model.backbone.host.head.weight)


def test_storage_follows_precision_and_layout():
    for precision, dtype in (("bf16", torch.bfloat16), ("amp_bf16", torch.float32)):
        assert {p.dtype for p in build(precision=precision).pruned.parameters()} == {dtype}
    base, given = build(channels_last=True).base, noise(2, (3, 64, 64), "cpu", "fp32", channels_last=True)
    for laid_out in (base.patch_embed.proj.weight, given):
        assert laid_out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(base(given), base(images()), rtol=0, atol=1e-5)


def outcome(model, **changes):
    case = Case(name="model", model=model, shape=(3, 64, 64), **changes)
    return time_interleaved([case], 2, rounds=3, warmup=1, device="cpu")[1][0]


@pytest.mark.parametrize("kernel", ["math", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp_bf16"])
def test_a_forced_kernel_really_runs(kernel, precision):
    pair = build(precision=precision)
    found = outcome(pair.pruned, attention=kernel, precision=precision)
    assert (found.unsupported, found.kernels, len(found.seconds)) == (None, {kernel: 4}, 3)


def test_one_case_that_cannot_run_does_not_stop_the_others():
    base = build().base
    cases = [Case(name=name, model=base, shape=(3, 64, 64), attention=name) for name in ("cudnn", "flash")]
    fitted, (missing, found) = time_interleaved(cases, 2, rounds=3, warmup=1, device="cpu")
    assert missing.unsupported.startswith("attention cudnn: torch has no such kernel here")
    assert (fitted, missing.seconds, len(found.seconds)) == (2, [], 3)
    base.head.bias.fill_(float("inf"))
    assert "non-finite logits in fp32" in outcome(base).unsupported


def test_another_kernel_than_the_forced_one_is_not_measured_as_if_it_were(monkeypatch):
    def ran(calls, attention, compiled=False):
        events = [SimpleNamespace(name=f"aten::_scaled_dot_product_{kernel}_for_cpu") for kernel in calls]
        monkeypatch.setattr(device, "quiet_profile", lambda: nullcontext(SimpleNamespace(function_events=events)))
        return device.run_forced(lambda: None, attention, compiled)[1]

    with pytest.raises(Unsupported, match="attention flash: forced, but 4 calls of math ran"):
        ran(["math"] * 4, "flash")
    with pytest.raises(Unsupported, match=r"forced, but no attention kernel at all ran after torch\.compile"):
        ran([], "flash", compiled=True)
    assert ran([], "math", compiled=True) == {}  # compiled, math is a few products without a name
    assert ran(["flash", "flash", "math"], "auto") == {"flash": 2, "math": 1}


def test_compiled_models_are_timed_and_refusals_of_the_compiler_are_reasons(monkeypatch):
    from torch._dynamo.exc import Unsupported as Refused

    pair, compiler = build(), Mock(side_effect=lambda model, **options: model)
    monkeypatch.setattr(torch, "compile", compiler)
    outcome(pair.pruned, compile=True)
    compiler.assert_called_once_with(pair.pruned, fullgraph=True, dynamic=False)
    compiler.side_effect = lambda model, **_: Mock(side_effect=Refused("cannot trace this\nand more"))
    assert outcome(pair.base, compile=True).unsupported == "torch.compile: cannot trace this"


class TestOnCuda:
    pytestmark = on_cuda

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"])
    def test_record(self, precision):
        record = throughput.measure(make(precision=precision), "cuda")
        assert record["metrics"]["working_memory_mb"] > 0
        assert record["provenance"]["attention"]["base"].keys() <= {"flash", "efficient", "cudnn", "math"}

    @pytest.mark.parametrize("kernel", ["math", "flash", "efficient", "cudnn"])
    def test_forced_kernel(self, kernel):
        record = throughput.measure(make(precision="fp16", attention=kernel), "cuda")
        assert record["provenance"]["attention"]["pruned"] == {kernel: 4}

    def test_out_of_memory_halves_the_batch(self):
        free, _ = torch.cuda.mem_get_info()
        batch = 2 ** int(np.log2(free / (3 * 64 * 64 * 4)))  # its images alone take half of the memory or more
        assert throughput.measure(make(batch_size=2 * batch), "cuda")["metrics"]["batch_size"] < 2 * batch


def test_record():
    told = []
    spec = make()
    record = throughput.measure(spec, "cpu", told.append)
    json.dumps(record, allow_nan=False)
    assert (record["kind"], record["id"]) == ("bench", spec.digest())
    assert BenchSpec.model_validate(record["spec"]) == spec
    assert record["tokens"] == [17, 13, 10, 10, 17]
    metrics, origin = record["metrics"], record["provenance"]
    assert metrics["mac_ratio"] == pytest.approx(metrics["base_gmacs"] / metrics["gmacs"])
    assert metrics["mac_ratio"] > 1
    assert metrics["speedup_low"] <= metrics["speedup"] <= metrics["speedup_high"]
    assert metrics["base_tokens"] == 17
    assert 0 < metrics["base_weights_mb"] < metrics["weights_mb"] < 1.01 * metrics["base_weights_mb"]
    ratio = np.array(record["series"]["base_seconds"]) / record["series"]["seconds"]
    assert metrics["speedup"] == pytest.approx(np.median(ratio))
    assert metrics["speedup_over_mac_ratio"] == pytest.approx(metrics["speedup"] / metrics["mac_ratio"])
    assert len(ratio) == spec.rounds
    assert origin["attention"] == {"base": {"flash": 4}, "pruned": {"flash": 4}}
    assert (origin["precision"], origin["device"]) == ("fp32", "cpu")
    assert told[:3] == ["build", "warm up base", "warm up pruned"]
    flops = 2e9 * metrics["gmacs"] * metrics["images_per_s"]
    assert metrics["mfu"] == pytest.approx(flops / (1e9 * metrics["matmul_gflops"]))
    assert not [name for name in metrics if name.endswith(("_whole", "_linear"))]


def test_heads_and_encoder_are_those_of_the_detector():
    """Without pruning the two encoders are one; with the heads' weights a detector finds the same boxes."""
    spec, pair = make(**DETECTOR), build(**DETECTOR)
    assert pair.base.model.backbone is pair.pruned.model.backbone
    dense = build_detector(spec.model, PruneSpec(), spec.detector, 3, 64).eval()
    dense.backbone.load_state_dict(pair.base.model.backbone.state_dict())
    candidates = spec.detector.model_copy(update={"min_score": 0.0})
    whole = build_detector(spec.model, spec.prune, candidates, heads.NUM_CLASSES, 64).eval()
    missing = whole.load_state_dict(pair.heads.state_dict(), strict=False).missing_keys
    assert not [name for name in missing if name.startswith(Detector.inherits)]
    with torch.inference_mode():
        mapped = pair.base(images())
        torch.testing.assert_close(mapped, dense(images()).encoded.logits, rtol=0, atol=1e-6)
        assert pair.pruned(images()).shape == mapped.shape == (2, 48, 8, 8)
        found = torch.cat([image.scores for image in whole.detect(images())])
        assert len(found) == 2 * spec.detector.max_detections
        torch.testing.assert_close(pair.heads(whole(images()).encoded.logits), found)


@pytest.mark.model
def test_a_whole_detector_takes_its_encoder_and_its_heads():
    spec = make(**DETECTOR, precision="bf16")
    record = throughput.measure(spec, "cpu")
    metrics, series = record["metrics"], record["series"]
    rounds = zip(series["base_seconds"], series["seconds"], series["heads_seconds"], strict=True)
    assert metrics["speedup_whole"] == pytest.approx(np.median([(a + c) / (b + c) for a, b, c in rounds]))
    pair = build(**DETECTOR, precision="bf16")
    base, pruned, rest = flops.macs(pair.base), flops.macs(pair.pruned), pair.heads.macs()
    assert metrics["mac_ratio_whole"] == pytest.approx((base.total + rest) / (pruned.total + rest))
    assert metrics["gmacs_linear"] == pytest.approx(pruned.linear / 1e9)
    assert metrics["images_per_s_whole"] < metrics["images_per_s"]
    assert record["provenance"]["heads_precision"] == "amp_bf16"


@pytest.mark.model
def test_an_encoder_is_measured_where_heads_cannot_run(monkeypatch):
    monkeypatch.setattr(heads.Heads, "forward", Mock(side_effect=NotImplementedError("no roi_align here")))
    record = throughput.measure(make(**DETECTOR), "cpu")
    assert record["metrics"]["speedup"] > 0
    assert "speedup_whole" not in record["metrics"]
    assert record["provenance"]["heads_unsupported"].endswith("no roi_align here")
    with pytest.raises(ValueError, match="a detector's encoders are compared on one image size"):
        make(**DETECTOR, pruned_image_size=32)


@pytest.mark.model
def test_command_takes_flags_and_writes_a_record_that_it_reads_again(tmp_path, monkeypatch):
    bench, flags = ["bench", "--device", "cpu"], ["--model", "test_vit", "--image-size", "64", "--rate", "2"]
    flags += ["--fusion", "none", "--batch-size", "2", "--rounds", "3"]
    assert main([*bench, *flags, "--out", str(tmp_path / "a")]) == 0
    assert main([*bench, "--spec", str(tmp_path / "a" / "record.json"), "--out", str(tmp_path / "b")]) == 0
    first, second = read_record(tmp_path / "a"), read_record(tmp_path / "b")
    assert first["id"] == second["id"]
    spec = BenchSpec.model_validate(first["spec"])
    assert (spec.model.name, spec.image_size, spec.prune.fusion, spec.batch_size) == ("test_vit", 64, "none", 2)
    assert spec.prune.schedule["constant"]["rate"] == 2


def test_command_writes_down_why_a_row_cannot_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    text = make(precision="bf16").model_dump_json()
    assert main(["bench", "--device", "cpu", "--spec", text, "--out", str(tmp_path)]) == 0
    record = read_record(tmp_path)
    assert record["metrics"] == {}
    assert "this CPU has no fast bfloat16" in record["unsupported"]
    assert main(["bench", "--device", "cpu", "--spec", text]) == 2


def plan_of(**changes):
    model = {"name": "vit_tiny_patch16_224", "args": {"depth": 12, "embed_dim": 48, "num_heads": 3}}
    values = {"model": model, "prune": {"reducer": "cropr", "fusion": "llf"}, "targets": [1.2, 1.5, 2.0], "rounds": 3}
    return PlanSpec.model_validate(values | changes)


@pytest.fixture(scope="module")
def cost():
    return Cost(build_on_meta(plan_of().model, PruneSpec(), plan_of().image_size).backbone)


@pytest.fixture
def measured_by(monkeypatch, cost):
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
    record = plan.measure(plan_of())
    json.dumps(record, allow_nan=False)
    assert record["kind"] == "plan"
    assert record["metrics"] == {"targets": 3, "reached": 3}
    for cell in record["cells"]:
        assert cell["predicted"] >= cell["target"]
        assert (cell["metrics"], cell["rounds"], cell["reason"]) == ({}, 0, None)
        assert Schedule.from_config(cell["config"]).describe() == cell["schedule"]


@pytest.mark.parametrize("share", [0.85, 1.0, 1.1])
def test_schedules_are_corrected_until_the_device_reaches_the_target(measured_by, share):
    asked = measured_by(lambda ratio: 1 + share * (ratio - 1))
    record = plan.measure(plan_of(verify=True))
    for cell in record["cells"]:
        assert cell["reached"], cell["reason"]
        assert cell["metrics"]["speedup"] == pytest.approx(cell["target"], rel=plan.TOLERANCE)
        assert 1 <= cell["rounds"] <= plan.ATTEMPTS
    assert len(asked) == max(cell["rounds"] for cell in record["cells"])
    assert len(asked[0]) == 3  # all targets take turns with one unpruned model


def test_what_is_not_reached_has_a_reason(measured_by, monkeypatch):
    measured_by(lambda ratio: min(ratio, 1.3))
    easy, hard = plan.measure(plan_of(verify=True, targets=[1.2, 2.0]))["cells"]
    assert (easy["reached"], hard["reached"], hard["reason"] is None) == (True, False, False)
    assert hard["metrics"]["speedup"] == pytest.approx(1.3)
    (cell,) = plan.measure(plan_of(targets=[50]))["cells"]  # beyond all schedules
    assert (cell["reached"], cell["schedule"], cell["config"], cell["predicted"]) == (False, None, None, None)
    assert "out of reach" in cell["reason"]
    monkeypatch.undo()
    outcome = timing.Outcome(unsupported="no memory")
    monkeypatch.setattr(plan, "time_interleaved", lambda *_: (1, [outcome] * 2))
    (cell,) = plan.measure(plan_of(verify=True, targets=[1.5]))["cells"]
    assert (cell["reached"], cell["reason"], cell["metrics"]) == (False, "no memory", {})


def test_refuses_impossible_plans():
    for changes, message in (
        ({"targets": [0.5]}, "greater than or equal to 1"),
        ({"targets": [2, 2]}, "give every value once"),
        ({"prune": {"reducer": "cropr", "schedule": RATE}}, "schedule is the result of a plan"),
        ({"prune": {"reducer": "none"}}, "name a reducer that prunes"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_of(**changes)


@pytest.mark.model
def test_command_measures_and_writes_a_record(tmp_path):
    text = plan_of(model=MODEL, image_size=64, targets=[1.2], batch_size=1).model_dump_json()
    assert main(["plan", "--device", "cpu", "--spec", text, "--verify", "--out", str(tmp_path)]) == 0
    (cell,) = read_record(tmp_path)["cells"]
    assert cell["rounds"] >= 1
    assert cell["metrics"]["speedup_low"] <= cell["metrics"]["speedup"] <= cell["metrics"]["speedup_high"]
    assert cell["reached"] == (cell["reason"] is None)
