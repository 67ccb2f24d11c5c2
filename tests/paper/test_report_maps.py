"""Pruning maps of every task: reading, drawing, and what they say in numbers."""

import json
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from workflow.paper.load import load

from workflow.paper import answers, maps, text

mpl.use("agg")


def write_maps(path: Path, **changes) -> Path:
    """Two images of 4 x 4 px on a 2 x 2 grid; the object fills the first patch."""
    masks = np.zeros((2, 4, 4), np.uint8)
    masks[:, :2, :2] = 255
    masks[:, 2:, 2:] = 128
    arrays = {
        "images": np.full((2, 4, 4, 3), 200, np.uint8), "labels": np.array([0, 1]), "predictions": np.array([0, 0]),
        "pruned_after": np.array([[0, 1, 2, 2], [1, 0, 2, 2]]), "grid": np.array([2, 2]), "depth": np.array(3),
        "classes": np.array(["cat", "dog"]), "masks": masks,
    }  # fmt: skip
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_survival_counts_object_and_rest(tmp_path):
    table = maps.survival({"a": maps.read_maps(write_maps(tmp_path / "m.npz"))})
    # Never pruned: the object's patch in the first image; one of the three others in the second.
    assert table.loc["a"].tolist() == [2, 50.0, "images", 50.0, pytest.approx(100 / 6)]
    sentence = text.maps(table, {"a": "Cropr"})
    assert "In all 2 images" in sentence
    assert (
        "**Cropr**: never pruned: 50 % of the object's patches, 17 % of the others; right: 50 % of the images"
        in sentence
    )


def test_maps_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pruning maps"):
        maps.read_maps(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="'grid' is missing"):
        maps.read_maps(write_maps(tmp_path / "a.npz", grid=None))
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        maps.read_maps(write_maps(tmp_path / "b.npz", pruned_after=np.zeros((2, 3), np.int64)))


def test_maps_of_other_images_are_refused(small, tmp_path):
    rows = json.loads(small().read_text())["rows"]
    rows[0]["maps"] = str(write_maps(tmp_path / "a.npz"))
    rows[1]["maps"] = str(write_maps(tmp_path / "b.npz", images=np.zeros((2, 4, 4, 3), np.uint8)))
    with pytest.raises(ValueError, match="row 'cropr' shows other images"):
        maps.load_maps(load(small(rows=rows)))
    rows[1]["maps"] = str(tmp_path / "lost.npz")
    with pytest.raises(FileNotFoundError, match=r"lost\.npz: no maps; make them with: snakemake"):
        maps.load_maps(load(small(rows=rows)))


def test_map_tints_pruned_patches_only(tmp_path):
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", labels=np.array([-1, -1]), masks=None))
    figure = maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"})
    picture, tint = figure.axes[1].get_images()
    assert (picture.get_array() == 200).all()
    alpha = tint.get_array()[..., 3]
    np.testing.assert_array_equal(alpha > 0, np.kron([[0, 1], [1, 1]], np.ones((2, 2))) > 0)
    colours = tint.get_array()[..., :3]
    assert not np.allclose(colours[0, 2], colours[2, 0])  # blocks 1 and 2
    assert figure.axes[1].get_xlabel() == "cat"  # without a label neither right nor wrong


def segmentation_arrays(**changes) -> dict:
    """Two images of 4 x 4 px, classes 0 to 2; the second has a column without labels."""
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[:, :2] = 1
    truth[1, :, 3] = answers.IGNORE
    guess = truth.copy()
    guess[0, 0, 0], guess[1, :, 3] = 2, 0
    arrays = {"task": np.array("segmentation"), "label_maps": truth, "prediction_maps": guess, "labels": None,
              "predictions": None, "masks": None, "classes": np.array(["background", "wall", "bed"])}  # fmt: skip
    return arrays | changes


def detection_arrays(**changes) -> dict:
    """The first image has two objects, of which one is found; the second has none, and a doubtful find."""
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, :2], masks[1, 2:, 2:] = True, True
    arrays = {
        "task": np.array("detection"), "labels": None, "predictions": None, "masks": None,
        "true_image": np.array([0, 0]), "true_boxes": np.array([[0, 0, 2, 2], [2, 2, 4, 4.0]]),
        "true_classes": np.array([0, 1]), "true_masks": masks,
        "predicted_image": np.array([0, 0, 0, 1]), "predicted_classes": np.array([0, 0, 0, 1]),
        "predicted_boxes": np.array([[0, 0, 2, 2.5], [0, 0, 2, 2], [2, 2, 4, 4], [1, 1, 3, 3.0]]),
        "predicted_scores": np.array([0.9, 0.6, 0.8, 0.3]),
    }  # fmt: skip
    return arrays | changes


def test_segmentation_panels_stand_as_in_the_paper(tmp_path):
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **segmentation_arrays()))
    # 32 pixels less 4 without label, one of them wrong.
    assert entry.answers.right() == pytest.approx(100 * 27 / 28)
    figure = maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"})
    heads = [axes.get_title(loc="center") for axes in figure.axes[:4]]
    assert heads == ["input", "Cropr", "prediction", "label"]
    assert figure.axes[2].get_xlabel() == "94 % right"
    assert figure.axes[6].get_xlabel() == "100 % right"
    guess, truth = (figure.axes[i].get_images()[0].get_array() for i in (2, 3))
    tints = answers.palette(entry.classes)
    np.testing.assert_allclose(guess[0, 0], tints[2])
    np.testing.assert_allclose(truth[0, 0], tints[1])
    assert np.unique(figure.axes[7].get_images()[0].get_array()[:, 3].reshape(-1, 3), axis=0).shape == (1, 3)  # grey
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["background", "wall", "bed"]
    mpl.pyplot.close("all")


def test_methods_stand_side_by_side_above_their_predictions(tmp_path):
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **segmentation_arrays()))
    shown = {"a": entry, "b": entry}
    figure = maps.figure(shown, {"a": "A", "b": "B"}, {"a": "cropr", "b": "random"}, images=maps.few(shown))
    heads = [axes.get_title(loc="center") for axes in figure.axes[:12]]
    assert heads == ["input", "A", "B", "label", "prediction", "prediction", *[""] * 6]
    truth, guess = (figure.axes[i].get_images()[0].get_array() for i in (3, 4))
    tints = answers.palette(entry.classes)
    np.testing.assert_allclose(truth[0, 0], tints[1])
    np.testing.assert_allclose(guess[0, 0], tints[2])
    assert [figure.axes[i].get_xlabel() for i in (4, 5, 10, 11)] == ["94 % right"] * 2 + ["100 % right"] * 2
    mpl.pyplot.close("all")


def test_a_picture_without_truth_has_no_label(tmp_path):
    """The user's own: nothing to compare with, and no panel that shows nothing."""
    unknown = np.full((2, 4, 4), answers.IGNORE, np.uint8)
    for arrays in (segmentation_arrays(label_maps=unknown),
                   detection_arrays(true_image=None, true_boxes=None, true_classes=None, true_masks=None)):  # fmt: skip
        entry = maps.read_maps(write_maps(tmp_path / "m.npz", **arrays))
        assert not entry.answers.known
        assert np.isnan(entry.answers.right())
        figure = maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"})
        assert [axes.get_title(loc="center") for axes in figure.axes[:3]] == ["input", "Cropr", "prediction"]
        assert figure.axes[2].get_xlabel() in ("", "3 objects")
        both = maps.figure({"a": entry, "b": entry}, {"a": "A", "b": "B"}, {"a": "cropr", "b": "random"}, images=[0])
        assert not both.axes[3].get_images()
        mpl.pyplot.close("all")


def test_tags_of_objects_lie_within_the_image(tmp_path):
    """At the right border the text ends with the box, at the upper one it stands within."""
    boxes = np.array([[0, 0, 10, 10], [30, 20, 40, 40], [2, 20, 12, 40.0]])
    arrays = detection_arrays(
        images=np.full((1, 40, 40, 3), 200, np.uint8), pruned_after=np.zeros((1, 4), np.int64),
        true_image=np.zeros(3, int), true_classes=np.array([0, 1, 1]), true_boxes=boxes, true_masks=None,
    )  # fmt: skip
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **arrays))
    figure = maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"})
    figure.canvas.draw()
    label = figure.axes[3]
    tags = [tag.get_window_extent() for tag in label.texts]
    frame = label.get_window_extent()
    assert all(frame.x0 <= tag.x0 and tag.x1 <= frame.x1 and tag.y1 <= frame.y1 + 1 for tag in tags)
    assert not any(a.overlaps(b) for i, a in enumerate(tags) for b in tags[:i])
    mpl.pyplot.close("all")


def test_detection_panels_show_what_was_found(tmp_path):
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **detection_arrays()))
    # The second object is covered by a box of another class, the first one by two boxes: one of two is found.
    assert entry.answers.right() == 50.0
    summary = maps.survival({"a": entry})
    assert "right: 50 % of the objects" in text.maps(summary, {"a": "Cropr"})
    figure = maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"})
    prediction, truth = figure.axes[2:4]
    assert (prediction.get_xlabel(), truth.get_xlabel()) == ("found 1 of 2", "2 objects")
    assert [t.get_text() for t in prediction.texts] == ["cat 0.60", "cat 0.80", "cat 0.90"]  # the surest on top
    assert [t.get_text() for t in truth.texts] == ["cat", "dog"]
    shades = [picture.get_array() for picture in truth.get_images()[1:]]
    np.testing.assert_array_equal(shades[0][..., 3] > 0, entry.answers.true.masks[0])
    box = truth.patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (-0.5, -0.5, 2, 2)
    assert figure.axes[6].get_xlabel() == "found 0 of 0"
    assert not figure.axes[6].texts  # too doubtful to be drawn
    mpl.pyplot.close("all")


def test_a_file_without_any_object_is_drawn(tmp_path):
    empty = {f"{side}_{name}": np.zeros(shape) for side in ("true", "predicted")
             for name, shape in (("image", 0), ("boxes", (0, 4)), ("classes", 0))}  # fmt: skip
    arrays = detection_arrays(**empty, true_masks=None, predicted_scores=np.zeros(0))
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **arrays))
    assert np.isnan(entry.answers.right())
    assert maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"}).axes[3].get_xlabel() == "0 objects"
    mpl.pyplot.close("all")


def test_answers_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'label_maps' is missing"):
        maps.read_maps(write_maps(tmp_path / "a.npz", **segmentation_arrays(label_maps=None)))
    with pytest.raises(ValueError, match="task 'depth'; this version draws classification, segmentation, detection"):
        maps.read_maps(write_maps(tmp_path / "b.npz", task=np.array("depth")))
    with pytest.raises(ValueError, match="'true_boxes' is missing"):
        maps.read_maps(write_maps(tmp_path / "c.npz", **detection_arrays(true_boxes=None)))
    with pytest.raises(ValueError, match="true_classes: 1"):
        maps.read_maps(write_maps(tmp_path / "c.npz", **detection_arrays(true_classes=np.array([0]))))
    wrong = np.full((2, 4, 4), 7, np.uint8)
    with pytest.raises(ValueError, match="class 7, but names of 3 classes"):
        maps.read_maps(write_maps(tmp_path / "d.npz", **segmentation_arrays(prediction_maps=wrong)))


def test_every_class_has_a_colour_of_its_own():
    for count in (1, 3, 10, 11, 80, 150):
        tints = answers.palette([f"class {number}" for number in range(count)])
        assert len(tints) == len(set(tints)) == count
    assert answers.palette(["cat", "background"])[0] == answers.palette(["cat"])[0]
    far = answers.palette([f"class {number}" for number in range(150)])
    assert min(np.abs(np.subtract(a, b)).sum() for a, b in pairwise(far)) > 0.3  # neighbours differ
