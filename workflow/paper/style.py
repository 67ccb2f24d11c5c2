"""How every figure looks: one colour and marker per method, sizes for a notebook's width, files that do not change.

The first six methods have colours that remain distinct under the common colour vision deficiencies (Okabe and Ito);
fifteen such colours do not exist, so the others differ by colour and marker together, and figures label directly.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {
    "none": "#3b3b3b",
    "cropr": "#d55e00",
    "random": "#0072b2",
    "variance": "#009e73",
    "attn_topk": "#cc79a7",
    "non_salient": "#56b4e9",
    "tome": "#e69f00",
    "evit": "#882255",
    "ats": "#44aa99",
    "k_medoids": "#999933",
    "dpc_knn": "#117733",
    "dynamicvit": "#332288",
    "sit": "#6699cc",
    "sinkhorn": "#661100",
    "patchmerger": "#888888",
}
MARKERS = {
    "none": "s",
    "cropr": "o",
    "random": "o",
    "variance": "o",
    "attn_topk": "o",
    "non_salient": "o",
    "tome": "D",
    "evit": "D",
    "ats": "D",
    "k_medoids": "D",
    "dpc_knn": "D",
    "dynamicvit": "^",
    "sit": "^",
    "sinkhorn": "^",
    "patchmerger": "^",
}
"""Squares: unpruned. Circles: selection. Diamonds: merging, adaptive sampling. Triangles: stages of learned slots."""
NAMES = {
    "none": "unpruned",
    "cropr": "Cropr",
    "random": "random",
    "variance": "variance",
    "attn_topk": "attention top-k",
    "non_salient": "non-salient",
}
OTHER = "#5f5f5f"
"""Colour of a method without one of its own."""
INK = "#222222"
MUTED = "#767676"
GRID = "#e4e4e4"
SEQUENTIAL = "viridis"
"""Perceptually uniform, for block indices."""
WIDTH = 9.6
"""Inches; the width of a notebook's page."""
DPI = 160

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same on every machine
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 7,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.hashsalt": "cropr",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside of this: figures then share fonts, grid and colours, and leave matplotlib's settings as they were."""
    with mpl.rc_context(_RC):
        yield


def colour(reducer: str) -> str:
    """The method's colour, in every figure."""
    return COLOURS.get(reducer, OTHER)


def marker(reducer: str) -> str:
    """The method's marker."""
    return MARKERS.get(reducer, "X")


def name(reducer: str) -> str:
    """The method's name as readers know it."""
    return NAMES.get(reducer, reducer.replace("_", " "))


def save(figure: Figure, results: str | Path, stem: str) -> Path:
    """Write ``<results>/figures/<stem>.png`` and ``.pdf``, each whole or not at all; equal figures give equal bytes.

    Returns:
        The PNG's path.
    """
    folder = Path(results) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        for suffix, options in (("png", {"dpi": DPI}), ("pdf", {"metadata": {"CreationDate": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, **options)
            temporary = folder / f".{stem}.{suffix}.{os.getpid()}.tmp"
            temporary.write_bytes(buffer.getvalue())
            temporary.replace(folder / f"{stem}.{suffix}")
    return folder / f"{stem}.png"
