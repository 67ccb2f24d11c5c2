"""Scenes and public sets on disk, in the layouts of ImageNet, ADE20k and COCO, read by our loaders."""

import contextlib
import gzip
import hashlib
import json
import struct
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from tiny import files
from torchvision.datasets import FashionMNIST, OxfordIIITPet

from cropr.__main__ import main
from cropr.data import layouts
from cropr.data.ade20k import load_splits as load_maps
from cropr.data.ade20k import read_pair
from cropr.data.check import check
from cropr.data.imagenet import load_splits
from cropr.data.layouts import run_lengths, write
from cropr.data.public import write as write_public
from cropr.data.scenes import compose, object_mask
from cropr.specs import PUBLIC, ScenesSpec

SMALL = ScenesSpec(train=12, val=6, distractors=(0, 3), objects=(0, 2))
TOP = "ADEChallengeData2016"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


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
    assert 0 < len(coco.imgToAnns) < len(coco.imgs), "images without annotations are listed, too"
    for image in coco.imgs.values():
        scene, annotations = compose(SMALL, split, image["id"]), coco.imgToAnns[image["id"]]
        np.testing.assert_array_equal(pixels(tmp_path / f"{split}2017" / image["file_name"]), scene.image)
        assert (image["height"], image["width"]) == scene.image.shape[:2]
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            left, top, right, bottom = instance.box
            assert (ids.index(annotation["category_id"]), annotation["iscrowd"]) == (instance.label, 0)
            assert annotation["bbox"] == [left, top, right - left, bottom - top]
            np.testing.assert_array_equal(coco.annToMask(annotation), instance.region)
            assert annotation["area"] == rle.area(coco.annToRLE(annotation)) == instance.region.sum()


def test_run_lengths_by_hand():
    for mask, lengths in (
        ([[0, 1], [0, 1]], [2, 2]),  # down the columns
        ([[1, 0], [0, 0]], [0, 1, 3]),  # begins with the number of zeros
        ([[0, 0]], [2]),
        ([[0, 1, 1], [1, 1, 0]], [1, 4, 1]),
    ):
        assert run_lengths(np.array(mask, bool)) == lengths


def test_a_layout_replaces_the_one_before(tmp_path):
    spec, truth = ScenesSpec(train=3, val=1, image_size=32), ("truth", "annotations", f"{TOP}/annotations")
    for layout in layouts.LAYOUTS:
        write(spec, tmp_path, layout)
        record = json.loads((tmp_path / "record.json").read_text())
        assert (record["kind"], record["layout"], record["id"]) == ("data", layout, spec.digest())
        assert len([name for name in files(tmp_path) if not name.startswith(truth)]) == 4
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


BREEDS = [f"Breed_{number:02d}" for number in range(37)]


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Four archives as Fashion-MNIST has them: 20 + 10 images, two and one a class."""
    folder = tmp_path_factory.mktemp("archives")
    for name, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:12, 8:28] = 100 + labels[:, None, None]
        headers = struct.pack(">4i", 2051, count, 28, 28), struct.pack(">2i", 2049, count)
        for kind, header, values in zip(("images-idx3", "labels-idx1"), headers, (images, labels), strict=True):
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Two archives as the Oxford-IIIT Pet set has them: an image of each breed a split."""
    root = tmp_path_factory.mktemp("archives")
    for folder in ("images", "annotations/trimaps"):
        (root / folder).mkdir(parents=True)
    for split, number in (("trainval", 1), ("test", 2)):
        names = [f"{breed}_{number}" for breed in BREEDS]
        lines = [f"{name} {label} 1 1\n" for label, name in enumerate(names, start=1)]
        (root / f"annotations/{split}.txt").write_text("".join(lines))
        for name in names:
            trimap = np.full((24, 40), 2, np.uint8)
            trimap[4:12, 10:30], trimap[6:10, 12:28] = 3, 1
            Image.fromarray(trimap).save(root / f"annotations/trimaps/{name}.png")
            Image.new("RGB", (40, 24), (9, 90, 200)).save(root / f"images/{name}.jpg")
    for folder in ("images", "annotations"):
        with tarfile.open(root / f"{folder}.tar.gz", "w:gz") as archive:
            archive.add(root / folder, folder)
    return root


def sums(folder):
    return [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in sorted(folder.glob("*.gz"))]


@pytest.fixture
def written_pets(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", [(f"http://none.invalid/{n}", md5) for n, md5 in sums(pets)])
    write_public("pets", tmp_path / "set", pets)
    return tmp_path / "set"


def test_fashion(clothes, tmp_path):
    assert main(["data", "fashion", "--out", str(tmp_path), "--source", str(clothes)]) == 0
    train, val = load_splits(tmp_path / "imagenet", 10)
    assert (len(train), len(val), train.classes[0], val.classes[-1]) == (20, 10, "ankle_boot", "trouser")
    mask = object_mask(val.paths[0])
    assert (mask.shape, mask[4, 8], mask[3, 8], (mask == 255).sum()) == ((28, 28), 255, 0, 160)
    split = load_maps(tmp_path / "ade20k")[0]
    _, labels = read_pair(split, 13, 11)
    assert (labels[0, 0], labels[4, 8]) == (0, 1 + 3), "the background, and class 3 of torchvision's"
    for layout, classes in PUBLIC["fashion"].items():
        check(tmp_path / layout, classes, layout).raise_for_problems()
    write_public("fashion", tmp_path)  # again, from the files that are there


def test_pets_have_classes_maps_and_instances(written_pets):
    coco = pytest.importorskip("cropr.data.coco", reason="it needs pycocotools, an extra of the package")
    for layout, classes in PUBLIC["pets"].items():
        report = check(written_pets / layout, classes, layout)
        report.raise_for_problems()
        assert set(report.images.values()) == {37}
    _, labels = read_pair(load_maps(written_pets / "ade20k")[1], 5, 38)
    assert (labels[0, 0], labels[5, 11], labels[7, 13]) == (0, 255, 1 + 5), "background, border, breed"
    _, val = coco.load_coco(written_pets / "coco", 37)
    (instance,) = val.annotations.instances[val.annotations.images[5].id]
    assert (instance.label, instance.box) == (6, (10, 4, 30, 12))
    assert instance.segmentation["counts"][:3] == [10 * 24 + 4, 8, 16]
    assert sum(instance.segmentation["counts"][1::2]) == 160


def test_what_is_missing_or_wrong_is_said(clothes, pets, tmp_path, monkeypatch):
    monkeypatch.setattr(FashionMNIST, "download", Mock(side_effect=RuntimeError("no network")))
    wrong = [(f"http://none.invalid/{name}", "0" * 32) for name, _ in sums(pets)]
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", wrong)
    with pytest.raises(ValueError, match=r"fashion cannot be read .*no network; .*--source DIR"):
        write_public("fashion", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="archives of pets"):
        write_public("pets", tmp_path / "b", tmp_path / "nowhere")
    before = sums(pets)
    with pytest.raises(ValueError, match="pets cannot be read or downloaded"):
        write_public("pets", tmp_path / "c", pets)
    assert sums(pets) == before
    (tmp_path / "d/imagenet").mkdir(parents=True)
    (tmp_path / "d/imagenet/mine.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_public("fashion", tmp_path / "d", clothes)
