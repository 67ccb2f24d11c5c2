"""What the cells of the laboratory's notebooks call."""

from __future__ import annotations

from cropr.report import display, lab_figures, lab_tables, lab_text
from cropr.report.display import say, show_figure, show_rerun, show_table
from cropr.report.lab_figures import PARTS
from cropr.report.lab_load import with_cells
from cropr.report.load import Artefact

__all__ = [
    "begin", "show_alignment", "show_breakeven", "show_memory", "show_precision", "show_profile", "show_rerun",
    "show_schedules",
]  # fmt: skip


def begin(manifest: str, results: str) -> Artefact:
    """Read an artefact with a line for every cell; say what the paper reports and how the numbers were made.

    Args:
        manifest: see ``load.load``.
        results: where tables and figures go.
    """
    return with_cells(display.begin(manifest, results))


def show_precision(artefact: Artefact) -> None:
    """The grid of precisions, kernels and variants: table, what could not run, figure, sentences."""
    columns = ("images_per_s", "speedup", "share_of_bound", "gain", "mfu", "working_memory_mb")
    show_table(lab_tables.sweep_table(artefact, columns), save_as=artefact)
    say(lab_text.precision(artefact), lab_text.kernels(artefact))
    show_figure(
        lab_figures.precision(artefact),
        artefact,
        "throughput",
        "Images per second by precision and attention kernel, one bar a variant, a panel each model and image size.",
    )


def show_alignment(artefact: Artefact) -> None:
    """Latency over token counts."""
    show_table(lab_tables.alignment_table(artefact), save_as=artefact)
    say(lab_text.aligned(artefact))
    show_figure(
        lab_figures.alignment_curve(artefact),
        artefact,
        "curve",
        "How far the latency of one block lies off a smooth curve, by token count, coloured by what divides the count.",
    )


def show_schedules(artefact: Artefact) -> None:
    """The paper's schedule with and without aligned counts."""
    show_table(lab_tables.sweep_table(artefact, ("images_per_s", "speedup", "share_of_bound")))
    say(lab_text.schedules(artefact))


def show_breakeven(artefact: Artefact) -> None:
    """Speed-up by batch size and model."""
    show_table(lab_tables.breakeven_table(artefact), save_as=artefact)
    say(lab_text.breakeven(artefact), lab_text.kernels(artefact))
    show_figure(
        lab_figures.breakeven(artefact),
        artefact,
        "batches",
        "Speed-up against the number of images a batch, one line a model, with its interval and its bound.",
    )


def show_profile(artefact: Artefact) -> None:
    """Where the time goes."""
    show_table(lab_tables.profile_table(artefact, tuple(PARTS)), save_as=artefact)
    say(lab_text.profile(artefact))
    show_figure(
        lab_figures.profile(artefact),
        artefact,
        "parts",
        "Stacked bars: milliseconds of a forward pass by part of the model, one bar a variant.",
    )


def show_memory(artefact: Artefact) -> None:
    """Training step and memory."""
    show_table(lab_tables.training_table(artefact), save_as=artefact)
    say(lab_text.memory(artefact))
    show_figure(
        lab_figures.memory(artefact),
        artefact,
        "bars",
        "Bars by variant: time of a training step, memory of training and memory of inference.",
    )
