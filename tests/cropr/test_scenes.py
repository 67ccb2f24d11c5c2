"""Generated scenes: reproducible, true to their masks. Scenes and public sets on disk, read by our loaders."""

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
from cropr.data import layouts, scenes
from cropr.data.ade20k import load_splits as load_maps
from cropr.data.ade20k import read_pair
from cropr.data.check import check
from cropr.data.imagenet import load_splits
from cropr.data.layouts import run_lengths, write
from cropr.data.public import write as write_public
from cropr.data.scenes import DISTRACTOR, OBJECT, compose, fingerprint, object_mask, object_patches
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


SPEC = ScenesSpec()
PLAIN = ScenesSpec(image_size=32, train=20, val=10, distractors=(0, 3))


def assert_same(a: scenes.Scene, b: scenes.Scene) -> None:
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.mask, b.mask)
    assert (a.label, a.instances[0].box) == (b.label, b.instances[0].box)


def test_a_scene_does_not_depend_on_what_was_composed_before():
    forwards = [compose(SPEC, "train", index) for index in range(8)]
    np.random.seed(1)  # the global generator must not matter
    for index in reversed(range(8)):
        assert_same(forwards[index], compose(SPEC, "train", index))


def test_training_and_validation_digits_are_apart_and_all_are_used():
    from sklearn.datasets import load_digits  # here, because it takes seconds

    split = {name: {d.tobytes() for group in groups for d in group} for name, groups in scenes._digits().items()}
    originals = {(d / 16).astype(np.float32).tobytes() for d in load_digits().images}
    assert not split["train"] & split["val"]
    assert split["train"] | split["val"] == originals
    per_class = [len(group) for group in scenes._digits()["val"]]
    assert min(per_class) >= 34  # a fifth of each class
    assert sum(per_class) == 364


def test_mask_and_box_say_where_the_digit_is():
    for index in range(60):
        scene = compose(SPEC, "train", index)
        mask, (left, top, right, bottom) = scene.mask, scene.instances[0].box
        assert (scene.image.shape, scene.image.dtype, scene.label) == ((64, 64, 3), np.uint8, index % 10)
        assert {0, OBJECT} <= set(np.unique(mask)) <= {0, DISTRACTOR, OBJECT}
        assert 12 <= bottom - top <= max(right - left, bottom - top) <= 16  # most of the height of their square
        rows, columns = np.nonzero(mask == OBJECT)
        assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        if scene.label == 0:
            assert mask[(top + bottom) // 2, (left + right) // 2] == OBJECT, "the inside of a zero is of its region"


def test_the_class_is_readable_where_the_box_is_and_nowhere_else():
    """Nearest neighbour on the box of each image; then on a window of the same size elsewhere in the same image."""

    def features(split: str, index: int, elsewhere: bool) -> np.ndarray:
        scene = compose(SPEC, split, index)
        left, top, right, bottom = scene.instances[0].box
        if elsewhere:
            left, right = (0, right - left) if left >= right - left else (64 - (right - left), 64)
        crop = Image.fromarray(scene.image).convert("L").crop((left, top, right, bottom)).resize((8, 8))
        value = np.asarray(crop, np.float32).ravel()
        return (value - value.mean()) / (value.std() + 1e-3)

    accuracy = []
    for elsewhere in (False, True):
        known = np.stack([features("train", index, elsewhere) for index in range(300)])
        asked = np.stack([features("val", index, elsewhere) for index in range(100)])
        nearest = np.abs(asked @ known.T).argmax(axis=1)  # strokes may be brighter or darker than what is beneath
        accuracy.append((nearest % 10 == np.arange(100) % 10).mean())
    assert accuracy[0] > 0.6
    assert accuracy[1] < 0.25


def test_pixels_and_fingerprint_follow_spec_and_version_of_the_generator(monkeypatch):
    """Coarse, since resampling may differ by a level between machines. If it fails on purpose, raise scenes.VERSION."""
    assert scenes.VERSION == 2
    means = [compose(SPEC, split, index).image.mean() for split in ("train", "val") for index in range(3)]
    assert means == pytest.approx([62.3, 57.1, 115.6, 45.7, 55.6, 46.2], abs=0.2)
    first = fingerprint(SPEC)
    assert len({first, fingerprint(SPEC.model_copy(update={"distractors": (9, 9)})), fingerprint(SEVERAL)}) == 3
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    assert first != fingerprint(SPEC)


def test_written_set_has_the_layout_the_pixels_the_truth_and_a_record(tmp_path):
    steps = []
    write(PLAIN, tmp_path, progress=steps.append)
    expected = {f"train/digit_{i % 10}/{i:06d}.png" for i in range(20)}
    expected |= {f"{part}val/digit_{i % 10}/{i:06d}.png" for i in range(10) for part in ("", "truth/")}
    assert set(files(tmp_path)) == expected
    assert sum(steps) == 30
    for split, index in (("train", 13), ("val", 7)):
        path = tmp_path / split / f"digit_{index % 10}" / f"{index:06d}.png"
        scene = compose(PLAIN, split, index)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), scene.image)
        truth = object_mask(path)
        assert np.array_equal(truth, scene.mask) if split == "val" else truth is None
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["kind"], record["id"], record["seed"]) == ("data", PLAIN.digest(), 0)
    assert ScenesSpec(**record["spec"]) == PLAIN
    assert (record["metrics"]["train_images"], record["metrics"]["val_images"]) == (20, 10)
    assert record["provenance"]["data_fingerprint"] == fingerprint(PLAIN)


def test_an_interrupted_set_is_not_complete_and_is_replaced(tmp_path):
    write(PLAIN, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(PLAIN, tmp_path, progress=Mock(side_effect=KeyboardInterrupt))
    assert not (tmp_path / "record.json").exists()
    assert (tmp_path / scenes.INCOMPLETE).exists()
    write(PLAIN.model_copy(update={"train": 11}), tmp_path)
    assert (tmp_path / "record.json").exists()
    assert len(list(tmp_path.rglob("train/*/*.png"))) == 11
    assert not (tmp_path / scenes.INCOMPLETE).exists()
    (tmp_path / "record.json").unlink()  # as Snakemake does before it runs the job again
    write(PLAIN, tmp_path)


def test_foreign_folders_are_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat.jpg").write_bytes(b"mine")
    for record in (None, '{"kind": "train"}'):
        if record:
            (tmp_path / "record.json").write_text(record)
        with pytest.raises(ValueError, match=r"is not empty and holds no set written by"):
            write(PLAIN, tmp_path)
    assert files(tmp_path) == {"train/cat.jpg": b"mine"}
    assert (tmp_path / "record.json").exists()


def test_object_patches_counts_pixels():
    mask = np.zeros((8, 16), np.uint8)
    mask[0, 0] = OBJECT  # 1 of 16 pixels of patch 0
    mask[4:6, 4] = OBJECT  # 2 of 16 of patch 5
    mask[:4, 12:] = DISTRACTOR  # all of patch 3, but not the object's
    assert np.flatnonzero(object_patches(mask, (2, 4))).tolist() == [5]
    assert np.flatnonzero(object_patches(mask, (2, 4), threshold=1 / 16)).tolist() == [0, 5]
    with pytest.raises(ValueError, match=r"8 x 16 px does not divide into a grid of 3 x 4"):
        object_patches(mask, (3, 4))
    counts = [object_patches(compose(SPEC, "val", index).mask, (8, 8)).sum() for index in range(100)]
    assert 2 <= min(counts) <= max(counts) <= 9, "most patches are background"


SEVERAL = ScenesSpec(objects=(0, 3))


def test_first_digit_has_the_label_of_the_index_and_others_any_and_nothing_is_painted_over_them():
    scenes = [compose(ScenesSpec(objects=(2, 2), distractors=(40, 40)), "train", index) for index in range(60)]
    labels = [[instance.label for instance in scene.instances] for scene in scenes]
    assert [first for first, _ in labels] == [index % 10 for index in range(60)]
    assert {second for _, second in labels} == set(range(10))
    for scene in scenes:
        for left, top, right, bottom in (instance.box for instance in scene.instances):
            assert not (scene.mask[top:bottom, left:right] == DISTRACTOR).any()


@pytest.mark.parametrize("spec", [SEVERAL, ScenesSpec(objects=(4, 4)), ScenesSpec(objects=(5, 9), scale=(1.2, 2))])
def test_instances_are_apart_and_make_up_mask_and_semantic_map(spec):
    for index in range(30):
        scene = compose(spec, "train", index)
        assert spec.objects[0] <= len(scene.instances) <= spec.objects[1]
        covered = sum((i.region.astype(int) for i in scene.instances), np.zeros(scene.mask.shape, int))
        assert covered.max(initial=0) <= 1
        np.testing.assert_array_equal(covered == 1, scene.mask == OBJECT)
        np.testing.assert_array_equal(covered == 0, scene.semantic == 1)
        for instance in scene.instances:
            left, top, right, bottom = instance.box
            assert set(scene.semantic[instance.region]) == {2 + instance.label}
            assert instance.region[top:bottom, left:right].sum() == instance.region.sum() > 0


IMPOSSIBLE = {
    r"objects \(2, 1\) is not an increasing pair of counts": {"objects": (2, 1)},
    r"not an increasing pair": {"objects": (-1, 1)},
    r"distractors \(3, 2\) is not an increasing pair of counts": {"distractors": (3, 2)},
    r"which has room for 4": {"objects": (1, 5), "scale": (3, 3)},
    r"lower scale to at most 2 ": {"image_size": 16, "scale": (2, 3)},
    r"positive and increasing": {"scale": (3, 2)},
}


def test_impossible_scenes_are_refused():
    for message, changes in IMPOSSIBLE.items():
        with pytest.raises(ValueError, match=message):
            compose(ScenesSpec(**changes), "train", 0)
