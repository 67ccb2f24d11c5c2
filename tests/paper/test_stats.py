"""Intervals against hand-written values, and the rule that one seed decides nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from workflow.paper.stats import Interval, decide, difference_interval, mean_interval, parse_relation, wilson


def claim(relation: str) -> SimpleNamespace:
    return SimpleNamespace(relation=relation)


def test_mean_interval_is_students_t():
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975, 2 degrees) = 4.30265.
    interval = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)
    assert interval.mean == 2.0
    assert interval.low == pytest.approx(2 - half)
    assert interval.high == pytest.approx(2 + half)
    assert interval.n == 3


def test_one_seed_has_no_interval():
    assert mean_interval([89.4]) == Interval(89.4, None, None, 1)
    assert not mean_interval([89.4]).known
    assert mean_interval([89.4]).format() == "89.4"


def test_coverage_of_the_mean_interval():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(5.0, 2.0, 3)) for _ in range(600)]
    covered = np.mean([i.low <= 5.0 <= i.high for i in intervals])
    assert covered == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_mean_interval_refuses(values):
    with pytest.raises(ValueError, match="an interval needs"):
        mean_interval(values)


def test_level_out_of_range():
    with pytest.raises(ValueError, match="level is 95"):
        mean_interval([1.0, 2.0], level=95)


def test_difference_is_paired_by_seed():
    # The seeds differ by ten points, the pairs by one always: paired, the spread vanishes.
    left, right = {0: 80.0, 1: 90.0, 2: 85.0}, {2: 84.0, 1: 89.0, 0: 79.0}
    interval = difference_interval(left, right)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1.0, 1.0, 1.0))
    assert difference_interval([1.0, 2.0], [0.0, 4.0]).mean == -0.5


def test_difference_leaves_out_unpaired_seeds():
    assert difference_interval({0: 1.0, 1: 3.0}, {1: 1.0, 2: 9.0}) == Interval(2.0, None, None, 1)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ({0: 1.0}, {1: 1.0}, "no seed in common"),
        ([1.0], [1.0, 2.0], "differ in length"),
        ([1.0], {0: 1.0}, "both sides"),
    ],
)
def test_difference_refuses(left, right, message):
    with pytest.raises(ValueError, match=message):
        difference_interval(left, right)


def test_wilson_against_the_textbook():
    # 8 of 10 at 95 %: 0.4902 to 0.9433 (Wilson 1927, as tabulated by Agresti and Coull).
    interval = wilson(8, 10)
    assert interval.mean == 80.0
    assert interval.low == pytest.approx(49.02, abs=0.01)
    assert interval.high == pytest.approx(94.33, abs=0.01)


def test_wilson_stays_inside_percent():
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 100.0
    with pytest.raises(ValueError, match="6 correct of 5"):
        wilson(6, 5)


@pytest.mark.parametrize(
    ("relation", "bounds", "outcome"),
    [
        (">", (0.2, 1.0), "holds"),
        (">", (-0.1, 1.0), "undecided"),
        (">", (-1.0, -0.1), "contradicted"),
        (">", (0.0, 1.0), "undecided"),
        (">= -2.0", (-2.0, 1.0), "holds"),
        (">= -2.0", (-2.1, 1.0), "undecided"),
        (">= -2.0", (-3.0, -2.1), "contradicted"),
        ("<", (-1.0, -0.1), "holds"),
        ("<", (0.0, 1.0), "contradicted"),
        ("<= 0.5", (0.6, 1.0), "contradicted"),
        ("<= 0.5", (0.1, 0.5), "holds"),
    ],
)
def test_decide(relation, bounds, outcome):
    assert decide(claim(relation), Interval(sum(bounds) / 2, *bounds, 3)).outcome == outcome


def test_one_seed_decides_nothing():
    verdict = decide(claim(">"), Interval(50.0, None, None, 1))
    assert verdict.outcome == "undecided"
    assert verdict.reason == "one seed: no interval"


def test_relations():
    assert parse_relation(">") == (">", 0.0)
    assert parse_relation(" >= -2.0 ") == (">=", -2.0)
    for bad in ("=", "about 3", ">= x", ""):
        with pytest.raises(ValueError, match="write one of"):
            parse_relation(bad)


def test_half_an_interval_is_refused():
    with pytest.raises(ValueError, match="both bounds or none"):
        Interval(1.0, 0.5, None, 2)


def test_format():
    assert Interval(89.44, 88.9, 89.94, 3).format() == "89.4 [88.9, 89.9]"
    assert Interval(-0.5, -1.0, 0.0, 3).format(signed=True) == "-0.5 [-1.0, +0.0]"
