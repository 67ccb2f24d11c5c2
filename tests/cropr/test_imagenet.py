"""Class folders: what is refused, what a sample depends on, who sees which image; batches of all tasks."""

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import equal

from cropr.__main__ import main
from cropr.data.check import check
from cropr.data.imagenet import EvalImages, TrainImages, eval_transform, load_splits, train_transform
from cropr.data.loading import EvalBatches, ImageError, Samples, TrainBatches, decode, seeded
from cropr.data.scenes import INCOMPLETE
from cropr.distributed import World
from cropr.tasks.classification import AugmentSpec, DataSpec

PLAIN = AugmentSpec(hflip=0, scale=(1, 1), ratio=(1, 1))
RICH = AugmentSpec(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5)
CLASSES = ("ant", "bee", "cat")


def spec(augment: AugmentSpec = PLAIN, **changes) -> DataSpec:
    return DataSpec(image_size=16, num_classes=3, augment=augment, mean=(0, 0, 0), std=(1, 1, 1), **changes)


def train_batches(split, spec: DataSpec, size: int, seed: int = 0, **share) -> TrainBatches:
    return TrainBatches(TrainImages(split, spec, seed), size, seed, **share)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes with 7 training and 3 validation images of noise; pixel [0, 0, 0] is the image's own number."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for label, name in enumerate(CLASSES):
            for index in range(count):
                image = noise.integers(0, 256, (16, 16, 3))
                image[0, 0, 0] = label * count + index
                write(tmp_path / split / name / f"{index}.png", image)
    return tmp_path


def numbers(batches) -> list[int]:
    """The own numbers of the images, in order (``PLAIN`` images only)."""
    return [round(float(image[0, 0, 0]) * 255) for images, _ in batches for image in images]


def test_splits_are_listed_by_class_without_hidden_folders_and_other_files(root):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("x")
    train, val = load_splits(root, num_classes=3)
    assert train.classes == val.classes == CLASSES
    assert train.labels == (0,) * 7 + (1,) * 7 + (2,) * 7
    assert val.paths[4] == str(root / "val" / "bee" / "1.png")


def move(root: Path, one: str, other: str, empty: bool = False) -> None:
    (root / one).rename(root / other)
    if empty:
        (root / one).mkdir()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda r: r.rename(r.with_name("gone")), FileNotFoundError, r"set: no such directory"),
        (lambda r: move(r, "val", "test"), FileNotFoundError, r"/val: no such directory"),
        (lambda r: move(r, "val", "x", empty=True), ValueError, r"/val: no class folder"),
        (lambda r: move(r, "train/bee", "x", empty=True), ValueError, r"/train: no image in bee"),
        (lambda r: move(r, "val/cat", "val/dog"), ValueError, r"(?s)train that val lacks: cat.*lacks: dog"),
        (lambda r: (r / INCOMPLETE).touch(), ValueError, r"interrupted"),
        (lambda r: None, ValueError, r"has 3 classes, the settings say 1000; set num_classes to 3"),
    ],
)
def test_broken_folders_are_refused_by_name(tmp_path, root, damage, error, message):
    inner = tmp_path / "set"
    inner.mkdir()
    for split in ("train", "val"):
        (root / split).rename(inner / split)
    damage(inner)
    with pytest.raises(error, match=message):
        load_splits(inner, 1000)


def test_all_modes_become_rgb_and_the_orientation_is_applied(tmp_path):
    grey = Image.fromarray(np.full((4, 4), 200, np.uint8))
    palette = grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = bytes([255])
    deep = Image.fromarray(np.full((4, 4), 200 * 256, np.uint16))
    images = {"grey.png": grey, "alpha.png": grey.convert("LA"), "rgba.png": grey.convert("RGBA"), "deep.png": deep}
    for name, image in {**images, "palette.png": palette, "cmyk.jpg": grey.convert("RGB").convert("CMYK")}.items():
        image.save(tmp_path / name)
        decoded = decode(tmp_path / name)
        assert decoded.mode == "RGB"
        assert np.abs(np.asarray(decoded).astype(int) - 200).max() <= 2, name
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (4, 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("damage", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_text("no"), Path.unlink])
def test_unreadable_images_are_named_in_one_line(root, damage):
    path, split = root / "train" / "ant" / "3.png", load_splits(root)[0]
    damage(path)
    with pytest.raises(ImageError, match=rf"^{path}: cannot be read as an image: \w"):
        decode(path)
    for workers in (0, 1) if damage is truncate else ():
        with pytest.raises(ValueError, match=rf"^{path}: cannot be read .*; python -m cropr data check [^\n]*$"):
            list(train_batches(split, spec(), 7, workers=workers).epoch(0))


def test_check_lists_all_bad_files_at_once(root, caplog):
    assert check(root, 3).images == {"train": 21, "val": 9}
    assert main(["data", "check", str(root), "--classes", "3"]) == 0
    for path in (*(root / "train").glob("*/*.png"), root / "val" / "bee" / "0.png"):
        truncate(path)
    (root / "val" / "cat").rename(root / "val" / "dog")
    seen = []
    report = check(root, progress=lambda done, total: seen.append((done, total)))
    assert (len(report.bad), len(report.problems), seen[-1]) == (22, 2, (30, 30))
    assert report.bad[-1].startswith(str(root / "val" / "bee" / "0.png"))
    assert main(["data", "check", str(root)]) == 2
    assert "22 of 30 images" in caplog.text
    assert "train that val lacks: cat" in caplog.text
    assert caplog.text.count("cannot be read as an image") == 20


def test_with_augmentation_off_training_only_normalises():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    plain = DataSpec(image_size=16, num_classes=3, augment=PLAIN)
    mean, std = (torch.tensor(values)[:, None, None] for values in (plain.mean, plain.std))
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
    for _ in range(5):
        torch.testing.assert_close(train_transform(plain)(image), expected)


def test_each_switch_makes_training_random(root):
    train, _ = load_splits(root)
    plain = list(train_batches(train, spec(PLAIN), 21).epoch(0))
    switches = {"hflip": 0.5, "scale": (0.5, 1), "color_jitter": 0.9, "erasing": 1.0, "auto_augment": "rand-m9"}
    for switch in switches.items():
        batches = train_batches(train, spec(PLAIN.model_copy(update=dict([switch]))), 21)
        assert not equal(batches.epoch(0), plain), switch


@pytest.mark.parametrize("policy", ["rand-m10-n4-p1-inc1", "v0", "augmix-m10"])
def test_the_strongest_posterize_leaves_black(policy):
    """At magnitude 10, which the recipe's 9 with a deviation of 0.5 reaches, timm keeps no bit of a colour."""
    transform = train_transform(spec(PLAIN.model_copy(update={"auto_augment": policy})))
    operations = [
        operation
        for part in transform.transforms
        for operation in (*getattr(part, "ops", []), *(one for pair in getattr(part, "policy", []) for one in pair))
        if "posterize" in operation.name.lower()
    ]
    assert operations
    for operation in operations:
        assert np.asarray(operation.aug_fn(Image.new("RGB", (4, 4), (255, 200, 3)), 0)).max() == 0
        assert np.asarray(operation.aug_fn(Image.new("RGB", (4, 4), (255, 200, 3)), 1)).max() == 128


def test_evaluation_takes_the_centre():
    image = np.zeros((40, 80, 3), np.uint8)
    image[12:28, 32:48] = 255
    whole = spec(crop_pct=16 / 40)  # the shorter side stays 40
    assert eval_transform(whole)(Image.fromarray(image)).min() == 1
    assert eval_transform(spec(crop_pct=1.0))(Image.fromarray(image)).shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"color_jitter 0.4 has no effect beside auto_augment 'rand-m9'"):
        train_transform(spec(AugmentSpec(auto_augment="rand-m9", color_jitter=0.4)))


def test_seeded_block_is_reproducible_and_leaves_no_trace():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    undisturbed = draw(), draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = draw()
    with seeded(1, 2, 3):
        inside = draw()
    with seeded(1, 2, 3):
        assert draw() == inside
    with seeded(1, 2, 4):
        assert draw() != inside
    with contextlib.suppress(RuntimeError), seeded(1):
        raise RuntimeError
    assert (first, draw()) == undisturbed


def test_a_sample_is_a_function_of_seed_epoch_and_index(root):
    train, _ = load_splits(root)
    folder, other = (TrainImages(train, spec(RICH), seed=seed) for seed in (1, 2))
    first = folder[2, 5][0]
    folder[0, 0], folder[2, 6]
    assert torch.equal(folder[2, 5][0], first)
    assert not torch.equal(folder[3, 5][0], first)
    assert not torch.equal(other[2, 5][0], first)


def test_workers_change_nothing_and_an_epoch_can_begin_anywhere_without_reading_what_lies_before(root):
    train, _ = load_splits(root)
    batches, helped = (train_batches(train, spec(RICH), 4, seed=3, workers=workers) for workers in (0, 2))
    assert equal(batches.epoch(0), helped.epoch(0))
    next(helped.epoch(1))
    assert equal(batches.epoch(2), helped.epoch(2)), "an epoch that was abandoned leaves nothing behind"
    whole = list(batches.epoch(6))
    assert len(whole) == len(batches) == 5
    for index in batches.order(6)[: 3 * 4]:
        Path(train.paths[index]).write_bytes(b"")
    assert equal(batches.epoch(6, start=3), whole[3:])


def test_an_epoch_shows_each_image_once_and_processes_share_each_batch(root):
    train, _ = load_splits(root)
    batches = train_batches(train, spec(), 4)
    seen, labels = numbers(batches.epoch(0)), torch.cat([labels for _, labels in batches.epoch(0)])
    assert len(seen) == len(set(seen)) == 20
    assert [n // 7 for n in seen] == labels.tolist()
    whole = [numbers([batch]) for batch in train_batches(train, spec(), 6).epoch(1)]
    shares = [[numbers([b]) for b in train_batches(train, spec(), 6, world=World(r, 3)).epoch(1)] for r in range(3)]
    assert len(whole) == 3
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part) for part in parts] == [2, 2, 2]
        assert sorted(n for part in parts for n in part) == sorted(batch)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_image_exactly_once(root, world):
    train, val = load_splits(root)
    parts = [EvalBatches(EvalImages(val, spec(crop_pct=1.0)), 2, world=World(rank, world)) for rank in range(world)]
    assert sorted(n for part in parts for n in numbers(part)) == list(range(9))
    for part in parts:
        assert [val.paths[n] for n in numbers(part)] == [val.paths[index] for index in part.indices]
        assert len(list(part)) == len(part)
    for size, processes, message in ((22, 1, "at most 21"), (10, 4, "into 4 processes")):
        with pytest.raises(ValueError, match=message):
            train_batches(train, spec(), size, world=World(0, processes))


class Boxes(Samples):
    """Images whose side is their index, with a random number of boxes, as detection has them."""

    layout = "coco"

    def __init__(self, count: int = 10, seed: int | None = 0) -> None:
        super().__init__(range(count), None, seed)

    def sample(self, index: int) -> tuple[torch.Tensor, dict]:
        boxes = torch.rand(index, 4) + random.random() + np.random.rand() if self.seed is not None else None
        return torch.full((3, index % 3, 2), float(index)), {"id": index, "boxes": boxes}


class Kinds(Boxes):
    def kind(self, index):
        return index % 3


def lists(samples):
    return [image for image, _ in samples], [target for _, target in samples]


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_may_be_lists_and_images_of_any_size(workers):
    batches = TrainBatches(Boxes(), 4, seed=1, collate=lists, workers=workers)
    (images, targets), _ = batches.epoch(0)
    assert [target["id"] for target in targets] == batches.order(0)[:4].tolist()
    assert [image.shape[1] for image in images] == [target["id"] % 3 for target in targets]
    again = TrainBatches(Boxes(), 4, seed=1, collate=lists)
    for one, other in zip(targets, next(again.epoch(0))[1], strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
    assert not torch.equal(Boxes()[0, 3][1]["boxes"], Boxes()[1, 3][1]["boxes"])


@pytest.mark.parametrize("world", [1, 2])
def test_kinds_do_not_share_a_batch_and_none_is_lost(world):
    seen = []
    for rank in range(world):
        batches = EvalBatches(Kinds(seed=None), 2, collate=lists, world=World(rank, world))
        order = []
        for images, targets in batches:
            assert 1 <= len(images) <= 2
            assert len({image.shape for image in images}) == 1
            order += [target["id"] for target in targets]
        assert order == batches.indices
        assert len(list(batches)) == len(batches)
        seen += order
    assert sorted(seen) == list(range(10))
