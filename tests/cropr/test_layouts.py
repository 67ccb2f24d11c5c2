"""Scenes on disk: what the files of ADE20k's and COCO's layouts hold. (ImageNet's: tests/cropr/test_scenes.py.)"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from tiny import files

from cropr.__main__ import main
from cropr.data import layouts
from cropr.data.layouts import run_lengths, write
from cropr.data.scenes import compose
from cropr.specs import ScenesSpec

SMALL = ScenesSpec(train=12, val=6, distractors=(0, 3), objects=(0, 2))
TOP = "ADEChallengeData2016"
ADE = {"train": "training", "val": "validation"}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_ade20k_has_images_and_maps(tmp_path):
    write(SMALL, tmp_path, "ade20k")
    names, expected = [("train", index) for index in range(12)] + [("val", index) for index in range(6)], set()
    for split, index in names:
        scene, place = compose(SMALL, split, index), f"{ADE[split]}/{index:06d}.png"
        image, labels = (f"{TOP}/{kind}/{place}" for kind in ("images", "annotations"))
        expected |= {image, labels}
        np.testing.assert_array_equal(pixels(tmp_path / image), scene.image)
        np.testing.assert_array_equal(pixels(tmp_path / labels), scene.semantic)
        assert set(np.unique(scene.semantic)) == {1, *(2 + instance.label for instance in scene.instances)}
    assert set(files(tmp_path)) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_pycocotools_reads_what_coco_holds(tmp_path, split):
    write(SMALL, tmp_path, "coco")
    with contextlib.redirect_stdout(None):
        coco = COCO(str(tmp_path / "annotations" / f"instances_{split}2017.json"))
    assert len(coco.imgs) == getattr(SMALL, split)
    ids = sorted(coco.cats)
    assert ids != list(range(1, 11)), "there are gaps, as in the public files"
    assert [coco.cats[i]["name"] for i in ids] == [f"digit_{d}" for d in range(10)]
    assert min(coco.anns) == 1
    counts = []
    for image in coco.imgs.values():
        scene = compose(SMALL, split, image["id"])
        np.testing.assert_array_equal(pixels(tmp_path / f"{split}2017" / image["file_name"]), scene.image)
        assert (image["height"], image["width"]) == scene.image.shape[:2]
        annotations = coco.imgToAnns[image["id"]]
        counts.append(len(annotations))
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            left, top, right, bottom = instance.box
            assert ids.index(annotation["category_id"]) == instance.label
            assert annotation["bbox"] == [left, top, right - left, bottom - top]
            np.testing.assert_array_equal(coco.annToMask(annotation), instance.region)
            assert annotation["area"] == rle.area(coco.annToRLE(annotation)) == instance.region.sum()
            assert annotation["iscrowd"] == 0
    assert min(counts) == 0, "images without annotations are listed, too"
    assert sum(counts) == len(coco.anns) > 0


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        ([[0, 1], [0, 1]], [2, 2]),  # down the columns
        ([[1, 0], [0, 0]], [0, 1, 3]),  # begins with the number of zeros
        ([[0, 0]], [2]),
        ([[0, 1, 1], [1, 1, 0]], [1, 4, 1]),
    ],
)
def test_run_lengths_by_hand(mask, lengths):
    assert run_lengths(np.array(mask, bool)) == lengths


def test_all_layouts_hold_the_same_images(tmp_path):
    spec, images, truth = ScenesSpec(train=3, val=1, image_size=32), [], ("truth", "annotations", f"{TOP}/annotations")
    for layout in layouts.LAYOUTS:
        write(spec, tmp_path, layout)  # each replaces the one before
        record = json.loads((tmp_path / "record.json").read_text())
        assert (record["kind"], record["layout"], record["id"]) == ("data", layout, spec.digest())
        images.append({content for name, content in files(tmp_path).items() if not name.startswith(truth)})
        assert len(images[-1]) == 4
    assert images[0] == images[1] == images[2]


def test_class_folders_need_a_digit_in_every_image(tmp_path):
    with pytest.raises(ValueError, match=r"objects \(0, 2\): an image without a digit has no class; begin at 1"):
        write(SMALL, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("layout", "fewest", "classes"), [("imagenet", 1, 10), ("ade20k", 0, 11), ("coco", 0, 10)])
def test_command_writes_and_checks(tmp_path, layout, fewest, classes, capsys):
    spec = SMALL.model_copy(update={"train": 20, "val": 10, "objects": (fewest, 2)})
    options = ["--spec", json.dumps({"val": 10, "train": 3}), "--train", "20", "--distractors", "0", "3"]
    options += ["--objects", str(fewest), "2", "--layout", layout]
    assert main(["data", "scenes", "--out", str(tmp_path / "command"), *options]) == 0
    write(spec, tmp_path / "library", layout)
    assert files(tmp_path / "command") == files(tmp_path / "library")
    assert main(["data", "check", str(tmp_path / "command"), "--layout", layout, "--classes", str(classes)]) == 0
    assert "20 train" in " ".join(capsys.readouterr().out.split())
