"""ADE20k's layout: what is refused, that image and labels stay together, and what a sample depends on."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import equal
from torchvision import tv_tensors

from cropr.__main__ import main
from cropr.data import ade20k
from cropr.data.ade20k import FOLDER, IGNORE, EvalImages, TrainImages, decode_map, load_splits
from cropr.data.check import check
from cropr.data.layouts import write
from cropr.data.loading import EvalBatches, ImageError, TrainBatches, seeded
from cropr.data.scenes import INCOMPLETE, compose
from cropr.specs import ScenesSpec
from cropr.tasks.segmentation import SegDataSpec

NEUTRAL = {"mean": (0, 0, 0), "std": (1, 1, 1)}
PLAIN = SegDataSpec(image_size=16, num_classes=5, resize=(1, 1), cat_max_ratio=1, hflip=0, photometric=False, **NEUTRAL)
RICH = SegDataSpec(image_size=16, num_classes=5)
GEOMETRY = RICH.model_copy(update={"photometric": False, "resize": (0.8, 2.0), **NEUTRAL})


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path)


def labelled(size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colour tells the label: blocks of 4 x 4 px with labels 0 to 5, red 40 times the label."""
    height, width = size
    blocks = np.random.default_rng(seed).integers(0, 6, (-(-height // 4), -(-width // 4)))
    labels = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    return np.stack([labels * 40, labels * 0 + 7, labels * 0 + seed], axis=-1), labels


def tensors(size: tuple[int, int], seed: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """``labelled`` as it is read."""
    image, labels = (torch.from_numpy(values).byte() for values in labelled(size, seed))
    return tv_tensors.Image(image.permute(2, 0, 1)), tv_tensors.Mask(labels - 1)


SIZES = [(16, 16), (16, 16), (16, 24), (20, 12), (16, 16), (30, 40)]


@pytest.fixture
def root(tmp_path) -> Path:
    """Six pairs a split, of several sizes; number ``i`` has blue ``i``."""
    for split in ("training", "validation"):
        for index, size in enumerate(SIZES):
            image, labels = labelled(size, index)
            save(tmp_path / FOLDER / "images" / split / f"{index}.png", image)
            save(tmp_path / FOLDER / "annotations" / split / f"{index}.png", labels)
    return tmp_path


def train_batches(split, spec: SegDataSpec, size: int, seed: int = 0, **share) -> TrainBatches:
    return TrainBatches(TrainImages(split, spec, seed), size, seed, **share)


def test_pairs_are_listed_by_name_from_either_folder(root):
    folder = root / FOLDER / "images" / "training"
    (folder / "1.png").rename(folder / "1.JPEG")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    assert load_splits(root) == load_splits(root / FOLDER)
    train, val = load_splits(root)
    assert (train.name, val.name, len(train), len(val)) == ("training", "validation", 6, 6)
    assert train.images[1] == folder / "1.JPEG"
    assert train.annotations[1] == root / FOLDER / "annotations" / "training" / "1.png"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda r: r.rename(r.with_name("gone")), FileNotFoundError, r"no such directory"),
        (lambda r: (r / "images/validation").rename(r / "x"), FileNotFoundError, r"images/validation: no such"),
        (lambda r: (r / "annotations/training/3.png").unlink(), ValueError, r"no annotation .* of 3.png$"),
        (lambda r: (r / "images/training/3.png").unlink(), ValueError, r"no image of the annotations 3.png$"),
        (lambda r: save(r / "images/training/3.jpg", np.zeros((4, 4, 3))), ValueError, r"share a name: 3.jpg, 3.png"),
        (lambda r: [p.unlink() for p in (r / "images/training").iterdir()], ValueError, r"images/training: no image\n"),
        (lambda r: (r / INCOMPLETE).touch(), ValueError, r"interrupted"),
    ],
)
def test_broken_folders_are_refused_by_name(root, damage, error, message):
    damage(root / FOLDER)
    with pytest.raises(error, match=message):
        load_splits(root / FOLDER)


def test_label_0_is_ignored_classes_count_from_0_and_palettes_give_their_indices(tmp_path):
    pixels = np.array([[0, 1], [5, 2]], np.uint8)
    palette = Image.fromarray(pixels, mode="P")
    palette.putpalette([9, 9, 9, *[200, 0, 0] * 5])
    palette.save(tmp_path / "palette.png")
    save(tmp_path / "grey.png", pixels)
    for name in ("grey.png", "palette.png"):
        assert decode_map(tmp_path / name, 5).tolist() == [[IGNORE, 0], [4, 1]]


@pytest.mark.parametrize(
    ("pixels", "mode", "message"),
    [
        (np.zeros((4, 4, 3)), None, r"this is RGB"),
        (np.zeros((4, 4)), "1", r"this is 1"),
        (np.zeros((4, 4)), "I;16", r"this is I;16"),
        (np.full((4, 4), 6), None, r"label 6, but there are 5 classes"),
        (np.full((4, 4), 255), None, r"label 255, but there are 5 classes"),
    ],
)
def test_annotations_of_a_wrong_kind_are_refused(tmp_path, pixels, mode, message):
    save(tmp_path / "a.png", pixels, mode)
    with pytest.raises(ImageError, match=rf"^{tmp_path / 'a.png'}: .*{message}"):
        decode_map(tmp_path / "a.png", 5)


def test_check_lists_all_that_cannot_be_used(root):
    assert main(["data", "check", str(root), "--layout", "ade20k"]) == 0  # any label will do
    assert check(root, 5, "ade20k").images == {"training": 6, "validation": 6}
    top = root / FOLDER
    save(top / "annotations/training/0.png", np.zeros((16, 16, 3)))
    save(top / "annotations/training/1.png", np.zeros((16, 17)))
    (top / "images/training/2.png").write_bytes(b"")
    save(top / "annotations/validation/4.png", np.full((16, 16), 9))
    (top / "annotations/validation/5.png").unlink()
    report = check(root, 5, "ade20k")
    assert len(report.bad) == 4
    assert re.search(r"training/1.png: 16 x 16 px, its annotation .*/1.png 17 x 16 px", report.bad[1])
    assert [problem.endswith("of 5.png") for problem in report.problems] == [True]


def test_with_everything_off_images_of_the_right_size_are_only_normalised(root):
    batches = train_batches(load_splits(root)[0], PLAIN, 6)
    ((images, maps),) = batches.epoch(0)
    assert images.dtype == torch.float32
    assert maps.dtype == torch.uint8
    assert type(images) is type(maps) is torch.Tensor
    for index, image, labels in zip(batches.order(0), images, maps, strict=True):
        if SIZES[index] == (16, 16):
            expected, expected_labels = labelled((16, 16), index)
            torch.testing.assert_close(image.permute(1, 2, 0) * 255, torch.from_numpy(expected).float())
            assert torch.equal(labels, torch.from_numpy((expected_labels - 1).astype(np.uint8)))


def test_image_and_labels_stay_together(root):
    """Resized, cropped, flipped and padded: away from the borders of blocks, red still tells the label."""
    batches = train_batches(load_splits(root)[0], GEOMETRY, 6, seed=2)
    images, maps = (torch.cat(parts) for parts in zip(*(b for e in range(8) for b in batches.epoch(e)), strict=True))
    assert (images.shape, maps.shape) == ((48, 3, 16, 16), (48, 16, 16))
    green, red = (images[:, 1] * 255).round(), (images[:, 0] * 255 / 40).round()
    assert set(green.unique().tolist()) == {0, 7}  # nothing but padding is 0
    assert (maps[green == 0] == IGNORE).all()
    known = (green == 7) & (maps != IGNORE)
    # Interpolation blurs the borders of blocks; a shift by one pixel gives 0.7.
    assert (red[known] == maps[known] + 1).float().mean() > 0.75


def test_padding_lies_at_the_right_and_the_bottom():
    image, labels = tensors((8, 10), 1)
    out, out_labels = ade20k.train_view(image, labels, PLAIN.model_copy(update={"resize": (0.5, 0.5)}))
    assert torch.equal(out_labels[:8, :10], labels)
    assert (out_labels[8:] == IGNORE).all()
    assert (out_labels[:, 10:] == IGNORE).all()
    assert out[:, 8:].abs().max() == out[:, :, 10:].abs().max() == 0


def test_shorter_side_is_resized_and_the_longer_limited():
    """16 px for the shorter side, at most 64 for the longer; a range is used to its ends."""
    for size, expected in {(40, 60): [16, 24], (10, 100): [6, 64], (64, 8): [64, 8]}.items():
        assert ade20k.random_size(torch.zeros(3, *size), PLAIN) == expected
    sides = {ade20k.random_size(torch.zeros(3, 20, 20), RICH)[0] for _ in range(300)}
    assert (min(sides), max(sides), len(sides) > 20) == (8, 32, True)


def test_crops_are_mixed_where_the_image_is():
    """Class 1 has a column of 16 among 64; of crops that are taken as they come, few hold enough of both classes."""

    def crops(labels: torch.Tensor, **changes) -> list[torch.Tensor]:
        places = [ade20k.capped_crop(labels, RICH.model_copy(update=changes)) for _ in range(100)]
        return [labels[top : top + height, left : left + width] for top, left, height, width in places]

    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 30:46] = 1
    for cap, least, most in ((1.0, 0, 39), (0.75, 91, 100)):
        found = crops(labels, cat_max_ratio=cap)
        assert {crop.shape for crop in found} == {(16, 16)}
        assert least <= sum(0.25 < crop.float().mean().item() < 0.75 for crop in found) <= most
    # Pixels without label are no class: of half of every crop; two classes meet at the right end, in 2 of 17 crops.
    labels = torch.full((4, 20), IGNORE, dtype=torch.uint8)
    labels[:2] = 3
    labels[:2, 18:] = 4
    assert sum(4 in crop for crop in crops(labels, image_size=4)) > 50


def test_each_switch_makes_training_random(root):
    train, _ = load_splits(root)
    plain = list(train_batches(train, PLAIN, 6).epoch(0))
    for change in ({"hflip": 0.5}, {"photometric": True}, {"resize": (0.9, 1.1)}):
        assert not equal(train_batches(train, PLAIN.model_copy(update=change), 6).epoch(0), plain), change


def test_distortion_leaves_labels_alone():
    image, labels = tensors((16, 16), 3)
    spec = PLAIN.model_copy(update={"photometric": True})
    outs = []
    for number in range(100):
        with seeded(number):
            out, out_labels = ade20k.train_view(image, labels, spec)
        assert torch.equal(out_labels, labels)
        outs.append(out)
    changed = sum(not torch.allclose(out, image / 255, atol=1e-4) for out in outs)
    assert 85 <= changed < 100  # each of four distortions has odds of a half: 94 expected
    assert min(out.min() for out in outs) >= 0
    assert max(out.max() for out in outs) <= 1


def test_single_windows_have_the_longer_side_resized_and_labels_as_they_are(root):
    _, val = load_splits(root)
    shapes = {}
    batches = EvalBatches(EvalImages(val, PLAIN), 4)
    for images, maps in batches:
        assert len(images) == len(maps)
        shapes[tuple(maps.shape[1:])] = tuple(images.shape[2:])
    assert shapes == {(16, 16): (16, 16), (16, 24): (11, 16), (20, 12): (16, 10), (30, 40): (12, 16)}


@pytest.mark.parametrize("known", [True, False])
def test_scenes_are_read_as_they_were_drawn(tmp_path, known):
    """Whether the spec says that they are scenes, for which training is not random, or not."""
    scenes = ScenesSpec(train=4, val=4, objects=(1, 2))
    write(scenes, tmp_path, "ade20k")
    spec = PLAIN.model_copy(update={"image_size": 64, "num_classes": 11, "scenes": scenes if known else None})
    train, val = load_splits(tmp_path)
    batches, evaluated = train_batches(train, spec, 4), EvalBatches(EvalImages(val, spec), 8)
    for split, order, found in (("train", batches.order(0), batches.epoch(0)), ("val", range(4), evaluated)):
        ((images, maps),) = found
        for index, image, labels in zip(order, images, maps, strict=True):
            scene = compose(scenes, split, index)
            torch.testing.assert_close(image.permute(1, 2, 0) * 255, torch.from_numpy(scene.image).float())
            assert torch.equal(labels, torch.from_numpy(scene.semantic - np.uint8(1)))
