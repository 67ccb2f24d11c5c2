"""Schedules against traces written out by hand (paper, section 4.1; reference counts of the authors' code)."""

from types import SimpleNamespace

import pytest

from cropr.pruning.schedule import Schedule, attended, trace

VIT_L = {"num_patches": 196, "depth": 24, "prefix": 1}
EVA_L = {"num_patches": 1024, "depth": 24, "prefix": 1}


def test_traces_of_the_paper():
    counts = Schedule.constant(8).resolve(**VIT_L, fusion=True)
    steps = [197, 188, 180, 172, 164, 156, 148, 140, 132, 124, 116, 108, 100, 92, 84, 76, 68, 60, 52, 44, 36, 28, 20]
    assert trace(counts, 196, prefix=1) == (*steps, 20, 197)
    assert attended(counts, 196, fusion=True, prefix=1) == (*steps, 197)
    counts = Schedule.constant(8).resolve(**VIT_L)  # without fusion, it prunes after one more block
    assert trace(counts, 196, prefix=1)[-3:] == (20, 12, 12)
    assert attended(counts, 196, fusion=False, prefix=1)[-2:] == (20, 12)
    steps = trace(Schedule.constant(40).resolve(**EVA_L, fusion=True), 1024, prefix=1)
    assert steps[1:23] == tuple(range(984, 143, -40))
    assert all(count % 8 == 0 for count in steps[1:24])
    assert steps[-1] == 1025
    counts = Schedule.squares({4: 80, 7: 64, 10: 48, 13: 32, 19: 16}).resolve(num_patches=9216, depth=24, fusion=True)
    assert sorted(set(counts), reverse=True) == [9216, 6400, 4096, 2304, 1024, 256]
    assert Schedule.constant(0).resolve(**VIT_L) == (196,) * 24  # not even the extra token
    assert Schedule.constant(0).sites(24) == ()


CONFIGS = [
    ({"constant": {"rate": 8}}, Schedule.constant(8)),
    ({"constant": {"rate": 8, "first_extra": 0, "align": 8}}, Schedule.constant(8, 0, 8)),
    ({"stages": {"at": {"6": 50, 12: 50}}}, Schedule.stages({6: 50, 12: 50})),
    ({"fraction": {"at": {3: 0.8}}}, Schedule.fraction({3: 0.8})),
    ({"kept": {"at": {3: 20}}}, Schedule.kept({3: 20})),
    ({"squares": {"at": {3: 4}}}, Schedule.kept({3: 16})),
]


def test_config_round_trip_and_alignment_rounds_up():
    for config, schedule in CONFIGS:
        assert Schedule.from_config(config) == schedule == Schedule.from_config(schedule.to_config())
    plain = Schedule.constant(8).resolve(**VIT_L)
    for align in (8, 16):
        for before, after in zip(plain, Schedule.constant(8, align=align).resolve(**VIT_L), strict=True):
            assert after == 196 or (after + 1) % align == 0
            assert before <= after < before + align


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Schedule.constant(9).resolve(**VIT_L, fusion=True), "prunes 199 of 196.*lower the rate to 8"),
        (lambda: Schedule.constant(-1), "rate=-1"),
        (lambda: Schedule.stages({23: 5}).resolve(**VIT_L, fusion=True), "after block 23.*is 22"),
        (lambda: Schedule.stages({24: 5}).resolve(**VIT_L), "after block 24.*is 23"),
        (lambda: Schedule.stages({6: 196}).resolve(**VIT_L), "would leave 0 of 196"),
        (lambda: Schedule.kept({3: 300}).resolve(**VIT_L), "would leave 300 of 196"),
        (lambda: Schedule.fraction({3: 1.5}), "share 1.5"),
        (lambda: Schedule.stages({0: 5}), "count from 1"),
        (lambda: Schedule.constant(8, align=0), "align=0"),
        (lambda: Schedule.from_config({"steps": {}}), r"exactly one rule of \['constant'"),
        (lambda: Schedule.from_config({"constant": {"r": 8}}), r"unknown \['r'\]; allowed: .*'rate'"),
        (lambda: Schedule.from_config({"constant": {}}), r"\['rate'\] is missing"),
    ],
)
def test_errors_name_value_limit_and_fix(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule.constant(8), "R=8"),
        (Schedule.constant(0), "none"),
        (Schedule.constant(8, 5), "R=8 +5 @ 1"),
        (Schedule.stages({1: 48}), "R=48 @ 1"),
        (Schedule.stages({6: 50, 12: 50, 18: 50}), "R=50 @ 6,12,18"),
        (Schedule.stages({6: 50, 12: 40}), "R=50,40 @ 6,12"),
        (Schedule.stages({1: 10, 2: 9, 3: 9, 6: 9}), "R=10,9,9,9 @ 1-3,6"),
        (Schedule.stages({1: 15, 2: 15}), "R=15 @ 1,2"),
        (Schedule.fraction({3: 0.8}), "80% @ 3"),
        (Schedule.squares({5: 80, 8: 64}), "K=6400,4096 @ 5,8"),
    ],
)
def test_schedules_are_written_as_the_paper_does(schedule, text):
    assert schedule.describe() == text


class Quadratic:
    """Multiply-adds of 12 blocks on 100 tokens: n + n^2 a block. Stands in for ``cropr.pruning.flops.Cost``."""

    def __init__(self, depth: int = 12) -> None:
        self.backbone = SimpleNamespace(num_patches=99, depth=depth, prefix=1)

    def total(self, alive: tuple[int, ...], fused: bool) -> int:
        return sum(n + n * n for n in attended(alive, 99, fused, prefix=1))

    def ratio(self, schedule: Schedule, fused: bool) -> float:
        depth = self.backbone.depth
        return self.total((99,) * depth, fused) / self.total(schedule.resolve(99, depth, fused, 1), fused)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("fusion", ["none", "llf"])
@pytest.mark.parametrize("asked", [1.0, 1.01, 1.5, 2.0, 2.7])
def test_schedule_for_a_speed_up_reaches_it_with_the_smallest_number(asked, fusion, align):
    cost, fused = Quadratic(), fusion == "llf"
    schedule = Schedule.for_speedup(asked, cost, fusion=fusion, align=align)
    assert cost.ratio(schedule, fused) >= asked
    rates = [Schedule.constant(rate, align=align) for rate in range(9 if fusion == "none" else 10)]
    early = [Schedule.fraction({3: round(gone / 99, 6)}, align) for gone in range(99)]
    reaching = [found for found in (*rates, *early) if cost.ratio(found, fused) >= asked]
    assert schedule == reaching[0]
    assert Schedule.from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize(
    ("asked", "cost", "fusion", "says"),
    [
        (50, Quadratic(), "none", r"speed-up 50 is out of reach: multiply-adds shrink \d+\.\d+ times at most"),
        (2, Quadratic(depth=1), "none", "out of reach: multiply-adds shrink 1"),
        (0.5, Quadratic(), "none", r"speed-up 0.5 must be 1 or more"),
        (2, Quadratic(), "glue", "unknown fusion"),
        (2, Quadratic(), "cross", "fusion 'cross' computes by itself"),
    ],
)
def test_speed_up_out_of_reach_names_the_limit(asked, cost, fusion, says):
    with pytest.raises(ValueError, match=says):
        Schedule.for_speedup(asked, cost, fusion=fusion)


def test_schedule_for_a_speed_up_of_a_timm_model():
    import timm

    import cropr
    from cropr.pruning.flops import macs

    host = timm.create_model("eva02_tiny_patch14_224", depth=5, embed_dim=48, num_heads=3, num_classes=10)
    schedule = cropr.Schedule.for_speedup(1.4, host, fusion="llf")
    pruned = cropr.prune(host, schedule, fusion="llf").deploy()
    assert 1.4 <= macs(host).total / macs(pruned).total < 1.5
