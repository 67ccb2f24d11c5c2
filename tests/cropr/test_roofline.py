"""The roofline: arithmetic by hand, the rows of the paper, and what must follow from the data sheets."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cropr.bench import roofline
from cropr.bench.flops import macs
from cropr.bench.models import hosted
from cropr.bench.roofline import PAPER, Device, Row, Work, predict, read_devices, works
from cropr.pruning.schedule import Schedule
from cropr.specs import ModelSpec, PruneSpec

PUBLISHED = Path(__file__).parents[2] / "config" / "published"
TINY = ModelSpec(name="vit_tiny_patch16_224", args={"depth": 4, "embed_dim": 48, "num_heads": 3})
ROW = Row("tiny", TINY, 64, Schedule.constant(3), "llf")
ARITHMETIC, MEMORY = Device(1e9, 1e30), Device(1e30, 1e9)
"""Devices that are short of one thing only."""


def lines(name: str) -> list[dict[str, str]]:
    text = (PUBLISHED / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in text if not line.startswith("#")))


def test_an_operation_takes_the_longer_of_the_two():
    device = Device(flops=100.0, bandwidth=10.0)
    assert Work(50, 0).seconds(device, efficiency=0.5) == pytest.approx(1.0)
    assert Work(50, 80).seconds(device, efficiency=0.5) == pytest.approx(80 / (10 * roofline.STREAM))
    assert Work(500, 8).seconds(device, efficiency=1.0) == pytest.approx(5.0)


def test_arithmetic_is_that_of_the_flop_count():
    """Where only arithmetic takes time, the speed-up is the bound (scoring and the head apart)."""
    backbone = hosted(TINY, PruneSpec(), 64).backbone
    counted = macs(hosted(TINY, PruneSpec(), 64))
    total = sum(work.flops for work in works(backbone, Schedule.constant(0), "llf", batch_size=2, size=2))
    assert total == 2 * 2 * (counted.total - counted.head)
    found = predict(ROW, {"device": ARITHMETIC})["device"]
    assert found["speedup"] == pytest.approx(found["bound"], rel=0.05)
    assert found["low"] == pytest.approx(found["high"])


def test_traffic_of_a_linear_layer():
    """4 rows of 3 numbers in, 5 out, 15 weights, 2 bytes each."""
    assert roofline._linear(3, 5, rows=4, size=2) == Work(2 * 4 * 15, 2 * (4 * 8 + 15))


def test_pruning_saves_traffic_too():
    found = predict(ROW, {"device": MEMORY})["device"]
    assert 1 < found["speedup"] < found["bound"]  # weights are read whatever the number of tokens
    more = Row("tiny", TINY, 64, Schedule.constant(5), "llf")
    assert predict(more, {"device": MEMORY})["device"]["speedup"] > found["speedup"]


def test_data_sheets_are_read():
    devices = read_devices(PUBLISHED / "devices.csv")
    assert set(devices) == {"a100", "h100"}
    assert devices["a100"] == Device(312e12, 2039e9)
    assert read_devices(PUBLISHED / "devices.csv", "fp32")["h100"].flops == 67e12
    with pytest.raises(ValueError, match="a100 has no tflops_fp8"):
        read_devices(PUBLISHED / "devices.csv", "fp8")
    with pytest.raises(FileNotFoundError):
        read_devices(PUBLISHED / "nothing.csv")


@pytest.mark.parametrize("name", ["devices.csv", "gpu_speed.csv"])
def test_published_numbers_have_a_source(name):
    for line in lines(name):
        assert float(line["value"]) > 0
        assert line["source"]
        assert line["confidence"] in ({"D"} if name == "devices.csv" else {"T", "L", "R", "I"})


def test_every_published_speed_up_has_a_row():
    assert [line["row"] for line in lines("gpu_speed.csv")] == list(PAPER)


@pytest.mark.model
@pytest.mark.parametrize("name", ["vit_l_r8_llf", "eva_l_448_early"])
def test_rows_of_the_paper(name):
    found = predict(PAPER[name], read_devices(PUBLISHED / "devices.csv"))
    for prediction in found.values():
        assert 1 < prediction["low"] <= prediction["speedup"] <= prediction["high"]
        assert prediction["speedup"] == pytest.approx(prediction["bound"], rel=0.1)
    assert found["h100"]["images_per_s"] > found["a100"]["images_per_s"]
