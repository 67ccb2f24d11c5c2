"""MACs of the paper's detector by formula, against the published numbers, and of a tiny one against torch's counter."""

from __future__ import annotations

import pytest
import torch
from tiny_detector import PRUNED, detector, images
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cropr.bench.detection_flops import DetectorMacs, detector_macs
from cropr.bench.flops import BlockDims, block_macs, macs
from cropr.pruning.schedule import Schedule
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.model import Detector, build_detector

SQUARES = {"squares": {"at": {5: 80, 8: 64, 11: 48, 14: 32, 20: 16}}}
"""Sides of the grids that survivors would fill, after blocks 5, 8, ... (from 1)."""


def _paper(spec: PruneSpec) -> Detector:
    """EVA-02-L at 1536 px; no weights, no forward pass."""
    eva = ModelSpec(name="eva02_large_patch14_224", args={"patch_size": 16})
    with torch.device("meta"):
        return build_detector(eva, spec, DetModelSpec(), 80, 1536)


@pytest.fixture(scope="module")
def unpruned() -> Detector:
    return _paper(PruneSpec())


@pytest.fixture(scope="module")
def dense(unpruned) -> DetectorMacs:
    return detector_macs(unpruned)


@pytest.fixture(scope="module")
def cropr() -> DetectorMacs:
    return detector_macs(_paper(PruneSpec(reducer="cropr", schedule=SQUARES, fusion="llf")))


def test_the_schedule_by_hand():
    counts = Schedule.from_config(SQUARES).resolve(96 * 96, 24, fusion=True)
    assert counts == (9216,) * 4 + (6400,) * 3 + (4096,) * 3 + (2304,) * 3 + (1024,) * 6 + (256,) * 4 + (9216,)
    assert Schedule.squares({5: 80}).to_config() == Schedule.from_config({"kept": {"at": {5: 6400}}}).to_config()


def test_published_numbers_of_the_linear_counter(dense, cropr):
    assert dense.encoder.linear / 1e9 == pytest.approx(2789.9, abs=0.1)
    assert cropr.encoder.linear / 1e9 == pytest.approx(1273.0, abs=0.1)


def test_ratios_of_all_macs(dense, cropr):
    assert dense.encoder.total / 1e9 == pytest.approx(4258.8, abs=0.1)
    assert cropr.encoder.total / 1e9 == pytest.approx(1789.6, abs=0.1)
    assert dense.encoder.total / cropr.encoder.total == pytest.approx(2.38, abs=0.02)
    assert dense.total / cropr.total == pytest.approx(1.93, abs=0.02)
    assert [round(model.total / 1e9) for model in (dense, cropr)] == [5121, 2652]  # as docs/detection.md has them


def test_heads_by_hand(dense, cropr):
    """Written out from the sizes of the layers, in G; the same with and without pruning."""
    grid, d, c = 96 * 96, 1024, 256
    places = [16 * grid, 4 * grid, grid, grid // 4, grid // 16]
    neck = grid * 4 * (d * d // 2 + 4 * d // 2 * d // 4) + grid * 4 * d * d // 2
    neck += sum(n * (width * c + 9 * c * c) for n, width in zip(places, (c, d // 2, d, d), strict=False))
    assert dense.heads.neck == neck
    assert dense.heads.proposals == sum(places) * (2 * 9 * c * c + c * 15)
    assert dense.heads.boxes == 1000 * 3 * (49 * 4 * 9 * c * c + 49 * c * 1024 + 1024 * (81 + 4))
    assert dense.heads.masks == 100 * (196 * 4 * 9 * c * c + 196 * 4 * c * c + 784 * c * 80)
    parts = dense.heads.neck, dense.heads.proposals, dense.heads.boxes, dense.heads.masks
    assert [round(part / 1e9, 1) for part in parts] == [191.0, 232.5, 385.6, 53.0]
    assert cropr.heads == dense.heads
    assert sum(parts) == dense.heads.total == dense.total - dense.encoder.total


def test_windows_of_32_cost_more(unpruned, monkeypatch):
    monkeypatch.setattr(unpruned.backbone, "window", 32)
    assert detector_macs(unpruned).encoder.total / 1e9 == pytest.approx(4490.7, abs=0.1)


def test_keys_price_the_products_of_attention_alone():
    dims = BlockDims.standard(8)
    assert block_macs(64, dims) == block_macs(64, dims, 64)
    assert block_macs(64, dims) - block_macs(64, dims, 16) == 2 * 64 * (64 - 16) * 8


@pytest.mark.parametrize("host", ["vit", "eva"])
@pytest.mark.parametrize("prune", [{"reducer": "none"}, PRUNED])
def test_a_tiny_encoder_against_torchs_counter(host, prune):
    model = detector(host, prune).eval().deploy()
    x = torch.stack(images([(64, 64)]))
    # torch's counter knows neither fused attention on CPU, so the math kernel is made to run, nor matrix times vector.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.encode(x)
    priced = macs(model)
    assert counter.get_total_flops() / 2 == priced.total - priced.scoring
