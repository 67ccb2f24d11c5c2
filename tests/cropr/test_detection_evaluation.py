"""AP of detections with a known answer; COCO's result files; masks in the image."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_coco
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from cropr.__main__ import main
from cropr.data.coco import EvalImages, collate, load_coco, read_masks
from cropr.data.loading import EvalBatches
from cropr.distributed import World
from cropr.records import read_record
from cropr.tasks.base import EvaluationSettings
from cropr.tasks.detection import FIGURES, DetDataSpec
from cropr.tasks.detection.cascade import Detections
from cropr.tasks.detection.evaluation import encode_masks, evaluate, score, score_file, to_results

OF_THIS_SIZE = {f for f in FIGURES if f not in ("ap_medium", "ap_large", "ar_medium", "ar_large")}
"""Figures that the tiny set's objects, small ones all, give."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_coco.write_coco(tmp_path_factory.mktemp("coco"), train=3, val=5)


@pytest.fixture(scope="module")
def annotations(root):
    return root / "annotations" / "instances_val2017.json"


def perfect(annotations: Path) -> list[dict]:
    """The truth as detections."""
    content = json.loads(annotations.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    results = []
    for entry in content["annotations"]:
        code = entry["segmentation"]
        if isinstance(code, list) or isinstance(code["counts"], list):
            code = coco_mask.frPyObjects(code, *sizes[entry["image_id"]])
            code = coco_mask.merge(code) if isinstance(code, list) else code
            code = {"size": list(code["size"]), "counts": code["counts"].decode()}
        found = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        results.append({**found, "score": 0.5 + 0.01 * len(results), "segmentation": code})
    return results


def test_the_truth_scores_full_marks_and_prints_nothing(annotations, capsys):
    results = perfect(annotations)
    before = json.dumps(results)
    metrics = score(results, annotations)
    assert {name: round(value, 6) for name, value in metrics.items()} == {
        f"{kind}_{figure}": 100 for kind in ("box", "mask") for figure in OF_THIS_SIZE
    }
    assert json.dumps(results) == before
    assert capsys.readouterr() == ("", "")


def truth(root: Path, height: int, width: int, *annotations: dict) -> Path:
    """An annotation file of one image and one category."""
    image = {"id": 1, "file_name": "1.png", "height": height, "width": width}
    content = {"images": [image], "categories": [{"id": 1, "name": "thing"}], "annotations": list(annotations)}
    return tiny_coco.save(root, "val", content)


def found(value: float, box: list[float], **more) -> dict:
    return {"image_id": 1, "category_id": 1, "score": value, "bbox": box, **more}


def test_twelve_figures_by_size(tmp_path):
    """One object of each size; the large one is found with IoU 0.8, the medium one not at all."""
    boxes = ([0, 0, 20, 20], [50, 0, 60, 60], [0, 100, 100, 100])
    path = truth(tmp_path, 200, 200, *(annotation(number, box) for number, box in enumerate(boxes, start=1)))
    metrics = score([found(0.9, boxes[0]), found(0.9, [0, 100, 100, 80])], path)
    assert set(metrics) == {f"box_{figure}" for figure in FIGURES}
    # Two of three found without a mistake: precision 1 at the recalls 0, 0.01, ..., 0.66.
    assert metrics["box_ap50"] == metrics["box_ap75"] == pytest.approx(100 * 67 / 101)
    assert (metrics["box_ap_small"], metrics["box_ap_medium"]) == (pytest.approx(100), 0)
    assert [metrics["box_ap_large"], metrics["box_ar_large"]] == pytest.approx([70, 70])  # IoU 0.50 to 0.80: 7 of 10
    assert metrics["box_ar1"] == pytest.approx(100 / 3)
    assert metrics["box_ar100"] == pytest.approx((100 + 70) / 3)


def annotation(number: int, box: list[int], segmentation=None) -> dict:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": w * h, "iscrowd": 0,
        "segmentation": [polygon] if segmentation is None else segmentation,
    }  # fmt: skip


def test_masks_are_measured_by_their_own_area(tmp_path):
    """Small disks in boxes of medium size: pycocotools would take a wrong one for medium, and not count it."""
    rows, columns = np.ogrid[:80, :160]
    disks = [coco_mask.encode(np.asfortranarray((rows - 40) ** 2 + (columns - x) ** 2 <= 290)) for x in (40, 120)]
    codes = [{"size": [80, 160], "counts": code["counts"].decode()} for code in disks]
    boxes, area = [coco_mask.toBbox(code).tolist() for code in disks], int(coco_mask.area(disks[0]))
    assert area < 32**2 < boxes[0][2] * boxes[0][3]
    path = truth(tmp_path, 80, 160, {**annotation(1, boxes[0], codes[0]), "area": area})
    pairs = [found(value, *one, segmentation=two) for value, *one, two in zip((0.5, 0.9), boxes, codes, strict=True)]
    assert score(pairs, path)["mask_ap_small"] == pytest.approx(50)


@pytest.mark.parametrize("change", [0, 1000])
def test_numbers_of_annotations_do_not_matter_and_a_truth_without_polygon_is_never_found(annotations, tmp_path, change):
    """pycocotools takes a match with annotation 0 for none, fails on an empty list, takes four numbers for a box."""
    content = json.loads(annotations.read_text())
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number + change
    assert score(perfect(annotations), tiny_coco.save(tmp_path, "val", content))["box_ap"] == pytest.approx(100)
    content["annotations"][0]["segmentation"] = []
    content["annotations"][1]["segmentation"] = [[0, 0, 30, 30]]
    metrics = score(perfect(annotations), tiny_coco.save(tmp_path, "val", content))
    assert metrics["box_ap"] == pytest.approx(100)
    assert 0 < metrics["mask_ar100"] < 100


def test_crowds_are_neither_found_nor_missed(root):
    """Image 107 of the training split has one: detections of it, and none, make no difference."""
    path = root / "annotations" / "instances_train2017.json"
    crowd = next(a for a in tiny_coco.load(root, "train")["annotations"] if a["iscrowd"])
    place, results = {key: crowd[key] for key in ("image_id", "category_id")}, perfect(path)
    without = [one for one in results if one | place != one]
    assert len(without) == len(results) - 1
    assert score(results, path)["box_ap"] == score(without, path)["box_ap"] == pytest.approx(100)


class Oracle(torch.nn.Module):
    """Detects the truth, with masks of 28 x 28."""

    def __init__(self, split) -> None:
        super().__init__()
        self.split, self.next = split, 0

    def detect(self, images, sizes):
        assert not self.training
        return [self.one(size) for _, size in zip(images, sizes, strict=True)]

    def one(self, size):
        listed, instances = self.split.images[self.next], self.split.instances(self.next)
        masks = read_masks(self.split, self.next)
        self.next += 1
        scale = torch.tensor([size[1] / listed.width, size[0] / listed.height]).repeat(2)
        boxes = torch.tensor([instance.box for instance in instances]).reshape(-1, 4)
        cut = [
            F.interpolate(mask[None, None, int(y) : int(b), int(x) : int(r)].float(), (28, 28), mode="bilinear")[0]
            for mask, (x, y, r, b) in zip(masks.as_subclass(torch.Tensor), boxes.tolist(), strict=True)
        ]
        return Detections(
            boxes * scale,
            torch.tensor([instance.label for instance in instances], dtype=torch.int64),
            torch.full((len(boxes),), 0.9),
            torch.cat(cut) if cut else torch.zeros(0, 28, 28),
        )


def batches(split, size: int = 96):
    spec = DetDataSpec(image_size=size, num_classes=3)
    return EvalBatches(EvalImages(split, spec), 2, collate=collate)


def test_a_detector_that_knows_the_truth(root, annotations, tmp_path):
    """Through padding, the pixels of the file, masks of 28 x 28 and run lengths; the model's mode is as it was."""
    _, val = load_coco(root, 3)
    model, file = Oracle(val).train(), tmp_path / "predictions.json"
    metrics = evaluate(model, batches(val), val.annotations, EvaluationSettings(predictions=file)).metrics
    assert (metrics["box_ap"], metrics["val_images"]) == (pytest.approx(100), 5)
    assert metrics["mask_ap75"] == pytest.approx(100)
    assert metrics["mask_ap"] > 90
    assert model.training
    assert {**score_file(file, annotations), "val_images": 5} == metrics
    for text, says in (('[{"image_id": [1], "category_id": 1}]', "image_id"), ("[" * 100_000, "found.json")):
        (tmp_path / "found.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            score_file(tmp_path / "found.json", annotations)


def test_results_of_all_processes_are_joined_by_image(root, tmp_path):
    _, val = load_coco(root, 3)

    class Backwards(World):
        def gather(self, items):
            return items[::-1]

    found = []
    for world in (World(), Backwards()):
        settings = EvaluationSettings(world=world, predictions=tmp_path / "found.json")
        images = evaluate(Oracle(val), batches(val), val.annotations, settings).images["image"].tolist()
        assert images == [100, 107, 114, 121, 128]
        found.append([result["image_id"] for result in json.loads(settings.predictions.read_text())])
    assert found[0] == found[1]
    images = EvalImages(val, DetDataSpec(image_size=96, num_classes=3))
    with pytest.raises(ValueError, match="5 images for 6 processes"):
        EvalBatches(images, 2, collate=collate, world=World(size=6))


def test_results_are_in_pixels_of_the_file():
    """64 x 32 of an image of 640 x 320; what lies in the padding is cut off or dropped."""
    detections = Detections(
        boxes=torch.tensor([[1.0, 2, 11, 12], [20, 50, 40, 80], [40, 0, 50, 10]]),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        labels=torch.tensor([2, 1, 1]),
        masks=torch.ones(3, 28, 28),
    )
    results = to_results(detections, {"image_id": 5, "size": (64, 32), "original_size": (640, 320)}, (3, 7))
    boxes = [[10, 20, 100, 100], [200, 500, 120, 140]]
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [(5, 7, boxes[0]), (5, 3, boxes[1])]
    areas = [int(coco_mask.area(r["segmentation"])) for r in results]
    assert areas == pytest.approx([100 * 100, 120 * 140], rel=0.005)  # corners are rounded by half a place of the mask
    assert [coco_mask.toBbox(r["segmentation"]).tolist() for r in results] == boxes
    assert json.loads(json.dumps(results)) == results


HALF = torch.cat((torch.zeros(28, 14), torch.ones(28, 14)), dim=1)


@pytest.mark.parametrize(
    ("mask", "box", "filled"),
    [
        *((torch.ones(28, 28), box, (2, 7, 3, 11)) for box in ([3.0, 2, 11, 7], [2.6, 1.6, 11.4, 7.4])),
        (torch.ones(28, 28), [3.4, 2.4, 10.6, 6.6], (2, 7, 3, 11)),
        (HALF, [4.0, 2, 12, 10], (2, 10, 8, 12)),
        (torch.ones(28, 28), [-4.0, -4, 2, 3], (0, 3, 0, 2)),
        (torch.ones(28, 28), [14.0, 10, 40, 40], (10, 12, 14, 16)),
        (torch.ones(28, 28), [20.0, 20, 40, 40], (0, 0, 0, 0)),
        (torch.full((28, 28), 0.4), [0.0, 0, 9, 9], (0, 0, 0, 0)),
    ],
)
def test_a_mask_fills_the_pixels_of_the_image_whose_centre_lies_in_it(mask, box, filled):
    top, bottom, left, right = filled
    expected = np.zeros((12, 16))
    expected[top:bottom, left:right] = 1
    (code,) = encode_masks(mask[None], torch.tensor([box]), (12, 16))
    assert np.array_equal(coco_mask.decode(code), expected)


WRONG = {
    r"detection 1: image_id 5 is not among": {"image_id": 5},
    r"detection 1: category_id 1 is not among the categories \[3, 7, 90\]": {"category_id": 1},
    r"detection 1: score is nan": {"score": math.nan},
    r"detection 1: bbox is \[1, 2\]": {"bbox": [1, 2]},
    r"detection 1: segmentation is not compressed RLE": {"segmentation": [[1, 2, 3, 4, 5, 6]]},
    r"detection 1: segmentation has size \[1, 1\]": {"segmentation": {"size": [1, 1], "counts": "01"}},
    r"detection 1: has \['bbox', .*, the first one": {"segmentation": None},
    r"detection 1: has neither bbox nor segmentation": {"segmentation": None, "bbox": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_detection_or_truth_is_named(annotations, tmp_path, message):
    results = perfect(annotations)
    results[1].update(WRONG[message])
    results[1] = {key: value for key, value in results[1].items() if value is not None}
    with pytest.raises(ValueError, match=f"results: {message}"):
        score(results, annotations)
    content = json.loads(annotations.read_text())
    content["annotations"][0]["category_id"] = 4
    with pytest.raises(ValueError, match="annotation 1: category_id 4"):
        score([], tiny_coco.save(tmp_path, "val", content))


def test_the_command_scores_a_file(annotations, tmp_path):
    predictions, out = tmp_path / "predictions.json", tmp_path / "record.json"
    predictions.write_text(json.dumps(perfect(annotations)))
    command = ["evaluate", "--predictions", str(predictions), "--annotations", str(annotations)]
    assert main([*command, "--out", str(out)]) == 0
    record = read_record(out)
    assert (record["kind"], record["metrics"]["mask_ap"]) == ("score", pytest.approx(100))


def test_files_of_another_kind_are_named(annotations, tmp_path, caplog):
    (tmp_path / "text.json").write_text("no JSON")
    for file, message in (annotations, "holds annotations, not a list"), (tmp_path / "text.json", "not JSON"):
        assert main(["evaluate", "--predictions", str(file), "--annotations", str(annotations)]) == 2
        assert message in caplog.text
