"""COCO's layout: what is read, what is refused, and what augmentation does to boxes and masks."""

from pathlib import Path

import numpy as np
import pytest
import tiny_coco
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision import tv_tensors

from cropr.data import coco
from cropr.data.annotations import read_annotations
from cropr.data.check import check
from cropr.data.coco import EvalImages, TrainImages, collate, load_coco, read_image, read_masks
from cropr.data.loading import EvalBatches, ImageError
from cropr.tasks.detection import DetDataSpec

SPEC = DetDataSpec(image_size=64, num_classes=3, scale=(0.5, 2.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_coco.write_coco(tmp_path_factory.mktemp("coco"), train=10, val=5)


@pytest.fixture(scope="module")
def splits(root):
    return load_coco(root, 3)


def colours(image: torch.Tensor) -> torch.Tensor:
    """Normalised [3, S, S] back to 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    return (image * std + mean) * 255


def box_of(mask: torch.Tensor) -> torch.Tensor:
    ys, xs = mask.nonzero(as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_ids_with_gaps_become_labels_crowds_are_no_targets_and_empty_images_are_left_out_of_training(root, splits):
    train, val = splits
    assert train.annotations.categories == ((3, "red box"), (7, "green disk"), (90, "blue bar"))
    assert train.annotations.category_ids == (3, 7, 90)
    listed = [a for a in tiny_coco.load(root, "train")["annotations"] if not a["iscrowd"]]
    found = {i.id: i.label for index in range(len(train)) for i in train.instances(index)}
    assert found == {a["id"]: (3, 7, 90).index(a["category_id"]) + 1 for a in listed}
    assert set(found.values()) == {1, 2, 3}
    assert train.annotations.skipped == 0
    assert [len(train.instances(index)) for index in range(10)].count(0) == 2
    assert (len(train), len(TrainImages(train, SPEC, 0))) == (10, 8)
    assert (len(val), len(EvalImages(val, SPEC))) == (5, 5)


def test_all_forms_of_segmentation_give_the_colour_of_the_object(root, splits):
    train, _ = splits
    forms = {a["id"]: a["segmentation"] for a in tiny_coco.load(root, "train")["annotations"]}
    seen = set()
    for index in range(len(train)):
        image, masks = read_image(train, index), read_masks(train, index)
        assert masks.shape == (len(train.instances(index)), *image.shape[-2:])
        for instance, mask in zip(train.instances(index), masks, strict=True):
            assert torch.equal(mask.bool(), (image[instance.label - 1] > 200) & mask.bool())
            assert list(instance.box) == box_of(mask).tolist()
            form = forms[instance.id]
            seen.add("polygon" if isinstance(form, list) else type(form["counts"]).__name__)
    assert seen == {"polygon", "list", "str"}


def test_fingerprint_follows_the_annotations(tmp_path):
    one = coco.fingerprint(load_coco(tiny_coco.write_coco(tmp_path / "one")))
    assert one == coco.fingerprint(load_coco(tiny_coco.write_coco(tmp_path / "same")))
    assert one != coco.fingerprint(load_coco(tiny_coco.write_coco(tmp_path / "other", seed=1)))


def test_a_training_sample_holds_together(splits):
    """Boxes enclose masks, masks lie on the colour of the label, all within the image, nothing in the padding."""
    samples, areas = TrainImages(splits[0], SPEC, seed=0), 0
    for image, target in (samples[epoch, index] for epoch in range(6) for index in range(len(samples))):
        height, width = target["size"]
        boxes, masks, labels = target["boxes"], target["masks"], target["labels"]
        assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
        assert (boxes.shape, boxes.dtype) == ((len(labels), 4), torch.float32)
        assert (masks.shape, masks.dtype, labels.dtype) == ((len(labels), 64, 64), torch.uint8, torch.int64)
        assert max(height, width) <= 64
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        for box, mask, label in zip(boxes, masks, labels, strict=True):
            assert (box - box_of(mask)).abs().max() <= 1
            if mask.sum() > 30:
                inside = colours(image)[:, mask.bool()].mean(dim=1)
                assert inside.argmax() == label - 1
                assert inside[label - 1] > 150
                areas += 1
    assert areas > 40


def test_evaluation_fits_the_longer_side(splits):
    spec = SPEC.model_copy(update={"image_size": 96})
    (images, targets), *_ = EvalBatches(EvalImages(splits[1], spec), 5, collate=collate)
    assert images.shape == (5, 3, 96, 96)
    assert [target["image_id"] for target in targets] == [100, 107, 114, 121, 128]
    assert [target["size"] for target in targets[:3]] == [(72, 96), (96, 72), (96, 96)]
    assert [target["original_size"] for target in targets[:3]] == [(48, 64), (64, 48), (40, 40)]
    assert not images[0, :, 72:].any()
    assert images[0, :, :72].any(dim=0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("factor", "offset", "expected"),
    [
        (1.0, (0.3, 0.7), (0, 0, 50, 100, (32, 64))),  # 0.64 x, all of it seen
        (0.1, (0.9, 0.9), (0, 0, 50, 100, (3, 6))),
        (2.0, (0.0, 0.0), (0, 0, 50, 50, (64, 64))),  # 1.28 x: 64 x 128, the left half
        (2.0, (0.0, 1.0), (0, 50, 50, 50, (64, 64))),
        (4.0, (0.5, 0.5), (12, 38, 25, 25, (64, 64))),  # 2.56 x: 128 x 256
    ],
)
def test_view_window(factor, offset, expected):
    assert tuple(coco.view_window((50, 100), 64, factor, offset)) == expected


def disk(side: int, centre: tuple[int, int], radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and mask of a white disk on black."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2).to(torch.uint8)
    return (255 * mask).expand(3, -1, -1).contiguous(), mask[None]


def view(side: int, image, boxes, masks, scale: float = 1.0, hflip: float = 0.0):
    spec = DetDataSpec(image_size=side, scale=(scale, scale), hflip=hflip)
    return coco.jitter(tv_tensors.Image(image), torch.tensor(boxes), tv_tensors.Mask(masks), spec)


@pytest.mark.parametrize("side", [32, 64, 256, 512])
def test_masks_lie_on_their_objects_at_any_scale(side):
    """Centres of mask and disk agree to an eighth of a pixel, which is half a pixel of the file where four of these
    become one; nearest neighbours by the left upper pixel would be off by up to half a pixel."""
    image, mask = disk(256, (100, 140), 60)
    seen = view(side, image, [[80.0, 40.0, 201.0, 161.0]], mask)
    weights = (seen.image[0].double(), seen.masks[0].double())
    places = torch.arange(side, dtype=torch.float64)
    for axis in (0, 1):
        light, marked = (((weight.sum(dim=1 - axis) * places).sum() / weight.sum()) for weight in weights)
        assert abs(light - marked) < 0.13
    torch.testing.assert_close(seen.boxes[0], torch.tensor([80.0, 40, 201, 161]) * side / 256)


def test_flip_and_box():
    image, mask = disk(64, (20, 10), 8)
    seen = view(64, image, [[2.0, 12.0, 19.0, 29.0]], mask, hflip=1.0)
    assert seen.boxes.tolist() == [[45.0, 12.0, 62.0, 29.0]]
    assert torch.equal(seen.masks[0], mask[0].flip(-1))
    assert torch.equal(seen.image, image.flip(-1))
    with pytest.raises(ValidationError, match="positive and increasing"):
        DetDataSpec(scale=(2.0, 0.1))


def test_a_cut_box_is_drawn_around_what_is_left():
    """An L whose arm is cut off: what is left of its box is wider than what is left of it."""
    mask = torch.zeros(2, 64, 64, dtype=torch.uint8)
    mask[0, 20:60, 50:54] = 1
    mask[0, 56:60, 4:54] = 1
    mask[1, 2:5, 2:5] = 1  # ends outside of the crop
    torch.manual_seed(1)  # the crop: rows 13 to 45, columns 24 to 56
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    seen = view(64, image, [[4.0, 20.0, 54.0, 60.0], [2.0, 2.0, 5.0, 5.0]], mask, scale=2.0)
    assert seen.kept.tolist() == [True, False]
    left, _, right, bottom = box_of(seen.masks[0]).tolist()
    assert seen.boxes.tolist() == [box_of(seen.masks[0]).tolist()]
    assert bottom == 64  # cut at the bottom, and only the upright beam is left, four pixels enlarged to eight
    assert right - left == 8


def edit(root: Path, change, split: str = "train") -> Path:
    """Change the annotations of a fresh set in place."""
    tiny_coco.write_coco(root, train=3, val=3)
    content = tiny_coco.load(root, split)
    change(content)
    return tiny_coco.save(root, split, content)


def first(content, **changes):
    content["annotations"][0].update(changes)


WRONG = {
    "annotation 1: image_id 999": lambda c: first(c, image_id=999),
    "annotation 1: category_id 4": lambda c: first(c, category_id=4),
    "annotation 1: bbox is .*four numbers": lambda c: first(c, bbox=[1, 2, 3]),
    "annotation 1: bbox is .*nan": lambda c: first(c, bbox=[1, 2, 3, float("nan")]),
    "annotation 1: iscrowd is None": lambda c: c["annotations"][0].pop("iscrowd"),
    "annotation 1: area is 'large'": lambda c: first(c, area="large"),
    "annotation 1: segmentation is neither": lambda c: first(c, segmentation=None),
    "annotation 1: segmentation: a polygon is": lambda c: first(c, segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
    r"annotation 1: segmentation has size \[1, 1\]": lambda c: first(c, segmentation={"size": [1, 1], "counts": [1]}),
    r"annotations\[1\]: id 1 was there before": lambda c: c["annotations"][1].update(id=1),
    r"annotations\[0\]: its id is '1'": lambda c: first(c, id="1"),
    r"images\[2\]: id 100 was there before": lambda c: c["images"][2].update(id=100),
    "image 100: file_name is None": lambda c: c["images"][0].pop("file_name"),
    "image 100: height 0": lambda c: c["images"][0].update(height=0),
    "missing.png: no such file; .*lists it as image 100": lambda c: c["images"][0].update(file_name="missing.png"),
    "lists no annotation": lambda c: c["annotations"].clear(),
    "different categories": lambda c: c["categories"].append({"id": 91, "name": "more"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_file_and_the_id(tmp_path, message):
    path = edit(tmp_path, WRONG[message])
    with pytest.raises(ValueError, match=message) as raised:
        load_coco(tmp_path)
    assert path.name in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the file is empty"), ("{", "not JSON"), ("[]", "no list 'images'"), ('{"images": []}', "no list 'annot")],
)
def test_a_file_that_is_no_annotation_file(tmp_path, text, message):
    path = tiny_coco.save(tmp_path, "train", text)
    with pytest.raises(ValueError, match=message) as raised:
        read_annotations(path)
    assert str(raised.value).startswith(str(path))


def test_what_is_missing_is_named(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_coco(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 3 categories, the settings say 80; set num_classes to 3"):
        load_coco(root, 80)
    tiny_coco.write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_val2017.json: no such file"):
        load_coco(tmp_path)


def test_instances_without_area_are_skipped_and_counted(tmp_path):
    """No width, outside of the image, no polygon, a polygon of two points; a box that reaches out is clipped."""

    def change(content):
        like, width = content["annotations"][0], content["images"][0]["width"]
        odd = [{"bbox": [5, 5, 0, 4]}, {"bbox": [width, 5, 4, 4]}, {"segmentation": []}]
        odd += [{"segmentation": [[1, 1, 2, 2]]}, {"bbox": [-3, 5, 10, 4]}]
        content["annotations"] += [{**like, "id": 50 + number, **changes} for number, changes in enumerate(odd)]

    annotations, problems = read_annotations(edit(tmp_path, change))
    assert (problems, annotations.skipped) == ([], 4)
    assert {i.id: i.box for i in annotations.instances[100] if i.id >= 50} == {54: (0, 5, 7, 9)}


def test_training_needs_an_instance_and_an_image_of_another_size_is_named(tmp_path):
    edit(tmp_path, lambda content: [a.update(iscrowd=1) for a in content["annotations"]])
    with pytest.raises(ValueError, match=r"instances_train2017.json: no image has an instance"):
        TrainImages(load_coco(tmp_path)[0], SPEC, 0)
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "val2017" / f"{107:012d}.png")
    with pytest.raises(ImageError, match=r"000107.png: is 20 x 30 px; .*says 48 x 64 of image 107"):
        list(EvalBatches(EvalImages(load_coco(tmp_path)[1], SPEC), 2, collate=collate))


def test_the_check_reads_everything(tmp_path):
    """A broken image, a broken code and a wrong id at once; and nothing to say of a good set."""
    tiny_coco.write_coco(tmp_path, train=3, val=3)
    good = check(tmp_path, 3, "coco")
    assert good.problems == good.bad == good.notes == ()
    (tmp_path / "train2017" / f"{100:012d}.png").write_bytes(b"no image")
    content = tiny_coco.load(tmp_path, "val")
    size = [content["images"][0]["height"], content["images"][0]["width"]]
    first(content, segmentation={"size": size, "counts": ["x"]})
    content["annotations"][1].update(image_id=5)
    tiny_coco.save(tmp_path, "val", content)
    ticks = []
    report = check(tmp_path, 3, "coco", progress=lambda done, total: ticks.append((done, total)))
    assert ticks[-1] == (6, 6)
    assert (report.classes, report.images, len(report.problems)) == (3, {"train": 3, "val": 3}, 2)
    assert "annotation 1: segmentation" in report.problems[0]
    assert "image_id 5" in report.problems[1]
    assert "000100.png" in report.bad[0]
