"""From target speed-ups to schedules: by multiply-adds, then corrected by measuring until the device reaches them.

Time is not proportional to multiply-adds, and by how much it deviates depends on the device. So the ratio of
multiply-adds that is asked of ``Schedule.for_speedup`` is multiplied by target over measured speed-up, and the new
schedule is measured, until the two agree or no other schedule is found. No model of the device is needed.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from functools import partial
from typing import Any

from cropr.bench.models import build_on_meta
from cropr.bench.specs import PlanSpec, SweepSpec
from cropr.bench.sweep import sweep_cells
from cropr.bench.timing import Tell, no_progress
from cropr.pruning.flops import Cost
from cropr.pruning.methods import before_last_block
from cropr.pruning.schedule import Schedule
from cropr.records import make_record
from cropr.specs import PruneSpec
from cropr.training.distributed import reuse_freed_memory

TOLERANCE = 0.03
"""Largest relative difference between target and measured speed-up."""
ATTEMPTS = 6
"""Schedules measured for one target at most."""


def measure(spec: PlanSpec, device: str = "cpu", tick: Tell = no_progress) -> dict[str, Any]:
    """Plan every target; with ``spec.verify``, measure and correct on a device by torch's name; ``tick`` is called with
    each next step.

    Returns:
        The record: ``cells``, one a target: ``schedule`` as text, ``config`` as ``Schedule.from_config`` reads it,
        ``predicted`` (its ratio of multiply-adds), ``metrics`` (measured ``speedup`` with its 95 % interval),
        ``seconds`` (of a pass, round by round), ``rounds`` (how many schedules were measured), ``reached`` and, if not,
        ``reason``.

    Raises:
        ValueError: timm has no such model, or there is no such device.
    """
    started = time.time()
    reused = device == "cpu" and reuse_freed_memory()
    tick("count multiply-adds")
    cost = Cost(build_on_meta(spec.model, PruneSpec(), spec.image_size).backbone)
    searches = [_Search(spec, cost, target) for target in spec.targets]
    while spec.verify and (pending := [search for search in searches if search.pending]):
        _measure(spec, pending, device, tick)
    cells = [search.cell() for search in searches]
    found = {"metrics": {"targets": len(cells), "reached": sum(cell["reached"] for cell in cells)}, "cells": cells}
    return make_record("plan", spec, started, found, device=device, freed_memory_reused=reused)


class _Search:
    """The schedules that are tried for one target."""

    def __init__(self, spec: PlanSpec, cost: Cost, target: float) -> None:
        self.spec, self.cost, self.target = spec, cost, target
        self.pending: Schedule | None = None
        """To be measured next."""
        self.tried: dict[Schedule, dict[str, Any]] = {}
        """Schedule -> its cell of a sweep."""
        self.reason: str | None = None
        """Why the target is not reached."""
        self._propose(target)
        self.planned = self.pending

    def take(self, cell: dict[str, Any]) -> None:
        """The measurement of the pending schedule; decides what is measured next."""
        assert self.pending is not None
        schedule, self.pending = self.pending, None
        if "unsupported" in cell:
            self.reason = cell["unsupported"]
            return
        self.tried[schedule] = cell
        speedup = cell["metrics"]["speedup"]
        if abs(speedup / self.target - 1) > TOLERANCE:
            self._propose(mac_ratio(self.spec, self.cost, schedule) * self.target / speedup)

    def cell(self) -> dict[str, Any]:
        """The line of the record; of several schedules the one whose speed-up is closest to the target."""
        best = min(
            self.tried, key=lambda s: abs(self.tried[s]["metrics"]["speedup"] - self.target), default=self.planned
        )
        found = self.tried.get(best, {}) if best else {}
        return {
            "target": self.target,
            "schedule": best.describe() if best else None,
            "config": best.to_config() if best else None,
            "predicted": mac_ratio(self.spec, self.cost, best) if best else None,
            "metrics": {key: found["metrics"][key] for key in ("speedup", "speedup_low", "speedup_high") if found},
            "seconds": found.get("seconds", []),
            "rounds": len(self.tried),
            "reached": self.reason is None,
            "reason": self.reason,
        }

    def _propose(self, asked: float) -> None:
        """Find a schedule for a ratio of multiply-adds that was not tried before, or end with the reason."""
        spec = self.spec
        try:
            schedule = Schedule.for_speedup(max(1.0, asked), self.cost, fusion=spec.prune.fusion, align=spec.align)
        except ValueError as error:
            self.reason = str(error)
            return
        if schedule in self.tried:
            schedule = _finer(spec, self.cost, schedule, asked)
        if schedule not in self.tried and len(self.tried) < ATTEMPTS:
            self.pending = schedule
            return
        measured = ", ".join(f"{cell['metrics']['speedup']:.3f} ({s.describe()})" for s, cell in self.tried.items())
        self.reason = f"this device does not reach {self.target:g} within {TOLERANCE:.0%}; measured: {measured}"


def mac_ratio(spec: PlanSpec, cost: Cost, schedule: Schedule) -> float:
    """Unpruned over pruned multiply-adds."""
    backbone, fused = cost.backbone, before_last_block(spec.prune.fusion)
    alive = schedule.resolve(backbone.num_patches, backbone.depth, fused, backbone.prefix)
    return cost.total((backbone.num_patches,) * backbone.depth, fused) / cost.total(alive, fused)


def _finer(spec: PlanSpec, cost: Cost, schedule: Schedule, asked: float) -> Schedule:
    """Of a constant rate R, the rate R - 1 with as few tokens more in the first module as reach the ratio."""
    sites = schedule.sites(cost.backbone.depth, before_last_block(spec.prune.fusion))
    if schedule.rule != "constant" or schedule.rate < 2:
        return schedule
    finer = [Schedule.constant(schedule.rate - 1, extra + 1, spec.align) for extra in range(len(sites))]
    found = bisect_left(finer, asked, key=partial(mac_ratio, spec, cost))
    return finer[found] if found < len(finer) else schedule


def _measure(spec: PlanSpec, searches: list[_Search], device: str, tell: Tell) -> None:
    """Measure the pending schedules; all take turns with one unpruned model in one process."""
    pending = {f"target {search.target:g}": search for search in searches}
    variants = {
        name: spec.prune.model_copy(update={"schedule": search.pending.to_config()})
        for name, search in pending.items()
        if search.pending
    }
    same: dict[str, Any] = {key: getattr(spec, key) for key in ("model", "image_size", "rounds")}
    how = {"batch_sizes": [spec.batch_size], "precisions": [spec.precision]}
    sweep = SweepSpec(measure="sweep", variants=variants, **same, **how)
    for place, cell in zip(sweep.places(), sweep_cells(sweep, device, tell), strict=True):
        if place["variant"] in pending:
            pending[place["variant"]].take(cell)
