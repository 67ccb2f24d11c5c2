"""Pruning maps: what is drawn, the choice of images, the file of the verb for each task, and what is refused."""

import csv

import numpy as np
import pytest
import tiny
import tiny_coco
import tiny_detector
import torch
from cases import host_of, pictures
from PIL import Image
from torch import nn

import cropr
from cropr.__main__ import main
from cropr.data.layouts import write
from cropr.data.scenes import compose
from cropr.records import write_record
from cropr.show import OPACITY, block_colour, choose, draw_map, pruned_after, rarest, show
from cropr.specs import ModelSpec, PruneSpec, ScenesSpec
from cropr.tasks import TASKS, TrainSpec
from cropr.tasks.detection import show as detection
from cropr.training.checkpoint import WEIGHTS, save_weights

SCENES = ScenesSpec(image_size=32, train=10, val=30, scale=(2.0, 2.0), distractors=(0, 1))
CPU = torch.device("cpu")


def classifier():
    data = {"image_size": 32, "num_classes": 10, "crop_pct": 1.0, "scenes": SCENES, "augment": {"hflip": 0}}
    prune = {"reducer": "cropr", "schedule": {"constant": {"rate": 4, "first_extra": 0}}}
    return tiny.spec(model__args__depth=3, prune=prune, data=data)


def segmenter(**data):
    """16 patches, of which 6 are pruned after each of the first two blocks; all come back."""
    data = {"image_size": 32, "num_classes": 11, "scenes": SCENES, **data}
    model, schedule = "eva02_tiny_patch14_224", {"stages": {"at": {1: 6, 2: 6}}}
    return tiny.spec(task="segmentation", model__name=model, prune__schedule=schedule, data=data)


def detector(reducer="cropr"):
    """40 px on a canvas of 48: 36 patches, 16 after the first block, 4 after the second, in windows of 2 x 2."""
    return TrainSpec(
        task="detection",
        model=ModelSpec(name=tiny_detector.HOSTS["eva"], args=tiny_detector.SHAPE),
        prune=PruneSpec(reducer=reducer, schedule={"squares": {"at": {1: 4, 2: 2}}}, fusion="llf"),
        data={"image_size": 40, "num_classes": 3},
        detector=tiny_detector.detector_spec(min_score=0.0),
    )


SPECS = {"classification": classifier, "segmentation": segmenter, "detection": detector}
PRUNED = {"classification": [8, 4, 4], "segmentation": [4, 6, 6], "detection": [4, 20, 12]}
"""Patches that are never pruned, and that are pruned after blocks 1 and 2."""


def answers_of(spec, root=None):
    task = TASKS[spec.task]
    return task.load(task.show)(spec, root)


def write_run(folder, spec):
    """A run's record and weights, random but not faint; returns the model."""
    torch.manual_seed(0)
    model = answers_of(spec).model
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "queries" not in name:
            nn.init.normal_(parameter, std=0.2)
    save_weights(folder / WEIGHTS, model)
    record = {"kind": "train", "id": spec.digest(), "spec": spec.model_dump(mode="json"), "seed": 3}
    write_record(folder / "record.json", record)
    return model


def shown(run, out, *more):
    """The verb's file, read."""
    assert main(["show", "--run", str(run), "--out", str(out), *more]) == 0
    with np.load(out, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A data set for each task."""
    folder = tmp_path_factory.mktemp("data")
    write(SCENES, folder / "classification")
    write(SCENES, folder / "segmentation", "ade20k")
    (folder / "detection").mkdir()
    tiny_coco.write_coco(folder / "detection", train=1, val=5)
    return folder


def test_show_draws_where_the_model_prunes():
    """By hand, two by two patches of a grey image: the one that is never pruned stays, each block has its colour."""
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    drawn = draw_map(image, torch.tensor([[0, 1], [2, 3]]), depth=4).float()
    assert (drawn[:, :2, :2] == 100).all()
    for block, (row, column) in {1: (0, 2), 2: (2, 0), 3: (2, 2)}.items():
        expected = OPACITY * torch.tensor(block_colour(block, 4)) + (1 - OPACITY) * 100
        assert (drawn[:, row : row + 2, column : column + 2] - expected[:, None, None]).abs().max() <= 1
    host = host_of("vit")
    model, images = cropr.prune(host, cropr.Schedule.constant(3)).train(), pictures()
    after = pruned_after(model, images)
    assert model.training
    assert [int((after[0] == block).sum()) for block in range(4)] == [6, 4, 3, 3]
    assert torch.equal(after, pruned_after(model.deploy(), images))
    plain, drawn = show(cropr.prune(host, cropr.Schedule.constant(0)), images), cropr.show.show(model, images)
    changed = (plain != drawn).any(dim=1)
    places = after.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert not changed[places == 0].any()
    assert changed[places > 0].float().mean() > 0.95


def test_choice_is_spread_over_classes_and_images():
    labels = [0] * 10 + [1] * 10 + [2] * 10
    assert choose(labels, 3) == [0, 10, 20]
    assert choose(labels, 6) == [0, 10, 20, 5, 15, 25]
    assert sorted(choose([0, 1, 1, 1], 4)) == [0, 1, 2, 3]
    assert choose([0, 1], 5) == [0, 1]
    many = [label for label in range(10) for _ in range(4)]
    assert [many[i] for i in choose(many, 5)] == [0, 2, 4, 6, 8]
    # Images without a class come last.
    assert [choose([-1, 0, -1, 1], count) for count in (2, 3)] == [[1, 3], [1, 3, 0]]
    assert choose([0, -1, 0, 0, 1], 4) == [0, 4, 2, 3]
    assert choose([-1, -1], 1) == [0]
    with pytest.raises(ValueError, match="--images 0"):
        choose([0, 1], 0)
    # The class of an image is its rarest.
    assert rarest([{0, 1}, {0, 2}, {0, 2}, {0}, set()]) == [1, 2, 2, 0, -1]
    assert rarest([{4, 7}]) == [4]


@pytest.mark.parametrize("task", SPECS)
def test_file_holds_what_the_model_did(tmp_path, roots, task, monkeypatch):
    monkeypatch.setattr(detection, "MIN_SCORE", 0.0)
    spec = SPECS[task]()
    model = write_run(tmp_path / "run", spec)
    more = ["--data", str(roots / task), "--images", "3", "--picture", str(tmp_path / "deep" / "maps.png")]
    file = shown(tmp_path / "run", tmp_path / "deep" / "maps.npz", *more)
    assert (file["task"], int(file["depth"])) == (task, model.backbone.depth)
    for after in file["pruned_after"]:
        assert np.bincount(after, minlength=3).tolist() == PRUNED[task]
    pixels = torch.from_numpy(file["images"]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.data.mean, spec.data.std))
    if task != "detection":  # an encoder in windows sees padding, which rounding to pixels changes
        expected = pruned_after(model, (pixels - mean) / std).flatten(1)
        np.testing.assert_array_equal(file["pruned_after"], expected)
    assert file["pruned_after"].shape[1] == file["grid"].prod()
    assert file["map"].shape == file["images"].shape
    drawn = {"truth", "prediction"} & file.keys()
    assert drawn == (set() if task == "classification" else {"truth", "prediction"})
    for name in drawn:
        assert file[name].shape == file["images"].shape
        assert (file[name] != file["images"]).any(axis=(1, 2, 3)).all()
    with Image.open(tmp_path / "deep" / "maps.png") as picture:
        assert picture.width > 180 * (2 + len(drawn))
        assert picture.height > 180 * 3


def test_classes_are_named_and_images_those_of_the_data(tmp_path, roots):
    write_run(tmp_path / "run", classifier())
    file = shown(tmp_path / "run", tmp_path / "x.npz", "--data", str(roots / "classification"), "--images", "4")
    assert file["truth_text"].tolist() == [f"digit_{label}" for label in (0, 2, 5, 7)]
    np.testing.assert_array_equal(file["images"][1], compose(SCENES, "val", 2).image)


@pytest.mark.parametrize("task", SPECS)
def test_pictures_of_the_users_own_need_no_data(tmp_path, task, monkeypatch, caplog):
    """Of other sizes and forms, without truth: maps, a table of predictions and what is drawn of them."""
    monkeypatch.setattr(detection, "MIN_SCORE", 0.0)
    run = tmp_path / "run"
    write_run(run, SPECS[task]())
    (tmp_path / "photos/deep").mkdir(parents=True)
    paths = [tmp_path / "photos/deep/a.png", tmp_path / "photos/b.jpg"]
    for path, size in zip(paths, ((50, 40), (30, 90)), strict=True):
        Image.new("RGB", size, "red").save(path)
    file = shown(run, tmp_path / "maps.npz", *(word for path in paths for word in ("--image", str(path))))
    assert len(file["images"]) == 2
    assert "truth" not in file
    assert not file["truth_text"].astype(bool).any()
    arguments = ["--run", str(run), "--out", str(tmp_path / "found.csv")]
    assert main(["predict", str(tmp_path / "photos"), *arguments, "--pictures", str(tmp_path / "drawn")]) == 0
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["00001_b.png", "00002_a.png"]
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"][-5:] for row in rows if row["rank"] == "1"] == ["b.jpg", "a.png"]
    column = "share" if task == "segmentation" else "score"
    values = [float(row[column]) for row in rows if row["file"].endswith("b.jpg")]
    assert values == sorted(values, reverse=True)
    assert task == "detection" or sum(values) == pytest.approx(1, abs=1e-3 + (task == "classification"))
    if task == "detection":
        assert all(0 <= float(row["left"]) < float(row["right"]) <= 51 for row in rows if row["file"].endswith("a.png"))
    assert main(["predict", str(tmp_path / "nothing"), *arguments]) == 2
    (tmp_path / "photos/0_broken.png").write_bytes(b"no image")
    assert main(["predict", str(tmp_path / "photos"), *arguments]) == 2
    assert "0_broken.png" in caplog.text
    with (tmp_path / "found.csv").open() as file:
        assert list(csv.DictReader(file)) == rows, "the others are predicted all the same"


def test_refusals(tmp_path, caplog):
    write_run(tmp_path / "run", classifier())
    base = ["show", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.npz")]
    for arguments, message in (
        ([], "name what to show"),
        (["--image", str(tmp_path / "no.jpg")], "no such file"),
        (["--data", str(tmp_path / "nowhere")], "no such directory"),
    ):
        caplog.clear()
        assert main([*base, *arguments]) == 2
        assert message in caplog.text
    assert not (tmp_path / "x.npz").exists()


def test_a_photo_is_shrunk_into_one_window(tmp_path):
    """Twice as wide as high: the lower half of the window is padding, which has neither label nor prediction."""
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        for split in ("training", "validation"):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            pixels = np.zeros((64, 128, 3) if mode == "RGB" else (64, 128), np.uint8)
            pixels[:, 64:] = 2
            Image.fromarray(pixels, mode).save(folder / "a.png")
    write_run(tmp_path / "run", segmenter(num_classes=2, scenes=None))
    file = shown(tmp_path / "run", tmp_path / "maps.npz", "--data", str(tmp_path / "data"), "--images", "1")
    image, truth, prediction = (file[name][0] for name in ("images", "truth", "prediction"))
    assert (image[16:] == 128).all()  # the mean colour
    for drawn in (truth, prediction):
        np.testing.assert_array_equal(drawn[16:], image[16:])
    np.testing.assert_array_equal(truth[:16, :16], image[:16, :16])  # 0 in the file: no label
    assert (truth[:16, 16:] != image[:16, 16:]).any(axis=2).all()
    assert (prediction[:16] != image[:16]).any(axis=2).all()


def test_true_objects_lie_on_their_pixels(roots):
    """Objects are bright in the colour of their class, and what is drawn covers these pixels and no others."""
    answers = answers_of(detector(), roots / "detection")
    with torch.inference_mode():
        one, empty = (answers.show(index, CPU) for index in (choose(answers.labels(), 1)[0], 4))
    covered = (one.truth != one.image).any(dim=0)
    bright = one.image.amax(dim=0) > 150
    assert (covered & bright).sum() > 0.8 * bright.sum()
    assert covered.sum() < 2 * bright.sum() + 100
    assert answers.labels()[4] == -1, "an image without objects has no class and is shown all the same"
    assert torch.equal(empty.truth, empty.image)


def test_map_of_a_windowed_encoder_lies_where_the_image_does(tmp_path):
    """Four patches have texture, and they are in four different windows: pruning by variance keeps these four."""
    write_run(tmp_path / "run", detector("variance"))
    pixels = np.full((40, 40, 3), 90, np.uint8)
    pixels[8:24, 24:40] = np.random.default_rng(0).integers(0, 255, (16, 16, 3))
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    file = shown(tmp_path / "run", tmp_path / "maps.npz", "--image", str(tmp_path / "mine.png"))
    after = file["pruned_after"][0].reshape(6, 6)
    assert np.argwhere(after == 0).tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]]
    np.testing.assert_array_equal(file["images"][0, :40, :40], pixels)
