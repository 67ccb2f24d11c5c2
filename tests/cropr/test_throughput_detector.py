"""Throughput of a detector: its encoder, and what follows it. No test depends on how long anything takes."""

import pytest
import torch

from cropr.bench import heads, models, peak, throughput, timing
from cropr.bench.detection_flops import detector_macs
from cropr.bench.specs import BenchSpec
from cropr.specs import PruneSpec
from cropr.tasks.detection.model import Detector, build_detector

DETECTOR = {
    "model": {"name": "eva02_tiny_patch14_224", "args": {"patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}},
    "prune": {"reducer": "cropr", "schedule": {"squares": {"at": {1: 6, 2: 4}}}, "fusion": "llf"},
    "detector": {
        "window": 2,
        "global_blocks": (2, 4),
        "channels": 16,
        "stages": (0.5, 0.6),
        "box_convs": 1,
        "box_width": 32,
        "mask_convs": 1,
        "proposals_test": (50, 20),
        "max_detections": 5,
    },
}


def make(**changes):
    return BenchSpec.model_validate({**DETECTOR, "image_size": 64, "batch_size": 2, "rounds": 3, **changes})


@pytest.fixture
def instant(monkeypatch):
    """One forward pass a round will do, and no large matrix product."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0)
    monkeypatch.setattr(peak, "SIZES", {"cpu": (16,), "cuda": (16,)})
    monkeypatch.setattr(peak, "SECONDS", 0)


def images(pair):
    return models.random_images(2, pair.sizes[0], "cpu", torch.float32, channels_last=False)


def test_a_detectors_encoder_stands_against_itself_without_pruning():
    """Both are encoders with windows around the same host; without pruning the two are one."""
    spec = make()
    pair = throughput.build(spec, "cpu")
    assert pair.base.model.backbone is pair.pruned.model.backbone
    whole = build_detector(spec.model, PruneSpec(), spec.detector, 3, 64).eval()
    whole.backbone.load_state_dict(pair.base.model.backbone.state_dict())
    with torch.inference_mode():
        mapped = pair.base(images(pair))
        torch.testing.assert_close(mapped, whole.encode(images(pair)).logits, rtol=0, atol=1e-6)
        assert mapped.shape == (2, 48, 8, 8)
        assert pair.pruned(images(pair)).shape == mapped.shape


@pytest.mark.model
def test_a_detectors_encoder_is_priced_with_its_windows(instant):
    spec = make()
    metrics = throughput.measure(spec, "cpu")["metrics"]
    for prefix, prune in (("base_", PruneSpec()), ("", spec.prune)):
        counted = detector_macs(build_detector(spec.model, prune, spec.detector, 3, 64)).encoder
        assert metrics[f"{prefix}gmacs"] == pytest.approx(counted.total / 1e9)
        assert metrics[f"{prefix}gmacs_linear"] == pytest.approx(counted.linear / 1e9)
    assert metrics["base_tokens"] == 64


def test_heads_are_those_of_the_detector():
    """With its weights they find what the detector finds, every box being a candidate."""
    spec = make()
    part = throughput.build(spec, "cpu").rest.model
    candidates = spec.detector.model_copy(update={"min_score": 0.0})
    whole = build_detector(spec.model, spec.prune, candidates, heads.NUM_CLASSES, 64).eval()
    missing = whole.load_state_dict(part.state_dict(), strict=False).missing_keys
    assert not [name for name in missing if name.startswith(Detector.inherits)]
    noise = models.random_images(2, 64, "cpu", torch.float32, channels_last=False)
    with torch.inference_mode():
        found = torch.cat([image.scores for image in whole.detect(noise)])
        assert len(found) == 2 * spec.detector.max_detections
        torch.testing.assert_close(part(whole.encode(noise).logits), found)


@pytest.mark.model
def test_a_whole_detector_takes_its_encoder_and_its_heads(instant):
    spec = make(precision="bf16")
    record = throughput.measure(spec, "cpu")
    metrics, series = record["metrics"], record["series"]
    rounds = zip(series["base_seconds"], series["seconds"], series["heads_seconds"], strict=True)
    ratios = [(base + rest) / (pruned + rest) for base, pruned, rest in rounds]
    assert metrics["speedup_whole"] == pytest.approx(sorted(ratios)[1])
    assert metrics["speedup_whole_low"] <= metrics["speedup_whole"] <= metrics["speedup_whole_high"]
    dense, pruned = (
        detector_macs(build_detector(spec.model, prune, spec.detector, heads.NUM_CLASSES, 64)).total
        for prune in (PruneSpec(), spec.prune)
    )
    assert metrics["bound_whole"] == pytest.approx(dense / pruned)
    assert metrics["images_per_s_whole"] < metrics["images_per_s"]
    assert record["provenance"]["heads_precision"] == "amp_bf16"


@pytest.mark.model
def test_an_encoder_is_measured_where_heads_cannot_run(instant, monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("no roi_align here")

    monkeypatch.setattr(heads.Heads, "forward", refuse)
    record = throughput.measure(make(), "cpu")
    assert record["metrics"]["speedup"] > 0
    assert "speedup_whole" not in record["metrics"]
    assert record["provenance"]["heads_unsupported"].endswith("no roi_align here")
    with pytest.raises(ValueError, match="a detector's encoders are compared on one image size"):
        make(pruned_image_size=32)
