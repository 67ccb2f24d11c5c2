"""The clock, the order of rounds, statistics, memory, devices. No test depends on how long anything takes."""

import pytest
import torch

from cropr.bench import device, models, timing
from cropr.bench.device import Unsupported, check, largest_batch, mixed


class FakeTime:
    """A clock that only a forward pass moves."""

    def __init__(self, monkeypatch, step):
        self.now, self.step, self.passes = 0.0, step, 0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def forward(self):
        self.passes += 1
        self.now += self.step


def test_rounds_run_in_random_order_each_second_one_backwards_and_neighbours_of_a_turn_together():
    order = []
    seconds = {name: float(number) for number, name in enumerate("abcd")}
    clocks = {name: lambda name=name: order.append(name) or seconds[name] for name in seconds}
    found = timing.interleave(clocks, 40, turn=lambda name: name in "bc")
    assert found == {name: [value] * 40 for name, value in seconds.items()}
    rounds = ["".join(order[start : start + 4]) for start in range(0, 160, 4)]
    assert all(first == second[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert {name[0] for name in rounds} == set("abcd")
    assert all("bc" in name or "cb" in name for name in rounds)


def test_mixed_precision_casts_products_only():
    weight = torch.ones(2, 2)
    for precision, dtype in (("amp_bf16", torch.bfloat16), ("bf16", torch.float32)):
        with mixed(precision, "cpu"):
            assert (weight @ weight).dtype == dtype


@pytest.mark.parametrize(
    ("step", "first", "warmup", "ran", "repeats"),
    [
        (0.03, 0.5, 1, 1, 4),  # fast: one pass more, 4 of 0.03 s make 0.1 s
        (0.03, 0.5, 3, 2, 4),
        (2.0, 3.0, 1, 0, 1),  # slow: the pass that ran already is the whole warm-up
        (2.0, 3.0, 3, 2, 1),
    ],
)
def test_warm_up_makes_a_round_long_enough(monkeypatch, step, first, warmup, ran, repeats):
    fake = FakeTime(monkeypatch, step)
    clock = timing.warm_up(fake.forward, warmup, "cpu", first)
    assert fake.passes == ran
    assert clock() == pytest.approx(step)
    assert fake.passes == ran + repeats


def test_speed_up_is_the_median_of_paired_ratios():
    # Ratios 2, 2 and 1.5 have the median 2; the ratio of the medians, 4 s over 1.5 s, would be 2.67.
    found = timing.against([2.0, 4.0, 6.0], [1.0, 2.0, 4.0], mac_ratio=2.5)
    assert found["speedup"] == pytest.approx(2)
    assert found["speedup_over_mac_ratio"] == pytest.approx(0.8)
    assert 1.5 <= found["speedup_low"] <= 2 <= found["speedup_high"] <= 2
    alone = timing.speed([2.0, 4.0, 6.0], batch_size=8)
    assert alone["images_per_s"] == pytest.approx(2)
    assert alone["images_per_s_iqr"] == pytest.approx((4 + 2) / 2 - (2 + 8 / 6) / 2)


def test_utilisation_and_peak_by_hand(monkeypatch):
    # 5 GMAC an image are 10 GFLOP; 2 images a second are 20 GFLOP/s, a fifth of 100.
    found = models.model_metrics(torch.nn.Linear(1, 1), timing.Outcome(seconds=[0.5] * 3), 1, macs=5e9, peak=100e9)
    assert found["mfu"] == pytest.approx(0.2)
    readings = iter([9.0, 0.5, 0.25, 0.5])  # the first is the warm-up
    monkeypatch.setattr(models, "clock", lambda *_: next(readings))
    monkeypatch.setattr(models, "SECONDS", 0)
    assert models._rate(8, torch.float32, "cpu", 1) == pytest.approx(2 * 8**3 / 0.25)


def test_working_memory_counts_what_the_work_takes_and_gives_back(monkeypatch, tmp_path):
    def work(megabytes):
        return float(torch.ones(megabytes * 250_000).sum())

    work(1)
    (_, small), (_, large) = (device.working_memory(lambda size=size: work(size), "cpu") for size in (8, 80))
    monkeypatch.setattr(device, "_PROC", tmp_path / "absent")  # unknown where nobody counts
    assert device.working_memory(lambda: 7, "cpu") == (7, None)
    if small is None:
        pytest.skip("this system keeps no count that can be reset")
    assert large - small == pytest.approx(72, rel=0.2)


def test_a_batch_is_halved_until_it_fits():
    tried = []

    def hungry(batch_size, limit=3):
        tried.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")
        return f"{batch_size} images"

    assert largest_batch(16, hungry) == (2, "2 images")
    assert tried == [16, 8, 4, 2]
    with pytest.raises(Unsupported, match=r"out of memory with a single image: CUDA out of memory. .* 2 GiB$"):
        largest_batch(4, lambda batch_size: hungry(batch_size, limit=0))
    with pytest.raises(ZeroDivisionError):
        largest_batch(4, lambda batch_size: 1 // 0)


def test_refuses_precisions_and_devices_that_are_missing_or_have_no_clock(monkeypatch):
    for precision in ("fp16", "bf16", "amp_bf16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision[-4:]}_supported", lambda: False)
        with pytest.raises(Unsupported, match=f"precision {precision}: this CPU has no fast .*; use fp32"):
            check(precision, "cpu")
    with pytest.raises(ValueError, match=r"device xpu: measured are cpu, cuda, mps"):
        check("fp32", "xpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda:0: torch sees no CUDA device; use cpu"):
            check("fp32", "cuda:0")
