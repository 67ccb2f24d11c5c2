"""What the report draws: relevance curves, pruning maps, figures, and the page that joins everything."""

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from synthetic import write_results, write_small

from cropr.report import answers, figures, labels, maps, page, relevance, style, text
from cropr.report.load import load
from cropr.report.names import row_names

mpl.use("agg")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(tmp_path):
    """Writes a small manifest and its records; see ``write_small``."""
    return partial(write_small, tmp_path)


@pytest.fixture(scope="module")
def ci(tmp_path_factory):
    """All artefacts of the real grid at the smallest scale, with made-up numbers: one seed, and three."""
    return {
        seeds: {name: load(path) for name, path in write_results(tmp_path_factory.mktemp("ci"), "ci", seeds).items()}
        for seeds in (1, 3)
    }


# Relevance ----------------------------------------------------------------------------------------------------------


def test_relevance_curves_start_at_the_input(small):
    artefact = load(small())
    table = relevance.curves(artefact)
    assert set(table["row"]) == {"cropr", "random"}
    kept = table[(table["row"] == "cropr") & (table["measure"] == "kept_on_object")]
    assert kept["block"].tolist() == [0, 2]
    assert kept["mean"].tolist() == [20.0, 60.0]
    assert relevance.chance(artefact) == 20.0
    assert relevance.last_block(table).index.tolist() == ["cropr", "random"]


def test_relevance_sentence(small):
    sentence = text.relevance(load(small()))
    assert sentence.startswith("20 % of all patches lie on the object. Of those kept after block 2, the shares")
    assert "Cropr 60 [60, 60] %, Random 20 [20, 20] %" in sentence
    assert sentence.endswith("Clearly above chance: Cropr; clearly below: none.")


# Maps ---------------------------------------------------------------------------------------------------------------


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
    assert "In these 2 images" in sentence
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
    assert figure.axes[2].get_xlabel() == "94 % of the pixels"
    assert figure.axes[6].get_xlabel() == "100 % of the pixels"
    guess, truth = (figure.axes[i].get_images()[0].get_array() for i in (2, 3))
    tints = answers.palette(entry.classes)
    np.testing.assert_allclose(guess[0, 0], tints[2])
    np.testing.assert_allclose(truth[0, 0], tints[1])
    assert np.unique(figure.axes[7].get_images()[0].get_array()[:, 3].reshape(-1, 3), axis=0).shape == (1, 3)  # grey
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["background", "wall", "bed"]  # by pixels
    mpl.pyplot.close("all")


def test_methods_have_a_prediction_each_and_one_truth(tmp_path):
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **segmentation_arrays()))
    figure = maps.figure({"a": entry, "b": entry}, {"a": "A", "b": "B"}, {"a": "cropr", "b": "random"}, images=[1])
    heads = [axes.get_title(loc="center") for axes in figure.axes[:6]]
    assert heads == ["input", "A", "prediction", "B", "prediction", "label"]
    mpl.pyplot.close("all")


def test_detection_panels_show_what_was_found(tmp_path):
    entry = maps.read_maps(write_maps(tmp_path / "m.npz", **detection_arrays()))
    # The second object is covered by a box of another class, the first one by two boxes: one of two is found.
    assert entry.answers.right() == 50.0
    summary = maps.survival({"a": entry})
    assert "right: 50 % of the objects" in text.maps(summary, {"a": "Cropr"})
    figure = maps.figure({"a": entry}, {"a": "Cropr"}, {"a": "cropr"})
    prediction, truth = figure.axes[2:4]
    assert (prediction.get_xlabel(), truth.get_xlabel()) == ("1 of 2 objects", "2 objects")
    assert [t.get_text() for t in prediction.texts] == ["cat 0.60", "cat 0.80", "cat 0.90"]  # the surest on top
    assert [t.get_text() for t in truth.texts] == ["cat", "dog"]
    shades = [picture.get_array() for picture in truth.get_images()[1:]]
    np.testing.assert_array_equal(shades[0][..., 3] > 0, entry.answers.true.masks[0])
    box = truth.patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (-0.5, -0.5, 2, 2)
    assert figure.axes[6].get_xlabel() == "0 of 0 objects"
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


# Figures ------------------------------------------------------------------------------------------------------------


def draw_all(artefacts) -> dict[str, Figure]:
    methods, shown = artefacts["imagenet_methods"], artefacts["pruning_maps"]
    found = maps.load_maps(shown)
    return {
        "trade_off": figures.trade_off(methods),
        "speed": figures.speed_against_bound(methods),
        "tokens": figures.tokens(methods),
        "forest": figures.forest(artefacts["ablations"]),
        "relevance": relevance.figure(artefacts["relevance"]),
        "maps": maps.figure(found, row_names(shown), {row: shown.reducer(row) for row in found}, images=[0]),
    }


def test_figures_have_labelled_axes(ci):
    drawn = draw_all(ci[3])
    for name in ("trade_off", "speed", "tokens", "forest", "relevance"):
        for axes in drawn[name].axes:
            assert axes.get_xlabel(), name
    mpl.pyplot.close("all")


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_seed_is_drawn_without_interval(ci, seeds):
    figure = figures.forest(ci[seeds]["ablations"])
    # An interval is a horizontal line between two points; reference lines are vertical.
    ends = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    whiskers = [y for y in ends if y[0] == y[1]]
    assert bool(whiskers) == (seeds == 3)
    legend = " ".join(entry.get_text() for entry in figure.legends[0].get_texts())
    assert ("no interval" in legend) == (seeds == 1)
    assert ("single seeds" in legend) == (seeds == 3)
    dots = [points for collection in figure.axes[0].collections for points in collection.get_offsets()]
    assert len(dots) == (0 if seeds == 1 else 3 * 10)  # every variant and seed
    assert figure.axes[0].get_xlabel().startswith("Top-1 minus that of")
    mpl.pyplot.close("all")


def test_figures_without_records(small):
    artefact = load(small(rows=json.loads(small().read_text())["rows"][-1:], published=None))
    for figure in (figures.trade_off(artefact), figures.speed_against_bound(artefact), figures.forest(artefact),
                   figures.tokens(artefact), relevance.figure(artefact), maps.figure({}, {}, {})):  # fmt: skip
        words = " ".join(t.get_text() for axes in figure.axes for t in axes.texts)
        assert re.search(r"at this scale|nothing published", words)
    mpl.pyplot.close("all")


def test_saved_figures_are_the_same_bytes(tmp_path):
    found = []
    for folder in ("a", "b"):
        figure, axes = mpl.pyplot.subplots(figsize=(2, 1))
        axes.plot([1, 2], label="a")
        path = style.save(figure, tmp_path / folder, "forest")
        found.append((path.read_bytes(), path.with_suffix(".pdf").read_bytes()))
    assert found[0] == found[1]
    assert b"CreationDate" not in found[0][1]
    assert sorted(p.name for p in (tmp_path / "a" / "figures").iterdir()) == ["forest.pdf", "forest.png"]
    mpl.pyplot.close("all")


def test_settings_of_matplotlib_are_left_alone(small):
    before = dict(mpl.rcParams)
    figures.tokens(load(small()))
    assert dict(mpl.rcParams) == before
    mpl.pyplot.close("all")


def test_every_method_has_its_own_look():
    looks = [(style.colour(name), style.marker(name)) for name in style.COLOURS]
    assert len(set(looks)) == len(looks)
    first = [style.colour(name) for name in ("none", "cropr", "random", "variance", "attn_topk", "non_salient")]
    assert len(set(first)) == 6
    assert style.COLOURS.keys() == style.MARKERS.keys()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([1.0, 5.0], [1.0, 5.0]),
        ([1.0, 1.0], [0.5, 1.5]),
        ([2.0, 1.0, 1.5], [2.5, 0.5, 1.5]),
        ([0.0, 0.9, 1.8], [-0.1, 0.9, 1.9]),
        ([], []),
    ],
)
def test_labels_are_spread_as_little_as_needed(positions, expected):
    assert labels.spread(positions, 1.0) == pytest.approx(expected)


def test_point_labels_do_not_overlap():
    with style.style():
        figure, axes = mpl.pyplot.subplots(figsize=(6, 4))
        axes.set(xlim=(0, 1), ylim=(0, 1))
        labels.place_labels(axes, [(0.5, 0.5 + 0.01 * i, f"a long label {i}", "black") for i in range(4)])
    boxes = [t.get_window_extent() for t in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    mpl.pyplot.close(figure)


# The page -----------------------------------------------------------------------------------------------------------


def test_page_is_offline_and_says_what_the_records_say(ci, tmp_path):
    artefacts = ci[3]
    results = artefacts["ablations"].manifest.results
    for folder in ("notebooks", "figures"):
        (results / folder).mkdir(exist_ok=True)
    Image.new("RGB", (1200, 2000)).save(results / "figures" / "ablations_forest.png")
    (results / "notebooks" / "ablations.html").write_text("<p>here</p>")
    manifests = [str(results / "manifests" / f"{name}.json") for name in artefacts]
    out = results / "report.html"
    assert page.main(["--manifests", *manifests, "--claims", str(ROOT / "config/claims.yaml"), "--out", str(out)]) == 0
    html = out.read_text()
    assert not re.search(r"<(script|link|iframe)|@import|url\(", html)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    allowed = ("data:image/png;base64,", "#", "notebooks/", "figures/", "https://arxiv.org/")
    assert all(source.startswith(allowed) for source in sources)
    assert "notebooks/ablations.html" in sources
    assert "notebooks/relevance.html" not in sources  # not made: no dead link
    assert "The upper part." in html  # 1000 x 1667 px are more than a thumbnail has
    for artefact in artefacts.values():
        assert artefact.manifest.title in html
    assert "✓ holds" in html
    assert "10 min 10 s" in html
    assert "scale=ci seeds=3" in html
    assert "{{" not in html
    assert "**" not in html


def test_page_lists_every_record_once(ci):
    artefacts = list(ci[1].values())
    runs = page.inventory(artefacts)
    paths = {str(p) for a in artefacts for row in a.manifest.rows for p in [*row.records, *filter(None, [row.bench])]}
    results = artefacts[0].manifest.results
    assert sorted(str(results / run["path"]) for run in runs) == sorted(paths)
    shared = [run for run in runs if "imagenet_methods: Cropr (R=8, LLF)" in run["all_rows"]]
    assert [run["kind"] for run in shared] == ["training", "throughput"]
    assert shared[0]["rows"] == "Cropr (R=8, LLF) and 3 more"


def test_page_refuses_two_scales(small, ci, tmp_path, caplog):
    other = ci[1]["ablations"].manifest.results / "manifests" / "ablations.json"
    out = tmp_path / "report.html"
    assert page.main(["--manifests", str(small()), str(other), "--out", str(out)]) == 2
    assert "one scale" in caplog.text
    assert not out.exists()
