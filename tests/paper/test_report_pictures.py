"""What the report draws: relevance curves, figures, and the page that joins everything. Maps: test_report_maps."""

import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from PIL import Image
from workflow.paper.load import load
from workflow.paper.names import row_names

from workflow.paper import figures, labels, maps, page, relevance, style, text

mpl.use("agg")
ROOT = Path(__file__).parents[2]


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
