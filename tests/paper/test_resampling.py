"""Results image by image: metrics of resampled images equal the evaluation of those images, whatever the processes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import tiny_coco
import torch

from cropr.data.ade20k import IGNORE
from cropr.distributed import World
from cropr.tasks.base import EvaluationSettings, in_order, write_arrays
from cropr.tasks.classification.run import Classification
from cropr.tasks.detection.evaluation import score
from cropr.tasks.segmentation.run import count_pixels, scores
from workflow.paper.stats import resampled

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


def test_shares_of_processes_are_put_in_order():
    parts = [([0, 2, 4], {"x": np.array([0, 20, 40])}), ([], {"x": np.zeros(0)}), ([3, 1], {"x": np.array([30, 10])})]
    assert in_order(lambda own: own + parts[1:], *parts[0])["x"].tolist() == [0, 10, 20, 30, 40]


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
