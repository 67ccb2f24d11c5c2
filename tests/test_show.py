"""`python -m cropr show`: the choice of images, what is saved, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from cropr.cli import main
from cropr.commands.show import choose
from cropr.data.layouts import write
from cropr.data.scenes import compose
from cropr.model import build_model
from cropr.records import write_record
from cropr.report.maps import read_maps
from cropr.specs import AugmentSpec, DataSpec, ModelSpec, PruneSpec, ScenesSpec, TrainSpec
from cropr.training.checkpoint import WEIGHTS, save_weights

SCENES = ScenesSpec(image_size=32, train=10, val=30, scale=(2.0, 2.0), distractors=1)


def spec(reducer: str = "cropr") -> TrainSpec:
    data = DataSpec(image_size=32, num_classes=10, crop_pct=1.0, scenes=SCENES, augment=AugmentSpec(hflip=0))
    args = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    schedule = {"constant": {"rate": 0 if reducer == "none" else 4, "first_extra": 0}}
    prune = PruneSpec(reducer=reducer, schedule=schedule, fusion="none")
    return TrainSpec(model=ModelSpec(name="vit_tiny_patch16_224", args=args), prune=prune, data=data)


def write_run(folder, chosen: TrainSpec):
    torch.manual_seed(0)
    model = build_model(chosen.model, chosen.prune, chosen.data.num_classes, chosen.data.image_size)
    save_weights(folder / WEIGHTS, model)
    record = {"kind": "train", "id": chosen.digest(), "spec": chosen.model_dump(mode="json"), "seed": 3}
    write_record(folder / "record.json", record)
    return model.eval()


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
