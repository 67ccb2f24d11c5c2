"""Tables, figures and sentences of the laboratory's notebooks, on records with made-up numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import lab_tiny
import matplotlib.pyplot as plt
import pytest

from workflow.paper import lab_figures, lab_tables, lab_text, setting
from workflow.paper.lab_load import UNPRUNED, variant_names, with_cells
from workflow.paper.load import Artefact, load
from workflow.paper.page import inventory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def artefact(request, tmp_path):
    return with_cells(load(lab_tiny.write_lab(tmp_path, request.param)))


def of(name):
    return pytest.mark.parametrize("artefact", [name], indirect=True)


@pytest.fixture
def empty(tmp_path):
    found = load(lab_tiny.write_lab(tmp_path, "profile"))
    return with_cells(Artefact(found.manifest, {}, {}, found.published, found.frame, found.root))


# Cells ---------------------------------------------------------------------------------------------------------------


@of("precision")
def test_a_line_for_every_cell_with_kinds_apart(artefact):
    frame = artefact.frame
    assert len(frame) == 4 * 3 + 3
    assert frame.index.is_unique
    line = frame.loc["vit_l_224/cropr_llf/bf16/flash/4"]
    assert line["name"] == "Cropr, R=3, LLF"
    assert line["tokens"] == "17 to 7"
    assert line["speedup.measured"] == pytest.approx(1.7)
    assert line["speedup.bound"] == pytest.approx(1.78)
    assert line["share_of_bound.measured"] == pytest.approx(170 / 1.78)
    assert line["gain.low"] == pytest.approx(0.97 * 1.7 * 2.6)
    assert line["share_of_bound.low"] == pytest.approx(0.98 * 170 / 1.78)
    assert line["mfu.measured"] == pytest.approx(50)
    assert line["gmacs.predicted"] == pytest.approx(60 / 1.7)
    assert "gmacs.measured" not in frame
    assert not [column for column in frame if "iqr" in column]
    assert frame.loc["vit_l_224/unpruned/fp32/cudnn/4", "why"] == "attention cudnn: no such kernel here"


def test_variants_that_differ_in_alignment_alone_keep_their_own_names():
    odd = {"reducer": "cropr", "fusion": "none", "schedule": {"constant": {"rate": 8, "first_extra": 0}}}
    even = odd | {"schedule": {"constant": {"rate": 8, "first_extra": 1}}}
    fused = even | {"fusion": "llf"}
    assert variant_names({"odd": odd, "as_paper": even, "fused": fused}) == {
        UNPRUNED: UNPRUNED,
        "odd": "Cropr, R=8 (odd)",
        "as_paper": "Cropr, R=8 (as paper)",
        "fused": "Cropr, R=8, LLF",
    }


@of("breakeven")
def test_scope_speaks_of_times_and_not_of_accuracy(artefact):
    assert setting.scope(artefact).startswith("Times and memory")


@of("breakeven")
def test_what_other_pages_say_of_these_records(artefact):
    assert "64 px, random weights, batches of 1, 8" in setting.setting(artefact)
    lines = inventory([artefact])
    assert [(line["kind"], line["result"]) for line in lines] == [("laboratory", "")] * 2


# Tables --------------------------------------------------------------------------------------------------------------


@of("precision")
def test_table_of_a_sweep(artefact):
    table = lab_tables.sweep_table(artefact, ("images_per_s", "speedup", "gain"))
    assert list(table.heads) == [
        "name", "precision", "attention", "tokens", "measured.images_per_s", "measured.speedup", "measured.gain",
        "bound",
    ]  # fmt: skip
    assert table.spanners == {
        "Measured": ["measured.images_per_s", "measured.speedup", "measured.gain"],
        "Bound": ["bound"],
    }
    text = table.markdown()
    assert "| Cropr, R=3, LLF | bf16 | flash | 17 to 7 | 8.84 | 1.70 [1.67, 1.73] | 4.42 [4.29, 4.55] | 1.78 |" in text
    assert text.count("not measured: attention cudnn: no such kernel here") == 3
    assert table.html()


@of("precision")
def test_table_shows_a_batch_that_was_halved(artefact):
    artefact.frame["fitted"] = 2
    artefact.frame.loc[artefact.frame.index[0], "batch_size"] = 8
    table = lab_tables.sweep_table(artefact, ("images_per_s",))
    assert table.cells["batch_size"][0] == "2 (out of memory with 8)"


@of("breakeven")
def test_table_of_break_even_points(artefact):
    text = lab_tables.breakeven_table(artefact).markdown()
    lines = [line for line in text.splitlines() if line.startswith(("| 1", "| 8"))]
    assert len(lines) == 4
    assert lines[1] == "| 8 | 2.00 | 1.80 [1.76, 1.84] | 1.70 [1.67, 1.73] | 1.90 | 1.78 |"
    assert "**VIT S**" in text
    assert lines[0].startswith("| 1 (not measured: attention cudnn")  # a kernel of it is missing


def test_alignment_of_counts():
    assert [lab_tables.alignment(count) for count in (192, 160, 144, 136, 132)] == [64, 32, 16, 8, 1]


@of("alignment")
def test_what_a_token_above_a_tile_costs(artefact):
    frame = artefact.frame[artefact.frame["row"] == "blocks"]
    after = lab_tables.steps(frame)
    assert set(after) == set(range(120, 136))
    assert after[128] == pytest.approx((0.5 * 129 + 0.5 * 144) / 128)
    assert after[129] == pytest.approx((0.5 * 130 + 72) / (0.5 * 129 + 72))
    excess = lab_tables.smooth_excess(frame)
    assert excess[128] < 1 < excess[129]
    assert sum(excess.values()) / len(excess) == pytest.approx(1, abs=0.01)
    text = lab_tables.alignment_table(artefact).markdown()
    assert "| multiple of 64 | 1 |" in text
    assert f"{after[128]:.3f}" in text


def test_a_parabola_has_no_excess():
    import pandas as pd

    counts = range(10, 30)
    frame = pd.DataFrame({"tokens": counts, "block_ms.measured": [3 + 0.2 * n + 0.01 * n * n for n in counts]})
    assert list(lab_tables.smooth_excess(frame).values()) == pytest.approx([1] * 20)


@of("profile")
def test_table_of_a_profile(artefact):
    table = lab_tables.profile_table(artefact, ("attention", "mlp", "scoring"))
    assert list(table.spanners) == ["unpruned", "Cropr, R=3", "Cropr, R=3, LLF"]
    assert "| scoring | 0.00 | 0.00 | 11.11 | 2.00 | 29.41 | 5.00 |" in table.markdown()
    assert table.cells["part"].tolist() == ["attention", "mlp", "scoring", "all"]


def test_categories_of_records_and_figures_are_the_same():
    from cropr.bench.profiling import CATEGORIES

    assert set(lab_figures.PARTS) == set(CATEGORIES)


@of("memory")
def test_table_of_training(artefact):
    text = lab_tables.training_table(artefact).markdown()
    assert "| Cropr, R=3 | 610 | 1.64 [1.61, 1.67] | 1556 | 0.78 | 350 | 0.90 | 1000 | 1.80 |" in text


# Sentences -----------------------------------------------------------------------------------------------------------


@of("precision")
def test_sentences_on_precision(artefact):
    text = lab_text.precision(artefact)
    assert "fastest with `bf16` and `flash` attention, 2.60 [2.52, 2.68]x the speed" in text
    assert "Cropr, R=3, LLF 1.70 [1.67, 1.73]x, 96 [94, 97] % of its bound" in text
    assert lab_text.kernels(artefact).startswith("3 of 15 cells were not measured.")
    assert "- attention cudnn: no such kernel here (3 cells)" in lab_text.kernels(artefact)


@of("alignment")
def test_sentences_on_alignment(artefact):
    text = lab_text.aligned(artefact)
    assert "is the one after 128, 1.07 times the latency" in text


@of("alignment")
def test_what_unaligned_schedules_cost_is_decided_by_intervals(artefact):
    costs = lab_tables.unaligned_costs(artefact, "schedules")
    assert list(costs) == [f"schedules/{variant}/fp32/auto/2" for variant in ("as_in_paper", "one_token_more")]
    as_in_paper, one_more = costs.values()
    assert as_in_paper.mean == pytest.approx(1)
    assert one_more.format(2) == "1.10 [1.08, 1.12]"  # Student-t with 2 degrees: 4.30 * 0.01 / sqrt(3)
    text = lab_text.schedules(artefact)
    assert "(as in paper)**: 1.000 [0.975, 1.025] times the time a multiply-add" in text
    assert text.count("the interval includes 1, so nothing is decided") == 1
    assert text.count("these counts cost more, the interval lies above 1") == 1
    table = lab_tables.schedules_table(artefact)
    assert table.cells["cost"].tolist() == ["—", "1.000 [0.975, 1.025]", "—", "1.100 [1.075, 1.125]"]
    assert list(table.heads)[-2:] == ["cost", "bound"]
    assert table.html()


@of("alignment")
def test_unaligned_schedules_are_compared_within_their_setting(artefact):
    """Cells of a second batch size take three times as long, all alike: nothing costs more there."""
    cells = artefact.benches["schedules"]["cells"]
    other = [cell | {"batch_size": 8, "seconds": [3 * cell["metrics"]["gmacs"]] * 3} for cell in cells]
    artefact.benches["schedules"]["cells"] = cells + other
    artefact = with_cells(artefact)
    costs = {name: cost.mean for name, cost in lab_tables.unaligned_costs(artefact, "schedules").items()}
    wanted = {("as_in_paper", 2): 1, ("one_token_more", 2): 1.1, ("as_in_paper", 8): 1, ("one_token_more", 8): 1}
    assert costs == pytest.approx({f"schedules/{name}/fp32/auto/{size}": cost for (name, size), cost in wanted.items()})
    assert lab_tables.schedules_table(artefact).cells["cost"].tolist().count("—") == 4
    assert "(one token more)**, `fp32` and `auto` attention, batches of 8: 1.000" in lab_text.schedules(artefact)


@of("profile")
def test_one_vector_against_all_queries(artefact):
    text = lab_text.scoring(artefact)
    assert "1.041 [1.030, 1.050] times as fast as with all queries, by multiply-adds alone 1.072" in text
    assert "one vector is faster, the interval lies above 1" in text
    assert "98.7 % are the same" in text
    table = lab_tables.scoring_table(artefact).markdown()
    numbers = "1.76 | 1.76 [1.75, 1.77] | 99 [98, 99] | 1.041 [1.030, 1.050] | 98.7 | 1.78"
    assert f"| one vector | 17 to 13 | {numbers} |" in table
    assert "| all queries, then summed | 17 to 13 |" in table
    artefact.frame.loc[artefact.frame["variant"] == "one_vector", "over_all_queries.low"] = 0.99
    assert "the interval includes 1, so nothing is decided" in lab_text.scoring(artefact)


@of("alignment")
def test_published_and_measured_stand_in_columns_of_their_own(artefact):
    table = lab_tables.paper_table(artefact)
    assert table.cells["published"].tolist() == ["1.8"]
    assert table.cells["measured"].tolist() == ["1.10 [1.08, 1.12]"]
    halfway = artefact.benches["schedules"]["cells"][1]  # counts of 4 mod 8: not what the published number is about
    halfway["seconds"] = [2 * second for second in halfway["seconds"]]
    assert lab_tables.paper_table(artefact).cells["measured"].tolist() == ["1.10 [1.08, 1.12]"]
    assert [len(columns) for columns in table.spanners.values()] == [1, 2]


@of("precision")
def test_the_papers_combination_is_looked_for_among_the_unpruned(artefact):
    assert lab_tables.paper_table(artefact).cells["measured"].tolist() == ["—"]  # mixed precision was not measured
    artefact.frame.loc[artefact.frame["precision"] == "bf16", "precision"] = "amp_bf16"
    table = lab_tables.paper_table(artefact)
    assert table.cells["measured"].tolist() == ["2.60 [2.52, 2.68]"]
    assert table.cells["published"].tolist() == ["2.5"]


@of("breakeven")
def test_sentences_on_break_even_show_the_single_image(artefact):
    text = lab_text.breakeven(artefact)
    assert "- **VIT S, Cropr, R=3**: 0.89 [0.87, 0.91]x with batches of 1, 1.80 [1.76, 1.84]x with 8" in text
    assert text.count("lies above 1 from 8 images on") == 4


@of("breakeven")
def test_sentences_on_break_even_hide_no_relapse(artefact):
    frame = artefact.frame
    chosen = (frame["row"] == "vit_s") & (frame["variant"] == "cropr")
    frame.loc[chosen, "speedup.low"] = [1.1, 0.9, *frame.loc[chosen, "speedup.low"][2:]]
    assert "from 1 images on. Not at 8, though." in lab_text.breakeven(artefact)
    frame.loc[chosen, "speedup.low"] = 0.9
    assert "At no batch size measured does its interval lie above 1." in lab_text.breakeven(artefact)


@of("profile")
def test_sentences_on_the_profile(artefact):
    text = lab_text.profile(artefact)
    assert (
        "Cropr, R=3**: mlp 68 %, attention 30 %; scoring, selection, gathering and fusion together 2.00 %, under"
        in text
    )
    assert "together 5.00 %, **not under** the 3 %" in text


@of("memory")
def test_sentences_on_memory(artefact):
    assert "a training step runs at 1.64 [1.61, 1.67]x the speed and takes 0.78 times" in lab_text.memory(artefact)


@of("memory")
def test_sentences_on_memory_where_nobody_counts(artefact):
    for name in ("training", "inference"):
        del artefact.frame[f"{name}_memory_mb.measured"]
    assert lab_text.memory(artefact).count("the speed.") == 2
    assert "Memory" not in lab_tables.training_table(artefact).markdown()


# Figures -------------------------------------------------------------------------------------------------------------

FIGURES = {
    "precision": lab_figures.precision,
    "alignment": lab_figures.alignment_curve,
    "breakeven": lab_figures.breakeven,
    "profile": lab_figures.profile,
    "memory": lab_figures.memory,
}


@pytest.mark.parametrize("artefact", FIGURES, indirect=True)
def test_figures_draw(artefact):
    figure = FIGURES[artefact.manifest.artefact](artefact)
    assert figure.axes
    assert all(axes.has_data() for axes in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_measured_is_said_everywhere(empty, name):
    figure = FIGURES[name](empty)
    assert [text.get_text() for text in figure.axes[0].texts] == ["not measured at this scale"]
    plt.close(figure)
    for sentence in ("precision", "aligned", "schedules", "breakeven", "profile", "scoring", "memory"):
        assert getattr(lab_text, sentence)(empty) == lab_text.NOTHING


@of("profile")
def test_bars_of_a_profile_end_at_the_total(artefact):
    figure = lab_figures.profile(artefact)
    ends = [max(bar.get_x() + bar.get_width() for bar in row) for row in zip(*figure.axes[0].containers, strict=True)]
    assert ends == pytest.approx(artefact.frame["total_ms.measured"].dropna().tolist())
    plt.close(figure)


# Notebooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.workflow
@pytest.mark.parametrize("name", lab_tiny.ARTEFACTS)
def test_notebook_runs(tmp_path, name):
    manifest, out = lab_tiny.write_lab(tmp_path, name), tmp_path / "results"
    values = json.dumps({"manifest": str(manifest), "results": str(out)})
    argv = [sys.executable, "workflow/run_notebook.py", f"notebooks/{name}.ipynb", "--params", values]
    argv += ["--executed", str(out / "logs" / f"{name}.ipynb"), "--notebook", str(out / "notebooks" / f"{name}.ipynb")]
    argv += ["--html", str(out / "notebooks" / f"{name}.html")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    html = (out / "notebooks" / f"{name}.html").read_text()
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', html)
    assert "Traceback" not in html
    assert (out / "tables" / f"{name}.csv").is_file()
    assert list((out / "figures").glob(f"{name}_*.pdf"))
