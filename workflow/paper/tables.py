"""Tables for the notebooks: what was measured, what the paper publishes and what a formula bounds, side by side.

    table = methods(artefact)  # or side_by_side(artefact, measured=("top1", "speedup"), ...)
    table.html()      # great_tables, for the notebook
    table.markdown()  # the same cells as plain Markdown

Kinds of numbers stand under spanners of their own and never share a column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import pandas as pd
from great_tables import GT, html, loc, style

from workflow.paper.claims import OUTCOMES, Judgement
from workflow.paper.load import Artefact, metric_by_seed
from workflow.paper.names import bench_model, headings, schedules
from workflow.paper.quantities import Quantity, quantity
from workflow.paper.stats import ROUNDS, wilson

NONE = "—"
"""A cell without a number."""
GREY = "#6b6b6b"
_COLOURS = {"holds": "#00694d", "contradicted": "#b3420a", "undecided": GREY}
_WORDS = {"schedule": "Schedule", "fusion": "Fusion", "pool": "Pool", "reducer": "Method"}
_PUBLISHED = ("tpr", "speedup", "gmacs", "gmacs_linear", "gmacs_change")
"""Beside accuracies, what the paper gives of some artefact."""
_VALUES = {
    "schedule": {"none": "unpruned"},
    "fusion": {
        "none": "none",
        "concat": "token concatenation",
        "exit": "early exit",
        "cross": "cross-attention",
        "llf": "Last Layer Fusion",
        "llf_no_self": "Last Layer Fusion, pruned apart",
    },
    "pool": {"avg": "average", "cls": "CLS"},
}


@dataclass(frozen=True)
class Table:
    """Cells as text, ready to be laid out."""

    cells: pd.DataFrame
    """One line a row; columns are the keys of ``heads``."""
    heads: dict[str, str]
    spanners: dict[str, list[str]]
    """Title to the columns below it."""
    group: list[str] | None = None
    """Heading that each line stands under, lines with the same one being neighbours."""
    notes: list[str] | None = None
    """What stands small beneath the first cell of a line; empty for none."""
    grey: list[bool] | None = None
    """Lines without measurements."""
    caption: str = ""
    unbroken: tuple[str, ...] = ()
    """Columns whose text stays on one line, beside those under spanners."""
    colours: dict[tuple[int, str], str] | None = None
    """Text colour of single cells."""

    def html(self) -> str:
        """The table as HTML that loads nothing; the same bytes for the same cells."""
        data, first = self.cells[list(self.heads)].astype(str), next(iter(self.heads))
        notes = self.notes or [""] * len(data)
        data[first] = [
            escape(cell) + (f"<br><span style='font-size:85%'>{escape(note)}</span>" if note else "")
            for cell, note in zip(data[first], notes, strict=True)
        ]
        if self.group:
            data["_group"] = self.group
        name = "t" + hashlib.sha256(f"{self.heads}{self.cells.to_csv()}{self.caption}".encode()).hexdigest()[:8]
        table = GT(data, groupname_col="_group" if self.group else None, id=name)
        table = table.cols_label({key: html(escape(title)) for key, title in self.heads.items()})
        for title, columns in self.spanners.items():
            table = table.tab_spanner(label=title, columns=columns)
        numbers = [column for columns in self.spanners.values() for column in columns]
        table = table.cols_align("left").cols_align("right", columns=numbers).fmt(str, columns=first)
        if unbroken := [*numbers, *self.unbroken]:
            table = table.tab_style(style.css("white-space: nowrap"), loc.body(columns=unbroken))
        for i, grey in enumerate(self.grey or []):
            if grey:
                table = table.tab_style(style.text(color=GREY), loc.body(rows=[i]))
        for (i, column), tint in (self.colours or {}).items():
            table = table.tab_style(style.text(color=tint, weight="bold"), loc.body(columns=column, rows=[i]))
        if self.caption:
            table = table.tab_source_note(self.caption)
        # Notebooks give all tables columns of equal width.
        table = table.opt_css(f"#{name} table {{ table-layout: auto !important; }}")
        return table.tab_options(
            table_font_size="13px", data_row_padding="4px", row_group_font_weight="bold", table_width="100%",
            row_group_background_color="#f4f4f4", column_labels_font_weight="bold", source_notes_font_size="12px",
            table_background_color="#ffffff", table_font_color="#222222",
        ).as_raw_html()  # fmt: skip

    def markdown(self) -> str:
        """The same cells as a Markdown table; a spanner is put before its columns' names."""
        over = {column: title for title, columns in self.spanners.items() for column in columns}
        titles = [f"{over[key]}: {title}" if key in over else title for key, title in self.heads.items()]
        lines = [titles, ["---"] * len(titles)]
        previous = None
        for i, cells in enumerate(self.cells[list(self.heads)].astype(str).to_numpy().tolist()):
            if self.group and self.group[i] != previous:
                previous = self.group[i]
                lines.append([f"**{previous}**", *[""] * (len(titles) - 1)])
            if self.notes and self.notes[i]:
                cells[0] = f"{cells[0]} ({self.notes[i]})"
            lines.append(cells)
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{text}\n\n{self.caption}\n" if self.caption else f"{text}\n"


def methods(artefact: Artefact) -> Table:
    """The table of an artefact that compares methods: accuracy, pruned patches, speed and its bound, published numbers.

    What its task is judged by gives the columns; those without any number are left out.
    """
    compared = artefact.measures.compared
    accuracies = tuple(column for name in compared for column in (name, f"{name}_median", f"{name}_difference"))
    return side_by_side(
        artefact,
        texts=("pool",) if len({row.columns.get("pool") for row in artefact.manifest.rows}) > 1 else (),
        grouped=True,
        measured=(*accuracies, "tpr", "speedup", "share_of_bound"),
        predicted=("gmacs", "gmacs_linear"),
        bound=("speedup",),
        published=(*(part for name in compared for part in (name, f"{name}_logged")), *_PUBLISHED),
    )


def speeds(artefact: Artefact) -> Table:
    """Images per second of the rows that were timed, and of the unpruned model in the same process.

    Of detectors: of the encoder and of the whole model.
    """
    names = ("base_images_per_s", "images_per_s", "speedup", "share_of_bound")
    whole = ("base_images_per_s_whole", "images_per_s_whole", "speedup_whole")
    return side_by_side(
        artefact,
        rows=[row for row in artefact.frame.index if artefact.interval(row, "speedup") is not None],
        grouped=True,
        measured=(*names, *whole),
        bound=("speedup", "speedup_whole"),
        published=("images_per_s", "speedup", "speedup_whole"),
    )


def further(artefact: Artefact) -> Table:
    """What else is usually reported of such models, of the rows that were trained."""
    rows = [row for row in artefact.frame.index if artefact.interval(row, artefact.primary) is not None]
    return side_by_side(artefact, rows=rows, grouped=True, measured=artefact.measures.further)


def fusions(artefact: Artefact) -> Table:
    """The table of an artefact that compares what becomes of pruned tokens: accuracy and speed by fusion."""
    compared = artefact.measures.compared
    return side_by_side(
        artefact,
        texts=("schedule", "fusion"),
        measured=(*(part for name in compared for part in (name, f"{name}_difference")), "tpr", "speedup"),
        bound=("speedup",),
        published=(*compared, *(f"{name}_difference" for name in compared)),
    )


def side_by_side(
    artefact: Artefact,
    *,
    rows: Sequence[str] | None = None,
    texts: Sequence[str] = (),
    grouped: bool = False,
    measured: Sequence[str] = (),
    predicted: Sequence[str] = (),
    bound: Sequence[str] = (),
    published: Sequence[str] = (),
) -> Table:
    """The rows of an artefact, its kinds of numbers under spanners of their own.

    Args:
        artefact: what to show.
        rows: which of them; None for all.
        texts: text columns after the label.
        grouped: rows of the same schedule and fusion stand under a heading that names them, for accuracy, speed and
            paper apart where they differ.
        measured, predicted, bound, published: quantities under each spanner; a column without any number is left out,
            and so is a spanner without columns. With a single seed, an accuracy that is a share of images is followed
            by what the sampling of the validation images alone would give.
    """
    if rows is not None:
        artefact = replace(artefact, frame=artefact.frame.loc[list(rows)])
    frame = artefact.frame
    titles = {
        "measured": f"Measured (this scale: {artefact.manifest.scale})",
        "predicted": "Predicted (formula)",
        "bound": "Bound",
        "published": "Published (paper)",
    }
    wanted = {"measured": measured, "predicted": predicted, "bound": bound, "published": published}
    texts = [column for column in texts if column in frame]
    cells = pd.DataFrame({"label": frame["label"].astype(str).to_numpy()})
    heads, spanners = {"label": ""}, {}
    for column in texts:
        cells[column] = [_word(column, value) for value in frame[column]]
        heads[column] = _WORDS.get(column, column)
    for kind, names in wanted.items():
        spanners[titles[kind]] = [_add(artefact, kind, name, cells, heads) for name in names if _has(frame, name, kind)]
        accuracy = f"measured.{artefact.primary}"
        if kind == "measured" and accuracy in heads and any(sampling := _sampling(artefact)):
            cells["sampling"], heads["sampling"] = sampling, "Image sampling alone (%)"
            spanners[titles[kind]].insert(1, "sampling")
            heads = _move(heads, "sampling", after=accuracy)
    available = frame["available"].astype(bool).tolist()
    notes = ["" if ok else f"not available: {why}" for ok, why in zip(available, frame["why"], strict=True)]
    under = headings(artefact)
    groups = [under[row] for row in frame.index] if grouped else None
    # Rows under one heading stand together, headings in the order of their first row.
    order = sorted(range(len(cells)), key=lambda i: groups.index(groups[i]) if groups else i)
    return Table(
        cells.iloc[order].reset_index(drop=True),
        heads,
        {title: columns for title, columns in spanners.items() if columns},
        [groups[i] for i in order] if groups else None,
        [notes[i] for i in order],
        [not available[i] for i in order],
        caption(artefact, measured, grouped),
    )


def caption(artefact: Artefact, measured: Sequence[str], grouped: bool = False) -> str:
    """What the brackets of a table mean, and which models and schedules its accuracies and speeds belong to."""
    seeds, parts = artefact.manifest.seeds, []
    compared = artefact.measures.compared
    if any(f"{name}_difference" in measured for name in compared) and artefact.baseline:
        parts.append(f"Differences are to “{artefact.rows[artefact.baseline].label}”.")
    accuracies = any(name.removesuffix("_difference") in compared for name in measured)
    speeds = any(name in measured for name in ("speedup", "share_of_bound")) and bool(artefact.benches)
    if accuracies and len(seeds) > 1:
        parts.append(
            f"Brackets behind accuracies: 95 % Student-t interval over {len(seeds)} seeds, differences paired."
        )
    elif accuracies:
        parts.append("One seed: accuracies have no interval.")
        if artefact.measures.binomial:
            parts.append(
                "“Image sampling alone” is the 95 % Wilson interval of this one model's accuracy; another seed may "
                "fall outside."
            )
    if speeds:
        parts.append(f"Brackets behind speed-ups: {ROUNDS}.")
    if accuracies and speeds and (pairs := schedules(artefact)):
        differ = "the headings name both" if grouped else f"{' or '.join(pairs)}"
        parts.append(f"Accuracy is that of this scale's model, speed that of {bench_model(artefact)}; "
                     f"their schedules differ ({differ}).")  # fmt: skip
    return " ".join(parts)


def claims_table(judgements: Sequence[Judgement]) -> Table:
    """Claims with what was measured and the verdict."""
    cells = pd.DataFrame(
        {
            "text": [j.claim.text for j in judgements],
            "measured": [j.measured for j in judgements],
            "needed": [j.claim.relation for j in judgements],
            "verdict": [OUTCOMES[j.verdict.outcome] for j in judgements],
            "reason": [j.verdict.reason for j in judgements],
            "source": [j.claim.source for j in judgements],
        }
    )
    heads = {
        "text": "Claim",
        "measured": "Measured, 95 % interval",
        "needed": "Claimed",
        "verdict": "Verdict",
        "reason": "Why",
        "source": "Source",
    }
    colours = {(i, "verdict"): _COLOURS[j.verdict.outcome] for i, j in enumerate(judgements)}
    return Table(cells, heads, {}, unbroken=("measured", "needed", "verdict"), colours=colours)


def _has(frame: pd.DataFrame, name: str, kind: str) -> bool:
    return f"{name}.{kind}" in frame and bool(frame[f"{name}.{kind}"].notna().any())


def _add(artefact: Artefact, kind: str, name: str, cells: pd.DataFrame, heads: dict[str, str]) -> str:
    """Add the column of one quantity and kind; returns its key."""
    entry, key = quantity(name), f"{kind}.{name}"
    texts = []
    for row in artefact.frame.index:
        interval = artefact.interval(row, name) if kind == "measured" else None
        if interval is not None and entry.exact:
            texts.append(f"{interval.mean:,.0f}")
        elif interval is not None:
            texts.append(interval.format(entry.places(interval.mean), entry.signed))
        elif kind != "measured" and not np.isnan(value := artefact.number(row, f"{name}.{kind}")):
            digits = _printed(value, entry) if kind == "published" else entry.digits
            texts.append(f"{value:{'+' if entry.signed else ''},.{digits}f}")
        else:
            texts.append(NONE)
    cells[key], heads[key] = texts, entry.title
    return key


def _printed(value: float, entry: Quantity) -> int:
    """Digits as the paper prints them: at least one, none for counts."""
    return 0 if entry.exact or value >= 1000 else max(1, len(str(value).partition(".")[2]))


def _sampling(artefact: Artefact) -> list[str]:
    """Wilson interval of every row that has a single run; empty with several seeds, or if it has no meaning."""
    if len(artefact.manifest.seeds) > 1 or not artefact.measures.binomial:
        return []
    texts = []
    for row in artefact.frame.index:
        records = artefact.runs.get(row, {})
        names = (artefact.primary, "val_images")
        accuracy, images = (next(iter(metric_by_seed(records, name).values()), None) for name in names)
        if accuracy is None or images is None:
            texts.append(NONE)
        else:
            interval = wilson(round(accuracy * images / 100), int(images))
            texts.append(f"[{interval.low:.1f}, {interval.high:.1f}]")
    return texts if any(text != NONE for text in texts) else []


def _move(heads: dict[str, str], key: str, after: str) -> dict[str, str]:
    title, keys = heads.pop(key), list(heads)
    keys.insert(keys.index(after) + 1, key)
    return {name: title if name == key else heads[name] for name in keys}


def _word(column: str, value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return NONE
    return _VALUES.get(column, {}).get(str(value), str(value))
