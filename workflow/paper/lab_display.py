"""What the cells of the laboratory's notebooks call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from workflow.paper import display, lab_figures, lab_tables, lab_text
from workflow.paper.display import say, show_figure, show_rerun, show_table
from workflow.paper.lab_load import with_cells
from workflow.paper.load import Artefact
from workflow.paper.tables import Table

__all__ = ["begin", "show_measured", "show_paper", "show_rerun", "show_schedules", "show_scoring"]


@dataclass(frozen=True)
class Page:
    """What a notebook shows first of its artefact."""

    table: Callable[[Artefact], Table]
    sentences: tuple[Callable[[Artefact], str], ...]
    figure: Callable[[Artefact], Figure]
    suffix: str
    """Of the figure's file."""
    description: str
    """Read to those who cannot see the figure."""


PAGES = {
    "precision": Page(
        lab_tables.precision_table,
        (lab_text.precision, lab_text.kernels),
        lab_figures.precision,
        "throughput",
        "Images per second by precision and attention kernel, one bar a variant, a panel each model and image size.",
    ),
    "alignment": Page(
        lab_tables.alignment_table,
        (lab_text.aligned,),
        lab_figures.alignment_curve,
        "curve",
        "How far the latency of one block lies off a smooth curve, by token count, coloured by what divides the count.",
    ),
    "breakeven": Page(
        lab_tables.breakeven_table,
        (lab_text.breakeven, lab_text.kernels),
        lab_figures.breakeven,
        "batches",
        "Speed-up against the number of images a batch, one line a model, with its interval and its bound.",
    ),
    "profile": Page(
        partial(lab_tables.profile_table, categories=tuple(lab_figures.PARTS)),
        (lab_text.profile,),
        lab_figures.profile,
        "parts",
        "Stacked bars: milliseconds of a forward pass by part of the model, one bar a variant.",
    ),
    "memory": Page(
        lab_tables.training_table,
        (lab_text.memory,),
        lab_figures.memory,
        "bars",
        "Bars by variant: time of a training step, memory of training and memory of inference.",
    ),
}
"""By artefact."""


def begin(manifest: str, results: str) -> Artefact:
    """Read an artefact with a line for every cell; say what the paper reports and how the numbers were made.

    Args:
        manifest: see ``load.load``.
        results: where tables and figures go.
    """
    return with_cells(display.begin(manifest, results))


def show_measured(artefact: Artefact) -> None:
    """The artefact's table, saved, what it says in sentences, and its figure."""
    page = PAGES[artefact.manifest.artefact]
    show_table(page.table(artefact), save_as=artefact)
    say(*(sentence(artefact) for sentence in page.sentences))
    show_figure(page.figure(artefact), artefact, page.suffix, page.description)


def show_schedules(artefact: Artefact) -> None:
    """Schedules of one rate whose counts are aligned, or are not."""
    show_table(lab_tables.schedules_table(artefact))
    say(lab_text.schedules(artefact))


def show_scoring(artefact: Artefact) -> None:
    """One vector for scoring against all queries."""
    show_table(lab_tables.scoring_table(artefact))
    say(lab_text.scoring(artefact))


def show_paper(artefact: Artefact) -> None:
    """What the paper reports of this beside what was measured here."""
    show_table(lab_tables.paper_table(artefact))
