"""Intervals against hand-written values, pairing, and the one formatter."""

import numpy as np
import pandas as pd
import pytest

from cropr.bench.timing import bootstrap_median
from workflow.paper import stats
from workflow.paper.stats import mean_interval, median_interval, paired_difference, with_interval, write


def frame(**rows):
    """A line per row and seed; None leaves a seed out."""
    lines = [(row, seed, value) for row, values in rows.items() for seed, value in enumerate(values)]
    return pd.DataFrame(lines, columns=["row", "seed", "top1"]).dropna()


def test_mean_interval_is_students_t():
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975, 2 degrees) = 4.30265.
    line = mean_interval(frame(a=[1.0, 2.0, 3.0]), "top1").loc["a"]
    half = 4.302652729911275 / np.sqrt(3)
    assert list(line[["mean", "low", "high", "n"]]) == pytest.approx([2.0, 2 - half, 2 + half, 3])
    assert line["over"] == "seeds"
    table = mean_interval(frame(b=[89.4], a=[1.0, 2.0]), "top1")
    assert list(table.index) == ["b", "a"], "rows keep their order"
    assert np.isnan(table.loc["b", ["low", "high"]]).all(), "one seed has no interval"
    assert with_interval(table)["b"] == "89.4"


def test_coverage_of_the_mean_interval():
    rng = np.random.default_rng(0)
    table = mean_interval(frame(**{f"r{i}": rng.normal(5.0, 2.0, 3) for i in range(600)}), "top1")
    assert ((table["low"] <= 5.0) & (table["high"] >= 5.0)).mean() == pytest.approx(0.95, abs=0.03)


def test_difference_is_paired_by_seed():
    # The seeds differ by ten points, the pairs always by one: the spread vanishes.
    table = paired_difference(frame(base=[79.0, 89.0, 84.0], a=[80.0, 90.0, 85.0]), "top1", "base")
    assert list(table.index) == ["a"]
    assert list(table.loc["a", ["mean", "low", "high", "n"]]) == pytest.approx([1.0, 1.0, 1.0, 3])
    ratio = paired_difference(frame(base=[2.0, 4.0], a=[1.0, 2.0]), "top1", "base", ratio=True)
    assert ratio.loc["a", "mean"] == pytest.approx(0.5)
    # Seeds of one side are left out.
    table = paired_difference(frame(base=[None, 1.0, 9.0], a=[1.0, 3.0, None], b=[5.0, None, None]), "top1", "base")
    assert list(table.index) == ["a"]
    assert list(table.loc["a", ["mean", "n"]]) == [2.0, 1]
    with pytest.raises(ValueError, match="no row 'other'"):
        paired_difference(frame(a=[1.0]), "top1", "other")


def test_median_interval_equals_the_bounds_in_records_and_few_rounds_give_their_range():
    values = np.random.default_rng(1).normal(1.7, 0.1, 9)
    line = median_interval(frame(a=values), "top1").loc["a"]
    assert (line["low"], line["high"], line["median"]) == (*bootstrap_median(values), np.median(values))
    assert list(median_interval(frame(a=[1.5, 1.9, 1.6]), "top1").loc["a"]) == [1.6, 1.5, 1.9, 3, "rounds"]


def test_format():
    table = pd.DataFrame({"mean": [89.44, -0.04, 90.65], "low": [88.9, -1, np.nan], "high": [89.94, 0, np.nan]})
    assert list(with_interval(table)) == ["89.4 [88.9, 89.9]", "0.0 [-1.0, 0.0]", write(90.65)]
    assert list(with_interval(table, digits=0, signed=True))[1] == "+0 [-1, +0]"
    assert write(float("nan")) == ""


def simulate(rng, folder, seeds, images=300, gap=0.0, seed_sd=0.02, shared=0.8):
    """Two rows on the same images: which an image is hard for is shared, each seed has a level of its own."""
    hard, other = rng.random(images), rng.random(images)
    lines = []
    for row, edge in (("base", 0.0), ("a", gap)):
        for seed in range(seeds):
            level = 0.7 + edge + rng.normal(0, seed_sd / np.sqrt(2))
            mixed = np.where(rng.random(images) < shared, hard, other if row == "a" else rng.random(images))
            correct = mixed < level
            path = folder / f"{row}{seed}.npz"
            np.savez(path, image=np.arange(images), correct=correct)
            lines.append((row, seed, 100 * correct.mean(), str(path)))
    return pd.DataFrame(lines, columns=["row", "seed", "top1", "per_image"])


@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.02), (3, 0.0), (5, 0.05)])
def test_coverage_over_seeds_and_images(tmp_path, monkeypatch, seeds, seed_sd):
    """The truth is the difference over all images and seeds, which no run has seen."""
    monkeypatch.setattr(stats, "IMAGE_DRAWS", 200)
    rng, covered = np.random.default_rng(0), []
    for k in range(200):
        (folder := tmp_path / str(k)).mkdir()
        line = paired_difference(simulate(rng, folder, seeds, gap=0.05, seed_sd=seed_sd), "top1", "base").loc["a"]
        assert line["over"] == "seeds and images"
        covered.append(line["low"] <= 5.0 <= line["high"])
    assert 0.92 <= np.mean(covered) <= 1.0


def test_a_bootstrap_of_images_is_the_error_of_a_proportion(tmp_path):
    frame = simulate(np.random.default_rng(1), tmp_path, seeds=1, images=2000)
    line = mean_interval(frame, "top1").loc["base"]
    p = line["mean"] / 100
    assert line["over"] == "images"
    assert line["image_sd"] == pytest.approx(100 * np.sqrt(p * (1 - p) / 2000), rel=0.1)
    assert line["high"] - line["mean"] == pytest.approx(1.96 * line["image_sd"], rel=1e-3)


def test_pairing_by_image_takes_out_what_both_share(tmp_path):
    frame = simulate(np.random.default_rng(2), tmp_path, seeds=1, images=2000, shared=1.0, gap=0.05)
    paired = paired_difference(frame, "top1", "base").loc["a"]
    alone = mean_interval(frame, "top1")
    assert paired["image_sd"] < 0.5 * np.hypot(*alone["image_sd"])
    assert paired_difference(frame, "top1", "base").equals(paired_difference(frame, "top1", "base"))


def test_mcnemar_by_hand(tmp_path):
    frame = simulate(np.random.default_rng(4), tmp_path, seeds=1, images=10)
    np.savez(tmp_path / "base0.npz", image=np.arange(10), correct=np.arange(10) >= 8)
    np.savez(tmp_path / "a0.npz", image=np.arange(10), correct=np.arange(10) < 9)
    (line,) = stats.mcnemar(frame, "base").to_dict("records")
    assert (line["won"], line["lost"]) == (8, 1)
    assert line["p"] == pytest.approx(2 * (1 + 9) / 2**9)


def test_more_seeds_do_not_help_where_images_are_the_limit():
    line = pd.Series({"mean": 0.5, "n": 3, "seed_sd": 0.1, "image_sd": 1.0})
    assert "no number of seeds" in stats.seeds_needed(line, 0.0)
    assert "15.4 times" in stats.seeds_needed(line, 0.0)
