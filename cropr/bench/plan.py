"""From target speed-ups to schedules: by multiply-adds, then corrected by measuring until the device reaches them.

Time is not proportional to multiply-adds, and by how much it deviates depends on the device. So the ratio of
multiply-adds that is asked of ``Schedule.for_speedup`` is multiplied by target over measured speed-up, and the new
schedule is measured, until the two agree or no other schedule is found. No model of the device is needed.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cropr.bench.models import build_on_meta
from cropr.bench.specs import PlanSpec, SweepSpec
from cropr.bench.sweep import sweep_cells
from cropr.bench.timing import Tell, no_progress
from cropr.pruning.flops import Cost
from cropr.pruning.methods import before_last_block
from cropr.pruning.schedule import Schedule
from cropr.records import provenance
from cropr.runtime import reuse_freed_memory
from cropr.specs import PruneSpec

TOLERANCE = 0.03
"""Largest relative difference between target and measured speed-up."""
ATTEMPTS = 6
"""Schedules measured for one target at most."""


@dataclass(slots=True)
class _Attempt:
    """A schedule and, where it was measured, its cell of a sweep."""

    schedule: Schedule
    mac_ratio: float
    cell: dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Measured."""
        return float(self.cell["metrics"]["speedup"])


@dataclass(slots=True)
class _Search:
    """The schedules that were tried for one target."""

    target: float
    tried: list[_Attempt] = field(default_factory=list)
    reason: str | None = None
    """Why the search ended without success."""
    open: bool = True

    @property
    def best(self) -> _Attempt | None:
        """The one whose speed-up is closest to the target."""
        measured = [attempt for attempt in self.tried if "metrics" in attempt.cell]
        if not measured:
            return self.tried[-1] if self.tried else None
        return min(measured, key=lambda attempt: abs(attempt.speedup - self.target))

    def cell(self, verify: bool) -> dict[str, Any]:
        """The line of the record."""
        best = self.best
        found = best.cell.get("metrics", {}) if best else {}
        return {
            "target": self.target,
            "schedule": best and best.schedule.describe(),
            "config": best and best.schedule.to_config(),
            "predicted": best and best.mac_ratio,
            "metrics": {key: found[key] for key in ("speedup", "speedup_low", "speedup_high") if key in found},
            "seconds": best.cell.get("seconds", []) if best else [],
            "rounds": len(self.tried) if verify else 0,
            "reached": self.reason is None,
            "reason": self.reason,
        }


def measure(spec: PlanSpec, device: str = "cpu", tick: Tell | None = None) -> dict[str, Any]:
    """Plan every target; with ``spec.verify``, measure and correct.

    Args:
        spec: model, targets and how to measure.
        device: torch's name of the device.
        tick: called with a word on what comes next.

    Returns:
        The record: ``cells``, one a target: ``schedule`` as text, ``config`` as ``Schedule.from_config`` reads it,
        ``predicted`` (its ratio of multiply-adds), ``metrics`` (measured ``speedup`` with its 95 % interval),
        ``seconds`` (of a pass, round by round), ``rounds`` (how many schedules were measured), ``reached`` and, if not,
        ``reason``.

    Raises:
        ValueError: timm has no such model, or there is no such device.
    """
    started = time.time()
    tell = tick or no_progress
    reused = device == "cpu" and reuse_freed_memory()
    tell("count multiply-adds")
    cost = Cost(build_on_meta(spec.model, PruneSpec(), spec.image_size).backbone)
    searches = [_Search(target) for target in spec.targets]
    for search in searches:
        _propose(spec, cost, search, search.target)
    while spec.verify and (pending := [search for search in searches if search.open]):
        _measure(spec, pending, device, tell)
        for search in pending:
            _correct(spec, cost, search)
    cells = [search.cell(spec.verify) for search in searches]
    return {
        "kind": "plan",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": {"targets": len(cells), "reached": sum(cell["reached"] for cell in cells)},
        "cells": cells,
        "provenance": provenance(started, device=device, precision=spec.precision, freed_memory_reused=reused),
    }


def _propose(spec: PlanSpec, cost: Cost, search: _Search, mac_ratio: float) -> None:
    """Add the schedule for a ratio of multiply-adds, or end the search with the reason."""
    try:
        schedule = Schedule.for_speedup(max(1.0, mac_ratio), cost, fusion=spec.prune.fusion, align=spec.align)
    except ValueError as error:
        search.open, search.reason = False, str(error)
        return
    tried = [attempt.schedule for attempt in search.tried]
    if schedule in tried:
        schedule = _finer(spec, cost, schedule, mac_ratio)
    if schedule in tried or len(tried) == ATTEMPTS:
        search.open = False
        measured = ", ".join(f"{attempt.speedup:.3f} ({attempt.schedule.describe()})" for attempt in search.tried)
        search.reason = f"this device does not reach {search.target:g} within {TOLERANCE:.0%}; measured: {measured}"
        return
    search.tried.append(_Attempt(schedule, _mac_ratio(spec, cost, schedule)))


def _finer(spec: PlanSpec, cost: Cost, schedule: Schedule, mac_ratio: float) -> Schedule:
    """Of a constant rate R, the rate R - 1 with as few tokens more in the first module as reach the ratio."""
    if schedule.rule != "constant" or schedule.rate < 2:
        return schedule
    extras = [
        Schedule.constant(schedule.rate - 1, extra, spec.align)
        for extra in range(1, 1 + len(schedule.sites(cost.backbone.depth, before_last_block(spec.prune.fusion))))
    ]
    found = bisect_left(extras, mac_ratio, key=partial(_mac_ratio, spec, cost))
    return extras[found] if found < len(extras) else schedule


def _mac_ratio(spec: PlanSpec, cost: Cost, schedule: Schedule) -> float:
    """Unpruned over pruned multiply-adds."""
    backbone, fused = cost.backbone, before_last_block(spec.prune.fusion)
    alive = schedule.resolve(backbone.num_patches, backbone.depth, fused, backbone.prefix)
    return cost.total((backbone.num_patches,) * backbone.depth, fused) / cost.total(alive, fused)


def _measure(spec: PlanSpec, searches: list[_Search], device: str, tell: Tell) -> None:
    """Measure the last schedule of every search; all take turns with one unpruned model in one process."""
    attempts = {f"target {search.target:g}": search.tried[-1] for search in searches}
    variants = {
        name: spec.prune.model_copy(update={"schedule": attempt.schedule.to_config()})
        for name, attempt in attempts.items()
    }
    sweep = SweepSpec(
        measure="sweep",
        model=spec.model,
        image_size=spec.image_size,
        variants=variants,
        batch_sizes=[spec.batch_size],
        precisions=[spec.precision],
        rounds=spec.rounds,
    )
    for cell in sweep_cells(sweep, device, tell):
        if cell["variant"] in attempts:
            attempts[cell["variant"]].cell = cell


def _correct(spec: PlanSpec, cost: Cost, search: _Search) -> None:
    """End the search where its target is met or nothing can be measured; else propose the next schedule."""
    last = search.tried[-1]
    if "unsupported" in last.cell:
        search.open, search.reason = False, last.cell["unsupported"]
    elif abs(last.speedup / search.target - 1) <= TOLERANCE:
        search.open = False
    else:
        _propose(spec, cost, search, last.mac_ratio * search.target / last.speedup)
