"""The paper's claims, as ``config/claims.yaml`` states them, and what the records say about each.

A claim compares two rows, or two cells of a microbenchmark, in one quantity: ``left - right`` or ``left / right``
against a threshold. Without a right side, the quantity of the left one itself is compared. It holds if the whole
interval lies on the claimed side, is contradicted if none of it does, and has not run if a side has no record.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from workflow.paper.records import REPOSITORY, load_cells, load_manifest, load_records, load_rounds, load_speed
from workflow.paper.stats import (
    MIN_ROUNDS,
    mean_interval,
    median_interval,
    paired_difference,
    rounds_needed,
    seeds_needed,
    with_interval,
)

CLAIMS = REPOSITORY / "config" / "claims.yaml"
VERDICTS = {"holds": "✓", "contradicted": "✗", "undecided": "?", "not run": "–"}  # noqa: RUF001
"""Every verdict with its sign."""
TIMED = ("speedup", "speedup_over_mac_ratio", "speedup_whole")
"""Quantities of ``load_speed``; their intervals are over the rounds of one process."""
CELLS = ("times_as_fast", "times_as_fast_over_mac_ratio", "cell_speedup", "macs_saved")
"""Quantities of cells. The first two are of cells that take turns in one process: time of the right one over time of
the left one, round by round, each relative to the unpruned model next to it if that is of the same setting; the second
in percent of the ratio of their multiply-adds. ``cell_speedup`` is the speed-up over the unpruned model next to the
cell; sides may be of two processes. ``macs_saved``, in percent of the unpruned model's, follows from formulas and has
no interval."""
SETTING = ("precision", "attention", "batch_size")
"""Columns that are equal for cells with the same unpruned model."""
_RELATION = re.compile(r"^\s*(>=|<=|>|<)\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")

Found = tuple[pd.DataFrame | None, str, str]
"""Interval, verdict, and why it is not decided."""


class Claim(BaseModel):
    """One claim."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    artefact: str
    text: str
    """One sentence that a reader understands without the grid."""
    left: str | dict[str, Any]
    """A row; of a microbenchmark, the columns of ``load_cells`` that choose one cell."""
    right: str | dict[str, Any] | None = None
    """What is subtracted, or divided by."""
    quantity: str
    """A metric of training records, one of ``TIMED``, or one of ``CELLS``."""
    ratio: bool = False
    """Whether ``left / right`` is claimed instead of ``left - right``."""
    relation: str
    """``> 0``, ``>= -2``: what the difference or ratio is claimed to be."""
    place: str
    """Table, figure or section of the paper that it belongs to."""
    published: str
    """The numbers there, or that there are none."""
    threshold: Literal["paper", "ours"]
    """Who claims it at this threshold."""

    @property
    def sides(self) -> list[Any]:
        """Left and, if there is one, right."""
        return [self.left] if self.right is None else [self.left, self.right]

    @property
    def limit(self) -> float:
        """Number of the relation."""
        match = _RELATION.match(self.relation)
        assert match is not None, self.relation
        return float(match[2])

    @property
    def source(self) -> str:
        """Place, numbers, and whether the threshold is ours, in one line."""
        return f"{self.place}: {self.published}" + ("; the threshold is ours" if self.threshold == "ours" else "")

    @field_validator("relation")
    @classmethod
    def _readable(cls, value: str) -> str:
        if _RELATION.match(value) is None:
            raise ValueError(f"relation is {value!r}; write one of > >= < <= and a number, for example '>= -2'")
        return value


def load_claims(path: str | Path = CLAIMS) -> list[Claim]:
    """Read a list of claims.

    Raises:
        ValueError: unknown key, unreadable relation, or an id given twice; names the claim.
    """
    claims: list[Claim] = []
    for entry in yaml.safe_load(Path(path).read_text(encoding="utf-8"))["claims"]:
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path}: claim {entry.get('id')}: {first['loc']}: {first['msg']}") from None
    ids = [claim.id for claim in claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path}: claim {twice[0]!r} is given twice; ids are unique")
    return claims


def decide(relation: str, low: float, high: float) -> str:
    """``holds``, ``contradicted`` or ``undecided``, by an interval; without bounds nothing is decided."""
    match = _RELATION.match(relation)
    assert match is not None, relation
    sign = 1 if match[1][0] == ">" else -1
    near, far = sorted((sign * (low - float(match[2])), sign * (high - float(match[2]))))
    if near > 0 or (near == 0 and match[1] in (">=", "<=")):
        return "holds"
    if far < 0 or (far == 0 and match[1] in (">", "<")):
        return "contradicted"
    return "undecided"


def verdicts(artefact: str, results: str | Path, path: str | Path = CLAIMS) -> pd.DataFrame:
    """The claims about an artefact: claim, measured, predicted, claimed, verdict, why, over, source.

    Raises:
        ValueError: a claim about a row that the artefact lacks.
    """
    columns = ["claim", "measured", "predicted", "claimed", "verdict", "why", "over", "source"]
    rows = {row["row"]: row for row in load_manifest(artefact, results)["rows"]}
    lines = []
    for claim in load_claims(path):
        if claim.artefact != artefact:
            continue
        names = [side["row"] if isinstance(side, dict) else side for side in claim.sides]
        if missing := [name for name in names if name not in rows]:
            raise ValueError(f"claim {claim.id}: {artefact} has no row {missing[0]!r}; it has {', '.join(rows)}")
        if reasons := [rows[name]["why"] for name in names if rows[name]["why"]]:
            interval, verdict, why = None, "not run", reasons[0]
        else:
            interval, verdict, why = _judge(claim, results)
        measured, predicted, over = "", "", ""
        if interval is not None:
            signed = claim.right is not None and not claim.ratio and claim.quantity not in CELLS[:2]
            fine = ("speedup", "speedup_whole", "times_as_fast", "cell_speedup")
            digits = 2 if claim.ratio or claim.quantity in fine else 1
            over = interval["over"].iloc[0]
            if over == "formula":
                predicted = with_interval(interval.assign(low=math.nan), digits).iloc[0]
            else:
                measured = with_interval(interval, digits, signed=signed).iloc[0]
        lines.append([claim.text, measured, predicted, claim.relation, verdict, why, over, claim.source])
    return pd.DataFrame(lines, columns=columns)


def _judge(claim: Claim, results: str | Path) -> Found:
    try:
        if claim.quantity == "macs_saved":
            interval = _saved(claim, results)
        elif claim.quantity == "cell_speedup":
            interval = _sped_up(claim, results)
        elif claim.quantity in CELLS:
            interval = _cells(claim, results)
        elif claim.quantity in TIMED:
            interval = _timed(load_speed(claim.artefact, results), claim)
        else:
            interval = _trained(load_records(claim.artefact, results), claim)
    except FileNotFoundError:
        return None, "not run", "a record is missing"
    if interval is None:
        return None, "not run", "not measured at this scale, or this device cannot run it"
    if interval.empty:
        return None, "undecided", "the two rows share no seed"
    line = interval.iloc[0]
    if line["over"] == "rounds" and line["n"] < MIN_ROUNDS:
        return interval, "undecided", f"{line['n']:.0f} rounds; a 95 % interval needs {MIN_ROUNDS}"
    if line["over"] in ("", "images"):  # one seed, and no row has several
        return interval, "undecided", seeds_needed(line, claim.limit)
    verdict = decide(claim.relation, line["low"], line["high"])
    if verdict != "undecided":
        return interval, verdict, ""
    needed = rounds_needed if line["over"] == "rounds" else seeds_needed
    return interval, verdict, needed(line, claim.limit)


def _trained(runs: pd.DataFrame, claim: Claim) -> pd.DataFrame | None:
    """Interval over seeds and images; None without records. One seed takes its spread from all rows of the artefact."""
    if claim.quantity not in runs or not {*claim.sides} <= set(runs.dropna(subset=[claim.quantity])["row"]):
        return None
    sides = runs[runs["row"].isin(claim.sides)]
    if claim.right is None:
        return mean_interval(sides, claim.quantity, others=runs)
    return paired_difference(sides, claim.quantity, str(claim.right), ratio=claim.ratio, others=runs)


def _timed(speed: pd.DataFrame, claim: Claim) -> pd.DataFrame | None:
    """Two rows are timed in two processes: their difference has the widest interval that both bounds allow."""
    sides = [str(side) for side in claim.sides]
    if claim.quantity not in speed or not {*sides} <= set(speed.dropna(subset=[claim.quantity])["row"]):
        return None
    medians = median_interval(speed[speed["row"].isin(sides)], claim.quantity)
    if claim.right is None:
        return medians
    left, right = (medians.loc[row] for row in sides)
    ends = (left["median"] - right["median"], left["low"] - right["high"], left["high"] - right["low"])
    line = [*ends, min(left["n"], right["n"]), "rounds"]
    return pd.DataFrame([line], columns=["median", "low", "high", "n", "over"])


def _cells(claim: Claim, results: str | Path) -> pd.DataFrame | None:
    """Interval over rounds of the ratio of two cells' times; None if one of them did not run. Cells with the same
    precision, attention kernel and batch size were timed next to the same unpruned model: theirs are divided by its."""
    seconds, macs, settings = [], [], set()
    rounds, cells = load_rounds(claim.artefact, results), load_cells(claim.artefact, results)
    for side in claim.sides:
        times, cell = _chosen(rounds, side), _chosen(cells, side)
        if times is None or cell is None or times["seconds"].isna().any():
            return None
        seconds.append(times.set_index("round"))
        settings.add(str([list(times[key])[:1] for key in (*SETTING, "row") if key in times]))
        macs.append(float(cell["mac_ratio"].iloc[0]) if "mac_ratio" in cell else math.nan)
    paired = len(settings) == 1 and all(
        "base_seconds" in times and times["base_seconds"].notna().all() for times in seconds
    )
    left, right = (times["seconds"] / (times["base_seconds"] if paired else 1) for times in seconds)
    ratio = right / left
    if claim.quantity == "times_as_fast_over_mac_ratio":
        ratio *= 100 * macs[1] / macs[0]
    frame = pd.DataFrame({"row": claim.id, "ratio": ratio.replace([np.inf], np.nan)}).dropna()
    return median_interval(frame, "ratio") if len(frame) else None


def _sped_up(claim: Claim, results: str | Path) -> pd.DataFrame | None:
    """Interval over rounds of a cell's speed-up over the unpruned model beside it, or of the difference of two."""
    rounds, parts = load_rounds(claim.artefact, results), []
    for side in claim.sides:
        times = _chosen(rounds, side)
        if times is None:
            return None
        ratio = times["base_seconds"] / times["seconds"]
        parts.append(pd.DataFrame({"row": str(side), claim.quantity: ratio}))
    return _timed(pd.concat(parts), claim)


def _saved(claim: Claim, results: str | Path) -> pd.DataFrame | None:
    """Share of the unpruned model's multiply-adds that a cell saves, percent."""
    cell = _chosen(load_cells(claim.artefact, results), claim.left)
    if cell is None or cell["mac_ratio"].isna().any():
        return None
    saved = 100 * (1 - 1 / float(cell["mac_ratio"].iloc[0]))
    return pd.DataFrame([[saved, saved, saved, 1, "formula"]], columns=["median", "low", "high", "n", "over"])


def _chosen(frame: pd.DataFrame, side: Any) -> pd.DataFrame | None:
    """Lines whose columns have the values of ``side``; None if there are none."""
    assert isinstance(side, dict), side
    if not side.keys() <= set(frame):
        return None
    found = frame[np.logical_and.reduce([frame[name] == value for name, value in side.items()])]
    if (found["round"] if "round" in found else pd.Series(0, found.index)).duplicated().any():
        raise ValueError(f"a claim's {side} fits several cells; name one")
    return found if len(found) else None
