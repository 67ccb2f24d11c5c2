"""Intervals against hand-written values, pairing, and the one formatter."""

import numpy as np
import pandas as pd
import pytest

from cropr.bench.timing import bootstrap_median
from workflow.paper.stats import mean_interval, median_interval, paired_difference, with_interval, write


def frame(**rows):
    """A line per row and seed; None leaves a seed out."""
    lines = [(row, seed, value) for row, values in rows.items() for seed, value in enumerate(values)]
    return pd.DataFrame(lines, columns=["row", "seed", "top1"]).dropna()


def test_mean_interval_is_students_t():
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975, 2 degrees) = 4.30265.
    line = mean_interval(frame(a=[1.0, 2.0, 3.0]), "top1").loc["a"]
    half = 4.302652729911275 / np.sqrt(3)
    assert list(line) == pytest.approx([2.0, 2 - half, 2 + half, 3])


def test_rows_keep_their_order_and_one_seed_has_no_interval():
    table = mean_interval(frame(b=[89.4], a=[1.0, 2.0]), "top1")
    assert list(table.index) == ["b", "a"]
    assert np.isnan(table.loc["b", ["low", "high"]]).all()
    assert with_interval(table)["b"] == "89.4"


def test_coverage_of_the_mean_interval():
    rng = np.random.default_rng(0)
    table = mean_interval(frame(**{f"r{i}": rng.normal(5.0, 2.0, 3) for i in range(600)}), "top1")
    assert ((table["low"] <= 5.0) & (table["high"] >= 5.0)).mean() == pytest.approx(0.95, abs=0.03)


def test_difference_is_paired_by_seed():
    # The seeds differ by ten points, the pairs always by one: the spread vanishes.
    table = paired_difference(frame(base=[79.0, 89.0, 84.0], a=[80.0, 90.0, 85.0]), "top1", "base")
    assert list(table.index) == ["a"]
    assert list(table.loc["a"]) == pytest.approx([1.0, 1.0, 1.0, 3])
    ratio = paired_difference(frame(base=[2.0, 4.0], a=[1.0, 2.0]), "top1", "base", ratio=True)
    assert ratio.loc["a", "mean"] == pytest.approx(0.5)


def test_difference_leaves_out_seeds_of_one_side():
    table = paired_difference(frame(base=[None, 1.0, 9.0], a=[1.0, 3.0, None], b=[5.0, None, None]), "top1", "base")
    assert list(table.index) == ["a"]
    assert table.loc["a", "mean"] == 2.0
    assert table.loc["a", "n"] == 1
    with pytest.raises(ValueError, match="no row 'other'"):
        paired_difference(frame(a=[1.0]), "top1", "other")


def test_median_interval_equals_the_bounds_in_records():
    values = np.random.default_rng(1).normal(1.7, 0.1, 9)
    line = median_interval(frame(a=values), "top1").loc["a"]
    assert (line["low"], line["high"]) == bootstrap_median(values)
    assert line["median"] == np.median(values)


def test_few_rounds_give_their_range():
    line = median_interval(frame(a=[1.5, 1.9, 1.6]), "top1").loc["a"]
    assert list(line) == [1.6, 1.5, 1.9, 3]


def test_format():
    table = pd.DataFrame({"mean": [89.44, -0.04, 90.65], "low": [88.9, -1, np.nan], "high": [89.94, 0, np.nan]})
    assert list(with_interval(table)) == ["89.4 [88.9, 89.9]", "0.0 [-1.0, 0.0]", write(90.65)]
    assert list(with_interval(table, digits=0, signed=True))[1] == "+0 [-1, +0]"
    assert write(float("nan")) == ""
