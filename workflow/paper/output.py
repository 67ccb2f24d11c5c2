"""How tables and figures look, and the files that they are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Image
from pandas.io.formats.style import Styler

from cropr.pruning.methods import REDUCERS
from cropr.records import replacing, write_text
from workflow.paper.records import find_results

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same on every machine
    "font.size": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (9.6, 4.2),
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # class names may hold a $
}


OTHER = "#5f5f5f"
"""Colour of a method that ``REDUCERS`` lacks."""


def use_style() -> None:
    """Fonts, grid and size that all figures share; frames show whole texts."""
    pd.set_option("display.max_colwidth", 200)
    sns.set_theme(style="whitegrid", rc=_RC)


def palette(frame: pd.DataFrame, by: str = "name") -> dict[str, str]:
    """Colour of each row by the method that it uses, for seaborn's ``palette``.

    Args:
        frame: with the columns ``reducer`` and ``by``.
        by: column of the rows' names, the keys.
    """
    rows = frame.drop_duplicates(by)
    colours = {reducer: method.colour for reducer, method in REDUCERS.items()}
    return {str(name): colours.get(reducer, OTHER) for name, reducer in zip(rows[by], rows["reducer"], strict=True)}


def save_table(frame: pd.DataFrame, artefact: str, results: str | Path, name: str | None = None) -> Styler:
    """Write ``tables/<artefact>[_name].csv`` and ``.md``, without the index unless it has a name.

    Returns:
        The table for display; empty cells where there is no value.
    """
    stem = find_results(results) / "tables" / "_".join(filter(None, (artefact, name)))
    shown = frame.reset_index() if any(frame.index.names) else frame
    write_text(stem.with_suffix(".csv"), shown.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    write_text(stem.with_suffix(".md"), to_markdown(shown))
    left: Any = [{"selector": "th, td", "props": "text-align: left"}]
    return shown.style.format(_text, escape="html").hide(axis="index").set_uuid(stem.name).set_table_styles(left)


def to_markdown(frame: pd.DataFrame) -> str:
    """A pipe table."""
    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    lines += [[_text(value).replace("|", r"\|") for value in line] for line in frame.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_figure(figure: Any, artefact: str, results: str | Path, name: str | None = None, alt: str = "") -> Image:
    """Write ``figures/<artefact>[_name].png`` and ``.pdf``; equal figures give equal bytes.

    Args:
        figure: of matplotlib or seaborn (axes and grids too). It is closed.
        artefact: of the notebook.
        results: folder of the scale.
        name: of the figure, where an artefact has several.
        alt: what it shows, for readers who cannot see it.

    Returns:
        The picture for display.
    """
    figure = getattr(figure, "figure", figure)
    stem = find_results(results) / "figures" / "_".join(filter(None, (artefact, name)))
    with mpl.rc_context(_RC):
        for kind, key in (("pdf", "CreationDate"), ("png", "Software")):
            with replacing(stem.with_suffix(f".{kind}")) as file:
                figure.savefig(file, format=kind, metadata={key: None})
    plt.close(figure)
    return Image(data=stem.with_suffix(".png").read_bytes(), alt=alt or None, metadata={"alt": alt or stem.name})


def _text(value: object) -> str:
    """A cell: empty without a value, numbers with the digits that they have."""
    if value is None or value != value:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
