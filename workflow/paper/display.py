"""What a notebook's cells call: text, tables and figures, written to the results and shown. Needs IPython.

    artefact = begin(manifest, results)     # says what the paper reports and how the numbers here were made
    show_methods(artefact)                  # the table, saved, and what it says in sentences
    show_trade_off(artefact)                # figures, saved as figures/<artefact>_<name>.png and .pdf

The notebooks of one kind (methods on classification, segmentation, detection) differ in their prose alone.
"""

from __future__ import annotations

import logging

import matplotlib.pyplot as plt
from IPython.display import HTML, Image, Markdown, display
from matplotlib.figure import Figure

from workflow.paper import claims, figures, setting, style, tables, text
from workflow.paper.load import Artefact, load, write_tables
from workflow.paper.names import bench_model
from workflow.paper.quantities import quantity
from workflow.paper.tables import Table

_LOG = logging.getLogger("cropr")


def begin(manifest: str, results: str) -> Artefact:
    """Read an artefact; say what the paper reports of it and what the numbers here were made with.

    Args:
        manifest: see ``load.load``.
        results: where tables and figures go.
    """
    artefact = load(manifest, results)
    say(text.paper_says(artefact), setting.setting(artefact))
    return artefact


def say(*texts: str) -> None:
    """Show Markdown, a paragraph each."""
    display(Markdown("\n\n".join(texts)))


def show_table(table: Table, save_as: Artefact | None = None) -> None:
    """Show a table; with an artefact, also write its ``tables/<artefact>.csv`` and ``.md``."""
    if save_as is not None:
        for path in write_tables(save_as, table.markdown()):
            _LOG.info("wrote %s", path)
    display(HTML(table.html()))


def show_figure(figure: Figure, artefact: Artefact, suffix: str, description: str) -> None:
    """Write a figure to ``figures/<artefact>[_<suffix>].png`` and ``.pdf`` and show the file.

    Args:
        figure: is closed.
        artefact: names the file.
        suffix: distinguishes the figures of one notebook; may be empty.
        description: read to those who cannot see the picture.
    """
    stem = f"{artefact.manifest.artefact}_{suffix}" if suffix else artefact.manifest.artefact
    path = style.save(figure, artefact.root / artefact.manifest.results, stem)
    width = round(figure.get_size_inches()[0] * 96)
    plt.close(figure)
    display(Image(data=path.read_bytes(), format="png", width=width, alt=description))


def show_methods(artefact: Artefact) -> None:
    """The table of methods, saved, how to read it, and what it says; where it contradicts the paper, that first."""
    say(text.how_to_read(artefact))
    show_table(tables.methods(artefact), save_as=artefact)
    say(text.coverage(artefact), text.against_paper(artefact), text.accuracy(artefact), text.speed(artefact))


def show_trade_off(artefact: Artefact) -> None:
    """Accuracy against speed-up, measured and, where enough of it is, published."""
    label = quantity(artefact.primary).label
    show_figure(
        figures.trade_off(artefact),
        artefact,
        "trade_off",
        f"Scatter plot of {label} against speed-up, measured at this scale, and published if in several rows.",
    )


def show_speed(artefact: Artefact) -> None:
    """Speed-up of every row beside its bound and the published one, and the throughputs behind it."""
    description = (
        f"Measured speed-up of {bench_model(artefact)} by row, with its interval, its bound and the published one."
    )
    show_figure(figures.speed_against_bound(artefact), artefact, "speed", description)
    if artefact.benches:
        show_table(tables.speeds(artefact))


def show_further(artefact: Artefact) -> None:
    """Other metrics of the rows that were trained."""
    show_table(tables.further(artefact))


def show_tokens(artefact: Artefact) -> None:
    """Tokens after each block."""
    description = "Tokens at the input and after each block of this scale's model, one line per schedule."
    show_figure(figures.tokens(artefact), artefact, "tokens", description)


def show_forest(artefact: Artefact, cost: str = "train_speedup") -> None:
    """Difference of every row to the baseline, and what the row costs; see ``figures.forest``."""
    label = quantity(artefact.primary).label
    description = f"Difference in {label} of every row to the baseline, with its interval, and beside it: "
    show_figure(figures.forest(artefact, cost), artefact, "forest", description + figures.COSTS[cost].lower())


def show_claims(artefact: Artefact) -> None:
    """The claims about an artefact and their verdicts, from ``config/claims.yaml``."""
    stated = claims.load_claims(artefact.root / "config" / "claims.yaml")
    judgements = claims.judge_all(stated, {artefact.manifest.artefact: artefact})
    if judgements:
        show_table(tables.claims_table(judgements))
    say(text.verdicts(judgements))


def show_rerun(artefact: Artefact) -> None:
    """The commands that make this page, and one row of it."""
    say("## Rerun", text.rerun(artefact), text.rerun_row(artefact))
