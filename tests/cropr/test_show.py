"""`python -m cropr show`: the choice of images, what is saved, and what is refused."""

import numpy as np
import pytest
import tiny_coco
import tiny_detector
import torch
from PIL import Image
from torch import nn

from cropr.cli import main
from cropr.cli.show import choose, show
from cropr.data.ade20k import IGNORE
from cropr.data.layouts import write
from cropr.data.scenes import OBJECT, compose
from cropr.records import write_record
from cropr.specs import ModelSpec, PruneSpec, ScenesSpec
from cropr.tasks.classification import AugmentSpec, DataSpec
from cropr.tasks.segmentation import SegDataSpec
from cropr.tasks.views import detection, open_view
from cropr.tasks.views.base import rarest
from cropr.training.checkpoint import WEIGHTS, load_weights, save_weights
from cropr.training.specs import TrainSpec
from workflow.paper.maps import read_maps

SCENES = ScenesSpec(image_size=32, train=10, val=30, scale=(2.0, 2.0), distractors=1)


def spec(reducer: str = "cropr") -> TrainSpec:
    data = DataSpec(image_size=32, num_classes=10, crop_pct=1.0, scenes=SCENES, augment=AugmentSpec(hflip=0))
    args = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    schedule = {"constant": {"rate": 0 if reducer == "none" else 4, "first_extra": 0}}
    prune = PruneSpec(reducer=reducer, schedule=schedule, fusion="none")
    return TrainSpec(model=ModelSpec(name="vit_tiny_patch16_224", args=args), prune=prune, data=data)


def segmenter(reducer: str = "cropr", **data) -> TrainSpec:
    """16 patches, of which 6 go after each of the first two blocks; all come back."""
    args = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return TrainSpec(
        task="segmentation",
        model=ModelSpec(name="eva02_tiny_patch14_224", args=args),
        prune=PruneSpec(reducer=reducer, schedule={"stages": {"at": {1: 6, 2: 6}}}, fusion="llf"),
        data=SegDataSpec(**{"image_size": 32, "num_classes": 11, "scenes": SCENES, **data}),
    )


def detector(reducer: str = "cropr") -> TrainSpec:
    """40 px on a canvas of 48: 36 patches, 16 after the first block, 4 after the second, in windows of 2 x 2."""
    return TrainSpec(
        task="detection",
        model=ModelSpec(name=tiny_detector.HOSTS["eva"], args=tiny_detector.SHAPE),
        prune=PruneSpec(reducer=reducer, schedule={"squares": {"at": {1: 4, 2: 2}}}, fusion="llf"),
        data={"image_size": 40, "num_classes": 3},
        detector=tiny_detector.detector_spec(min_score=0.0),
    )


def write_run(folder, chosen: TrainSpec):
    """A run's record and weights, random but not faint; returns the model."""
    torch.manual_seed(0)
    model = open_view(chosen).model
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "queries" not in name:
            nn.init.normal_(parameter, std=0.2)
    save_weights(folder / WEIGHTS, model)
    record = {"kind": "train", "id": chosen.digest(), "spec": chosen.model_dump(mode="json"), "seed": 3}
    write_record(folder / "record.json", record)
    return model


def shown(run, out, *more: str):
    """The verb's file, read."""
    assert main(["show", "--run", str(run), "--out", str(out), *more]) == 0
    return read_maps(out)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write(SCENES, root)
    return root


def test_choice_is_spread_over_classes_and_images():
    labels = [0] * 10 + [1] * 10 + [2] * 10
    assert choose(labels, 3) == [0, 10, 20]
    assert choose(labels, 6) == [0, 10, 20, 5, 15, 25]
    assert sorted(choose([0, 1, 1, 1], 4)) == [0, 1, 2, 3]
    assert choose([0, 1], 5) == [0, 1]


def test_fewer_images_than_classes_take_evenly_spaced_classes():
    labels = [label for label in range(10) for _ in range(4)]
    assert [labels[i] for i in choose(labels, 5)] == [0, 2, 4, 6, 8]


def test_images_that_stand_for_no_class_come_last():
    assert choose([-1, 0, -1, 1], 2) == [1, 3]
    assert choose([-1, 0, -1, 1], 3) == [1, 3, 0]
    assert choose([0, -1, 0, 0, 1], 4) == [0, 4, 2, 3]
    assert choose([-1, -1], 1) == [0]


def test_an_image_stands_for_its_rarest_class():
    assert rarest([{0, 1}, {0, 2}, {0, 2}, {0}, set()]) == [1, 2, 2, 0, -1]
    assert rarest([{4, 7}]) == [4]


def test_choice_refuses_nothing():
    with pytest.raises(ValueError, match="--images 0"):
        choose([0, 1], 0)


def test_saves_what_the_model_saw_and_did(tmp_path, scenes):
    model = write_run(tmp_path / "run", spec())
    out = tmp_path / "deep" / "maps.npz"
    assert (
        main(["show", "--run", str(tmp_path / "run"), "--data", str(scenes), "--images", "4", "--out", str(out)]) == 0
    )
    maps = read_maps(out)
    assert maps.grid == (4, 4)
    assert maps.depth == 3
    assert maps.classes == tuple(f"digit_{label}" for label in range(10))
    assert maps.answers.labels.tolist() == [0, 2, 5, 7]
    # 16 patches, 4 pruned after blocks 1 and 2, none after the last.
    for after in maps.pruned_after:
        assert np.bincount(after, minlength=3).tolist() == [8, 4, 4]
    truth = compose(SCENES, "val", 2)  # the first validation image of class 2
    np.testing.assert_array_equal(maps.images[1], truth.image)
    np.testing.assert_array_equal(maps.masks[1], truth.mask)
    data = spec().data
    pixels = torch.from_numpy(truth.image).permute(2, 0, 1) / 255
    image = (pixels - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    with torch.inference_mode():
        output = model(image[None])
    assert maps.answers.predictions[1] == int(output.logits.argmax())
    np.testing.assert_array_equal(maps.pruned_after[1], output.pruned_after(16)[0].numpy())


@pytest.mark.parametrize("reducer", ["random", "none"])
def test_same_file_content_again(tmp_path, scenes, reducer):
    write_run(tmp_path / "run", spec(reducer))
    found = []
    for name in ("a.npz", "b.npz"):
        argv = ["show", "--run", str(tmp_path / "run"), "--data", str(scenes), "--images", "2", "--out"]
        assert main([*argv, str(tmp_path / name)]) == 0
        found.append(read_maps(tmp_path / name))
    np.testing.assert_array_equal(found[0].pruned_after, found[1].pruned_after)
    assert (found[0].pruned_after == 0).all() == (reducer == "none")


def test_picture_of_the_users_own(tmp_path):
    write_run(tmp_path / "run", spec())
    Image.new("RGB", (50, 40), "red").save(tmp_path / "mine.jpg")
    picture, out = tmp_path / "pictures" / "mine.png", tmp_path / "mine.npz"
    argv = ["show", "--run", str(tmp_path / "run"), "--image", str(tmp_path / "mine.jpg"), "--out", str(out)]
    assert main([*argv, "--picture", str(picture)]) == 0
    maps = read_maps(out)
    assert maps.images.shape == (1, 32, 32, 3)
    assert maps.answers.labels.tolist() == [-1]
    assert maps.masks is None
    with Image.open(picture) as image:
        assert image.width > 200


def test_refusals(tmp_path, scenes, caplog):
    write_run(tmp_path / "run", spec())
    base = ["show", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.npz")]
    for more, message in (
        ([], "name what to show"),
        (["--image", str(tmp_path / "no.jpg")], "no such file"),
        (["--data", str(scenes), "--images", "0"], "--images 0"),
        (["--data", str(tmp_path / "nowhere")], "no such directory"),
    ):
        caplog.clear()
        assert main([*base, *more]) == 2
        assert message in caplog.text
    caplog.clear()
    assert main(["show", "--run", str(tmp_path), "--data", str(scenes), "--out", str(tmp_path / "x.npz")]) == 2
    assert "no record" in caplog.text
    assert not (tmp_path / "x.npz").exists()


# Segmentation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def label_maps(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade20k")
    write(SCENES, root, "ade20k")
    return root


def test_segmentation_from_record_to_picture(tmp_path, label_maps):
    model = write_run(tmp_path / "run", segmenter())
    more = ["--data", str(label_maps), "--images", "3", "--picture", str(tmp_path / "maps.png")]
    maps = shown(tmp_path / "run", tmp_path / "maps.npz", *more)
    assert maps.classes == ("background", *(f"digit_{digit}" for digit in range(10)))
    assert maps.grid == (4, 4)
    for after in maps.pruned_after:
        assert np.bincount(after, minlength=3).tolist() == [4, 6, 6]
    # Digits 0, 3 and 6, the first image of each: the background, which all of them show, is no class to choose by.
    for position, index in enumerate((0, 3, 6)):
        truth = compose(SCENES, "val", index)
        np.testing.assert_array_equal(maps.images[position], truth.image)
        np.testing.assert_array_equal(maps.answers.labels[position], truth.semantic - 1)
        np.testing.assert_array_equal(maps.masks[position] == OBJECT, truth.mask == OBJECT)
        image = (torch.from_numpy(truth.image).permute(2, 0, 1) / 255 - 0.5) / 0.5
        with torch.inference_mode():
            output = model(image[None])
        np.testing.assert_array_equal(maps.answers.predictions[position], output.logits[0].argmax(dim=0).numpy())
        np.testing.assert_array_equal(maps.pruned_after[position], output.pruned_after(16)[0].numpy())
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width > 800  # input, map, prediction, label


def test_a_photo_is_shrunk_into_one_window(tmp_path):
    """Twice as wide as high: the lower half of the window is padding, which has neither label nor prediction."""
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        for split in ("training", "validation"):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            pixels = np.zeros((64, 128, 3) if mode == "RGB" else (64, 128), np.uint8)
            pixels[:, 64:] = 2
            Image.fromarray(pixels, mode).save(folder / "a.png")
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t9\twall      \n2\t0.1\t9\t9\tbuilding, edifice\n"
    (tmp_path / "data" / "objectInfo150.txt").write_text(table)
    write_run(tmp_path / "run", segmenter(num_classes=2, scenes=None))
    maps = shown(tmp_path / "run", tmp_path / "maps.npz", "--data", str(tmp_path / "data"), "--images", "1")
    assert maps.classes == ("wall", "building")
    assert maps.masks is None
    labels, guess = maps.answers.labels[0], maps.answers.predictions[0]
    assert (labels[:16, :16] == IGNORE).all()  # 0 in the file
    assert (labels[:16, 16:] == 1).all()
    assert (labels[16:] == IGNORE).all()
    assert (guess[16:] == IGNORE).all()
    assert (guess[:16] < 2).all()
    assert (maps.images[0, 16:] == 128).all()  # the mean colour


# Detection ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tiny_coco.write_coco(tmp_path_factory.mktemp("coco"), train=1, val=5)


def test_detection_from_record_to_picture(tmp_path, objects, monkeypatch):
    monkeypatch.setattr(detection, "SAVED_SCORE", 0.0)
    model = write_run(tmp_path / "run", detector())
    more = ["--data", str(objects), "--images", "3", "--picture", str(tmp_path / "maps.png")]
    maps = shown(tmp_path / "run", tmp_path / "maps.npz", *more)
    assert maps.classes == tuple(tiny_coco.CATEGORIES.values())
    assert maps.images.shape == (3, 48, 48, 3)
    assert maps.grid == (6, 6)
    true, found = maps.answers.true, maps.answers.predicted
    for box, mask in zip(true.boxes, true.masks, strict=True):  # boxes are those of the masks, both moved alike
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(box, around, atol=1)
    # Objects are bright in the colour of their class, wherever the image was resized and padded to.
    for number, label in enumerate(true.classes):
        inside = maps.images[true.image[number]][true.masks[number]].mean(axis=0)
        assert inside.argmax() == label
        assert inside[label] > 150
    joined = np.stack([true.masks[true.image == index].any(axis=0) for index in range(3)])
    np.testing.assert_array_equal(maps.masks == OBJECT, joined)
    view = open_view(detector(), objects)
    view.model = model
    sample = view.validation(choose(view.labels(), 3)[1])
    with torch.inference_mode():
        output = model(sample.image[None], sizes=[sample.size])
    assert len(output.detections[0].scores) > 0
    mine = found.image == 1
    np.testing.assert_allclose(found.scores[mine], output.detections[0].scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.boxes[mine], output.detections[0].boxes.numpy(), atol=1e-3)
    np.testing.assert_array_equal(found.classes[mine] + 1, output.detections[0].labels.numpy())
    assert found.masks.shape == (len(found.boxes), 48, 48)
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width > 800


def test_an_image_without_objects_stands_for_no_class_and_is_shown_all_the_same(objects):
    view = open_view(detector(), objects)
    assert view.labels()[4] == -1
    samples = [view.validation(index) for index in (4, 0)]
    arrays = show(view, samples, 0, torch.device("cpu"))
    assert set(arrays["true_image"].tolist()) == {1}
    assert not arrays["masks"][0].any()


@pytest.mark.parametrize("reducer", ["cropr", "random", "variance"])
def test_windows_prune_every_patch_once_or_never(tmp_path, objects, reducer):
    """Survivors travel in chunks of windows; kept and pruned ones still make up all patches of the raster."""
    view = open_view(detector(reducer), objects)
    write_run(tmp_path / "run", view.spec)
    load_weights(view.model, tmp_path / "run" / WEIGHTS)
    reductions = []
    for module in view.model.reducers.values():
        module.register_forward_hook(lambda module, inputs, reduction: reductions.append(reduction))
    maps = show(view, [view.validation(index) for index in range(4)], 0, torch.device("cpu"))
    for after, first, second in zip(maps["pruned_after"], reductions[::2], reductions[1::2], strict=True):
        parts = [second.kept.index[0], first.pruned.index[0], second.pruned.index[0]]
        assert [len(part) for part in parts] == [4, 20, 12]
        assert torch.cat(parts).sort().values.tolist() == list(range(36))
        for block, part in enumerate(parts):
            assert set(np.flatnonzero(after == block)) == set(part.tolist())


def test_map_of_a_windowed_encoder_lies_where_the_image_does(tmp_path):
    """Four patches have texture, and they are in four different windows: pruning by variance keeps these four."""
    write_run(tmp_path / "run", detector("variance"))
    pixels = np.full((40, 40, 3), 90, np.uint8)
    pixels[8:24, 24:40] = np.random.default_rng(0).integers(0, 255, (16, 16, 3))
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    maps = shown(tmp_path / "run", tmp_path / "maps.npz", "--image", str(tmp_path / "mine.png"))
    after = maps.pruned_after[0].reshape(6, 6)
    assert np.argwhere(after == 0).tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]]
    np.testing.assert_array_equal(maps.images[0, :40, :40], pixels)


@pytest.mark.parametrize("spec_of", [segmenter, detector])
def test_pictures_of_the_users_own_need_no_data(tmp_path, spec_of):
    """Other sizes and forms; no truth, so no label panel."""
    write_run(tmp_path / "run", spec_of())
    for name, size in (("a.png", (50, 40)), ("b.jpg", (30, 90))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    more = [word for name in ("a.png", "b.jpg") for word in ("--image", str(tmp_path / name))]
    maps = shown(tmp_path / "run", tmp_path / "maps.npz", *more, "--picture", str(tmp_path / "maps.png"))
    assert len(maps.images) == 2
    assert not maps.answers.known
    assert maps.masks is None
    assert len(maps.classes) == spec_of().data.num_classes
    assert (tmp_path / "maps.png").stat().st_size > 0
