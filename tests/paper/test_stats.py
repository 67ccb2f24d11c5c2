"""Intervals against values by hand, pairing, the one formatter; results image by image."""

import copy

import numpy as np
import pandas as pd
import pytest
import tiny
import tiny_coco
import torch

from cropr.bench.statistics import median_bounds
from cropr.data.ade20k import IGNORE
from cropr.distributed import World
from cropr.tasks.base import EvaluationSettings, in_order, write_arrays
from cropr.tasks.classification.run import Classification
from cropr.tasks.detection.evaluation import score
from cropr.tasks.segmentation.run import count_pixels, scores
from workflow.paper import stats
from workflow.paper.stats import mean_interval, median_interval, paired_difference, resampled, with_interval, write


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
    table = mean_interval(frame(b=[89.4]), "top1")
    assert np.isnan(table.loc["b", ["low", "high"]]).all(), "one seed has no interval"
    assert with_interval(table)["b"] == "89.4"


def test_one_seed_takes_the_spread_of_the_other_rows():
    # Variances 1 (2 degrees) and 4 (1 degree): pooled 2 with 3 degrees, t(0.975, 3) = 3.18245.
    runs = frame(b=[89.0], a=[1.0, 2.0, 3.0], c=[5.0, 5.0 + 8**0.5])
    table, half = mean_interval(runs, "top1"), 3.182446305284263 * np.sqrt(2)
    assert list(table.index) == ["b", "a", "c"], "rows keep their order"
    assert list(table.loc["b", ["low", "high", "over"]]) == [
        pytest.approx(89 - half), pytest.approx(89 + half), "other rows' seeds"
    ]  # fmt: skip
    difference = paired_difference(runs[runs["row"].isin(["a", "b"])], "top1", "b", others=runs)
    assert difference.loc["a", "n"] == 1
    assert difference.loc["a", "high"] - difference.loc["a", "mean"] == pytest.approx(half * np.sqrt(2))


def test_coverage_of_one_seed_with_the_spread_of_the_others():
    rng, hits = np.random.default_rng(0), []
    for _ in range(400):
        runs = frame(a=rng.normal(1, 2, 1), base=rng.normal(0, 2, 3), c=rng.normal(0, 2, 3), d=rng.normal(0, 2, 3))
        line = paired_difference(runs, "top1", "base").loc["a"]
        hits.append(line["low"] <= 1 <= line["high"])
    assert np.mean(hits) == pytest.approx(0.95, abs=0.03)


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


def test_median_interval_leaves_out_as_many_rounds_at_either_end():
    values = np.random.default_rng(1).normal(1.7, 0.1, 9)
    line = median_interval(frame(a=values), "top1").loc["a"]
    assert (line["low"], line["high"], line["median"]) == (*sorted(values)[1:8:6], np.median(values))


@pytest.mark.parametrize(("rounds", "left_out"), [(6, 0), (7, 0), (9, 1), (15, 3), (100, 39)])
def test_an_interval_of_a_median_covers_it(rounds, left_out):
    """Skewed values, whose true median is known; the number left out at either end is from tables of the sign test."""
    values = np.random.default_rng(0).exponential(size=(4000, rounds))
    bounds = np.array([median_bounds(row) for row in values])
    assert bounds[0].tolist() == [np.sort(values[0])[left_out], np.sort(values[0])[-1 - left_out]]
    assert 0.94 < np.mean((bounds[:, 0] <= np.log(2)) & (np.log(2) <= bounds[:, 1])) < 0.99


def test_few_rounds_give_their_range():
    assert list(median_interval(frame(a=[1.5, 1.9, 1.6]), "top1").loc["a"]) == [1.6, 1.5, 1.9, 3, "rounds"]


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


@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.0), (5, 0.05)])
def test_coverage_over_seeds_and_images(tmp_path, monkeypatch, seeds, seed_sd):
    """The truth is the difference over all images and seeds, which no run has seen."""
    monkeypatch.setattr(stats, "IMAGE_DRAWS", 200)
    rng, covered = np.random.default_rng(0), []
    for k in range(80):
        (folder := tmp_path / str(k)).mkdir()
        line = paired_difference(simulate(rng, folder, seeds, gap=0.05, seed_sd=seed_sd), "top1", "base").loc["a"]
        assert line["over"] == "seeds and images"
        covered.append(line["low"] <= 5.0 <= line["high"])
    assert 0.92 <= np.mean(covered) <= 1.0


def test_a_bootstrap_of_images_is_the_error_of_a_proportion_and_pairing_takes_out_what_is_shared(tmp_path):
    frame = simulate(np.random.default_rng(1), tmp_path, seeds=1, images=2000, shared=1.0, gap=0.05)
    alone, paired = mean_interval(frame, "top1"), paired_difference(frame, "top1", "base")
    line = alone.loc["base"]
    p = line["mean"] / 100
    assert line["over"] == "images"
    assert line["image_sd"] == pytest.approx(100 * np.sqrt(p * (1 - p) / 2000), rel=0.1)
    assert line["high"] - line["mean"] == pytest.approx(1.96 * line["image_sd"], rel=1e-3)
    assert paired.loc["a", "image_sd"] < 0.5 * np.hypot(*alone["image_sd"])
    assert paired_difference(frame, "top1", "base").equals(paired)
    # McNemar's test by hand.
    np.savez(tmp_path / "base0.npz", image=np.arange(10), correct=np.arange(10) >= 8)
    np.savez(tmp_path / "a0.npz", image=np.arange(10), correct=np.arange(10) < 9)
    (line,) = stats.mcnemar(frame, "base").to_dict("records")
    assert (line["won"], line["lost"]) == (8, 1)
    assert line["p"] == pytest.approx(2 * (1 + 9) / 2**9)


def test_format_and_more_seeds_do_not_help_where_images_are_the_limit():
    table = pd.DataFrame({"mean": [89.44, -0.04, 90.65], "low": [88.9, -1, np.nan], "high": [89.94, 0, np.nan]})
    assert list(with_interval(table)) == ["89.4 [88.9, 89.9]", "0.0 [-1.0, 0.0]", write(90.65)]
    assert list(with_interval(table, digits=0, signed=True))[1] == "+0 [-1, +0]"
    assert write(float("nan")) == ""
    line = pd.Series({"mean": 0.5, "n": 3, "seed_sd": 0.1, "image_sd": 1.0})
    assert "no number of seeds" in stats.seeds_needed(line, 0.0)
    assert "15.4 times" in stats.seeds_needed(line, 0.0)


IMAGES = 12


def sample(draw: np.random.Generator) -> np.ndarray:
    """How often each image is drawn."""
    return np.bincount(draw.integers(IMAGES, size=IMAGES), minlength=IMAGES)


def made_coco(draw: np.random.Generator) -> tuple[dict, list[dict]]:
    """Objects of three categories, a crowd among them, and detections: found, displaced, doubled, in vain."""
    content = {
        "images": [{"id": 10 + k, "file_name": f"{k}.png", "height": 80, "width": 80} for k in range(IMAGES)],
        "categories": [{"id": number, "name": str(number)} for number in (2, 5, 9)],
        "annotations": [],
    }
    found = []
    for image in content["images"][1:]:  # the first one shows nothing
        for _ in range(draw.integers(1, 6)):
            x, y, w, h = (int(v) for v in (*draw.integers(0, 40, 2), *draw.integers(8, 40, 2)))
            category = int(draw.choice([2, 5], p=[0.7, 0.3]))
            entry = {"image_id": image["id"], "category_id": category, "bbox": [x, y, w, h], "area": w * h}
            entry |= {"iscrowd": int(draw.random() < 0.1), "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            if entry["iscrowd"]:
                entry["segmentation"] = {"size": [80, 80], "counts": [80 * 80 - w * h, w * h]}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **entry})
            for _ in range(draw.integers(0, 3)):
                dx, dy, dw = draw.integers(-4, 5, 3)
                box = [float(x + max(dx, -x)), float(y + max(dy, -y)), float(w + dw), float(h)]
                found.append({"image_id": image["id"], "category_id": int(draw.choice([2, 5, category, category]))}
                             | {"bbox": box, "score": float(draw.random())})  # fmt: skip
    return content, found


def repeated(content: dict, found: list[dict], counts: np.ndarray) -> tuple[dict, list[dict]]:
    """The set in which each image stands as often as it is drawn, under numbers of its own."""
    drawn = {**content, "images": [], "annotations": []}
    detections = []
    for image, count in zip(content["images"], counts, strict=True):
        for _ in range(count):
            number = len(drawn["images"]) + 1
            drawn["images"].append({**image, "id": number})
            for source, target in ((content["annotations"], drawn["annotations"]), (found, detections)):
                target += [{**one, "image_id": number} for one in source if one["image_id"] == image["id"]]
    for number, one in enumerate(drawn["annotations"], start=1):
        one["id"] = number
    return copy.deepcopy(drawn), copy.deepcopy(detections)


@pytest.mark.parametrize("seed", range(4))
def test_box_ap_of_a_sample_is_that_of_pycocotools(tmp_path, seed):
    draw = np.random.default_rng(seed)
    content, found = made_coco(draw)
    images: dict = {}
    path = tiny_coco.save(tmp_path, "val", content)
    whole = score(found, path, images=images)["box_ap"]
    samples = [np.ones(IMAGES, int), *(sample(draw) for _ in range(6))]
    expected = [whole]
    for k, counts in enumerate(samples[1:]):
        drawn, detections = repeated(content, found, counts)
        expected.append(score(detections, tiny_coco.save(tmp_path, f"val{k}", drawn))["box_ap"])
    assert 5 < whole < 95
    assert resampled(images, "box_ap", np.array(samples)) == pytest.approx(expected, abs=1e-9)


def test_miou_of_a_sample_is_that_of_its_images():
    draw = np.random.default_rng(0)
    labels = torch.from_numpy(draw.choice([0, 1, 2, IGNORE], (IMAGES, 5, 5)))
    prediction = torch.where(torch.rand(labels.shape) < 0.5, labels, torch.randint(3, labels.shape)).clamp(max=4)
    pixels = count_pixels(prediction, labels, 6)
    samples = np.array([sample(draw) for _ in range(5)])
    expected = []
    for counts in samples:
        drawn = np.repeat(np.arange(IMAGES), counts)
        expected.append(scores(count_pixels(prediction[drawn], labels[drawn], 6).sum(dim=0))[0]["miou"])
    assert resampled({"pixels": pixels.numpy()}, "miou", samples) == pytest.approx(expected)


def test_top1_and_kept_patches_by_hand():
    kept = np.array([[1, 0.5], [1, 1.0], [np.nan, np.nan]], np.float32)
    images = {"correct": np.array([True, False, True]), "object_kept": kept}
    counts = np.array([[1, 1, 1], [0, 3, 0], [2, 0, 1]])
    assert resampled(images, "top1", counts) == pytest.approx([200 / 3, 0, 100])
    assert resampled(images, "object_kept", counts) == pytest.approx([75, 100, 50])
    assert resampled(images, "miou", counts) is None
    assert resampled(images, "loss", counts) is None


@pytest.mark.parametrize("world", [2, 5])
def test_processes_together_give_the_file_of_one(tmp_path, world):
    spec = tiny.spec()
    run = Classification(spec, tiny.write_folder(tmp_path / "images"))
    torch.manual_seed(0)
    model = run.build()
    alone = run.evaluate(model, EvaluationSettings(batch_size=3)).images
    shares: list = []

    class Kept(World):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values

        def gather(self, items: list) -> list:
            shares.extend(items)
            return items

    for rank in range(world):
        run.evaluate(model, EvaluationSettings(batch_size=3, world=Kept(rank, world)))
    together = in_order(lambda _: shares, [], {})
    write_arrays(tmp_path / "one.npz", alone)
    write_arrays(tmp_path / "many.npz", together)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "many.npz").read_bytes()
    names = [str(name) for name in alone["image"]]
    assert names == sorted(set(names))
    assert not list(tmp_path.glob(".*.tmp"))
