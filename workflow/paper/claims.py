"""The paper's claims, as ``config/claims.yaml`` states them, and what the records say about each.

A claim compares two rows of one artefact in one quantity: ``left - right`` against a threshold. Without a right row,
the quantity of the left row itself is compared. Accuracies are paired by seed; one seed decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from workflow.paper.load import Artefact
from workflow.paper.quantities import QUANTITIES, quantity
from workflow.paper.stats import MIN_ROUNDS, Interval, Verdict, decide, difference_interval, parse_relation

OUTCOMES = {"holds": "✓ holds", "contradicted": "✗ contradicted", "undecided": "? undecided"}
"""How a verdict is written."""


class Claim(BaseModel):
    """One claim."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    text: str
    """One sentence that a reader understands without the grid."""
    left: str
    right: str | None = None
    """Row that is subtracted."""
    quantity: str | None = None
    """None: the one that the artefact's task is judged by."""
    relation: str
    """``>``, ``<``, ``>= -2.0`` ..., on ``left - right``."""
    source: str
    """Where the paper says so, or that the claim is ours."""
    artefact: str = "imagenet_methods"

    @field_validator("relation")
    @classmethod
    def _readable(cls, value: str) -> str:
        parse_relation(value)
        return value

    @field_validator("quantity")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in QUANTITIES:
            raise ValueError(f"unknown quantity {value!r}; choose one of {', '.join(QUANTITIES)}")
        return value


@dataclass(frozen=True)
class Judgement:
    """A claim and what the records say."""

    claim: Claim
    quantity: str
    """The claim's, or its artefact's."""
    interval: Interval | None
    """Of ``left - right``; None where nothing was measured."""
    verdict: Verdict

    @property
    def measured(self) -> str:
        """The interval with its unit, for a table."""
        if self.interval is None:
            return "—"
        entry = quantity(self.quantity)
        text = self.interval.format(max(entry.digits, 1), self.claim.right is not None)
        return f"{text} points" if self.claim.right is not None and entry.unit == "%" else entry.write(text)


def load_claims(path: str | Path) -> list[Claim]:
    """Read a list of claims.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key, unreadable relation, or an id given twice; names the claim.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no claims; restore it from the repository")
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    entries = entries.get("claims", []) if isinstance(entries, Mapping) else entries
    claims: list[Claim] = []
    for number, entry in enumerate(entries, 1):
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            name = entry.get("id", number) if isinstance(entry, Mapping) else number
            raise ValueError(f"{path}: claim {name}: {key}: {first['msg']}") from None
    ids = [claim.id for claim in claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path}: claim {twice[0]!r} is given twice; ids are unique")
    return claims


def judge(claim: Claim, artefact: Artefact) -> Judgement:
    """Decide a claim by the records of its artefact.

    Raises:
        ValueError: the grid has no such row.
    """
    name = claim.quantity or artefact.primary
    for row in filter(None, (claim.left, claim.right)):
        if row not in artefact.rows:
            raise ValueError(f"claim {claim.id}: {artefact.manifest.artefact} has no row {row!r}; it has "
                             f"{', '.join(artefact.rows)}")  # fmt: skip
        if not artefact.rows[row].available:
            reason = f"{artefact.rows[row].label} is not available: {artefact.rows[row].why}"
            return Judgement(claim, name, None, Verdict("undecided", reason))
    interval = _difference(claim, name, artefact)
    if interval is None:
        return Judgement(claim, name, None, Verdict("undecided", "not measured at this scale"))
    rounds = [artefact.rounds(row) for row in (claim.left, claim.right) if row]
    if quantity(name).timed and min(rounds) < MIN_ROUNDS:
        verdict = Verdict("undecided", f"{min(rounds)} rounds, a 95 % interval takes {MIN_ROUNDS}")
        return Judgement(claim, name, interval, verdict)
    return Judgement(claim, name, interval, decide(claim, interval))


def judge_all(claims: list[Claim], artefacts: Mapping[str, Artefact]) -> list[Judgement]:
    """Decide the claims whose artefact is given, in their order."""
    return [judge(claim, artefacts[claim.artefact]) for claim in claims if claim.artefact in artefacts]


def _difference(claim: Claim, name: str, artefact: Artefact) -> Interval | None:
    left = artefact.interval(claim.left, name)
    if claim.right is None:
        return left
    ours, theirs = artefact.values(claim.left, name), artefact.values(claim.right, name)
    if ours.keys() & theirs.keys():
        return difference_interval(ours, theirs)
    right = artefact.interval(claim.right, name)
    if left is None or right is None:
        return None
    # Two separate measurements: the widest interval that their bounds allow.
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return Interval(left.mean - right.mean, None, None, 1)
    return Interval(left.mean - right.mean, left.low - right.high, left.high - right.low, min(left.n, right.n))
