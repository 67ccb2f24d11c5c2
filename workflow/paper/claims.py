"""The paper's claims, as ``config/claims.yaml`` states them, and what the records say about each.

A claim compares two rows of one artefact in one quantity: ``left - right`` against a threshold. Without a right row,
the quantity of the left row itself is compared. It holds if the whole interval lies on the claimed side, and is
contradicted if none of it does.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from workflow.paper.records import REPOSITORY, load_manifest, load_records, load_speed
from workflow.paper.stats import MIN_ROUNDS, mean_interval, median_interval, paired_difference, with_interval

CLAIMS = REPOSITORY / "config" / "claims.yaml"
TIMED = ("speedup", "speedup_over_mac_ratio", "speedup_whole")
"""Quantities of ``load_speed``; their intervals are over the rounds of one process."""
_RELATION = re.compile(r"^\s*(>=|<=|>|<)\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")


class Claim(BaseModel):
    """One claim."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    artefact: str
    text: str
    """One sentence that a reader understands without the grid."""
    left: str
    right: str | None = None
    """Row that is subtracted."""
    quantity: str
    """A metric of training records, or one of ``TIMED``."""
    relation: str
    """``> 0``, ``>= -2``: what ``left - right`` is claimed to be."""
    source: str
    """Where the paper says so, or that the claim is ours."""

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
    """The claims about an artefact: claim, measured, claimed, verdict, why, source.

    Raises:
        ValueError: a claim about a row that the artefact lacks.
    """
    columns = ["claim", "measured", "claimed", "verdict", "why", "source"]
    chosen = [claim for claim in load_claims(path) if claim.artefact == artefact]
    rows = {row["row"]: row for row in load_manifest(artefact, results)["rows"]}
    runs, speed = load_records(artefact, results), load_speed(artefact, results)
    lines = []
    for claim in chosen:
        for row in filter(None, (claim.left, claim.right)):
            if row not in rows:
                raise ValueError(f"claim {claim.id}: {artefact} has no row {row!r}; it has {', '.join(rows)}")
        interval, verdict, why = _judge(claim, speed if claim.quantity in TIMED else runs)
        measured = "" if interval is None else with_interval(interval, 1, signed=claim.right is not None).iloc[0]
        lines.append([claim.text, measured, claim.relation, verdict, why, claim.source])
    return pd.DataFrame(lines, columns=columns)


def _judge(claim: Claim, frame: pd.DataFrame) -> tuple[pd.DataFrame | None, str, str]:
    """Interval of ``left - right``, verdict, and why it is not decided."""
    rows = [claim.left] if claim.right is None else [claim.left, claim.right]
    if claim.quantity not in frame or not set(rows) <= set(frame.dropna(subset=[claim.quantity])["row"]):
        return None, "undecided", "not measured at this scale"
    frame = frame[frame["row"].isin(rows)]
    if claim.quantity in TIMED:
        interval = _timed(median_interval(frame, claim.quantity), claim)
    elif claim.right is None:
        interval = mean_interval(frame, claim.quantity)
    else:
        interval = paired_difference(frame, claim.quantity, claim.right)
    if interval.empty:
        return None, "undecided", "the two rows share no seed"
    low, high, n = interval.iloc[0][["low", "high", "n"]]
    if math.isnan(low):
        return interval, "undecided", "one seed: no interval"
    if claim.quantity in TIMED and n < MIN_ROUNDS:
        return interval, "undecided", f"{n:.0f} rounds; a 95 % interval needs {MIN_ROUNDS}"
    verdict = decide(claim.relation, low, high)
    return interval, verdict, "the interval includes the threshold" if verdict == "undecided" else ""


def _timed(medians: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """Two rows are timed in two processes: their difference has the widest interval that both bounds allow."""
    left: Any = medians.loc[claim.left]
    if claim.right is None:
        return medians
    right: Any = medians.loc[claim.right]
    ends = (left["median"] - right["median"], left["low"] - right["high"], left["high"] - right["low"])
    return pd.DataFrame([[*ends, min(left["n"], right["n"])]], columns=["median", "low", "high", "n"])
