"""What a notebook's cells call to show text, tables and figures. Needs IPython, which every kernel has."""

from __future__ import annotations

import logging

import matplotlib.pyplot as plt
from IPython.display import HTML, Image, Markdown, display
from matplotlib.figure import Figure

from cropr.report import style
from cropr.report.load import Artefact, write_tables
from cropr.report.tables import Table

_LOG = logging.getLogger("cropr")


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
