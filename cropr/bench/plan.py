"""From target speed-ups to schedules: by multiply-adds, then corrected by measuring until the device reaches them.

The ratio of multiply-adds that is asked of ``Schedule.for_speedup`` is multiplied by target over measured speed-up, and
the new schedule is measured, until the two agree or no other schedule is found.
"""

from bisect import bisect_left
from collections.abc import Generator
from functools import partial
from typing import Any, TypeAlias

from cropr.bench.device import weights_dtype
from cropr.bench.models import build_on_meta, build_variants
from cropr.bench.specs import PlanSpec
from cropr.bench.timing import Case, Tell, ratio, recorded, time_interleaved
from cropr.pruning.flops import Cost
from cropr.pruning.methods import before_last_block
from cropr.pruning.schedule import Schedule
from cropr.specs import PruneSpec

TOLERANCE = 0.03
"""Largest relative difference between target and measured speed-up."""
ATTEMPTS = 6
"""Schedules measured for one target at most."""
_Search: TypeAlias = Generator[Schedule, Any, dict[str, Any]]


@recorded("plan")
def measure(spec: PlanSpec, device: str, tick: Tell) -> dict[str, Any]:
    """Plan every target; with ``spec.verify``, measure and correct on a device by torch's name; ``tick`` is called with
    each next step. Returns the record: ``cells``, one a target: ``schedule`` as text, ``config`` as
    ``Schedule.from_config`` reads it, ``predicted`` (its ratio of multiply-adds), ``metrics`` (measured ``speedup``),
    ``seconds`` of each round, ``rounds`` (schedules measured), ``reached`` and, if not, ``reason``."""
    tick("count multiply-adds")
    cost = Cost(build_on_meta(spec.model, PruneSpec(), spec.image_size).backbone)
    answers: dict[_Search, Any] = {_search(spec, cost, target): None for target in spec.targets}
    cells: dict[_Search, dict[str, Any]] = {search: {} for search in answers}
    while answers:
        pending = {}
        for search, answer in answers.items():
            try:
                pending[search] = search.send(answer)
            except StopIteration as stop:
                cells[search] = stop.value
        answers = _measure(spec, pending, device, tick) if pending else {}
    reached = sum(cell["reached"] for cell in cells.values())
    return {"metrics": {"targets": len(cells), "reached": reached}, "cells": list(cells.values())}


def _search(spec: PlanSpec, cost: Cost, target: float) -> _Search:
    """Yields schedules to measure, is sent what ``_measure`` gives for each, and returns the line of the record: of
    several schedules the one whose speed-up is closest to the target."""
    asked, reason, planned = target, None, None
    tried: dict[Any, dict[str, Any]] = {}
    try:
        while True:
            schedule = Schedule.for_speedup(max(1.0, asked), cost, fusion=spec.prune.fusion, align=spec.align)
            planned = planned or schedule
            if not spec.verify:
                break
            if schedule in tried:
                schedule = _finer(spec, cost, schedule, asked)
            if schedule in tried or len(tried) == ATTEMPTS:
                got = ", ".join(f"{cell['metrics']['speedup']:.3f} ({s.describe()})" for s, cell in tried.items())
                raise ValueError(f"this device does not reach {target:g} within {TOLERANCE:.0%}; measured: {got}")
            cell = yield schedule
            if "unsupported" in cell:
                raise ValueError(cell["unsupported"])
            tried[schedule] = cell
            speedup = cell["metrics"]["speedup"]
            if abs(speedup / target - 1) <= TOLERANCE:
                break
            asked = mac_ratio(spec, cost, schedule) * target / speedup
    except ValueError as error:
        reason = str(error)
    best = min(tried, key=lambda s: abs(tried[s]["metrics"]["speedup"] - target), default=planned)
    found = tried.get(best, {})
    return {
        "target": target,
        "schedule": best.describe() if best else None,
        "config": best.to_config() if best else None,
        "predicted": mac_ratio(spec, cost, best) if best else None,
        "metrics": {key: found["metrics"][key] for key in ("speedup", "speedup_low", "speedup_high") if found},
        "seconds": found.get("seconds", []),
        "rounds": len(tried),
        "reached": reason is None,
        "reason": reason,
    }


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


def _measure(spec: PlanSpec, pending: dict[_Search, Schedule], device: str, tell: Tell) -> dict[_Search, Any]:
    """Measure the pending schedules; all take turns with one unpruned model in one process."""
    prunes = (spec.prune.model_copy(update={"schedule": own.to_config()}) for own in pending.values())
    variants = {f"schedule {number}": prune for number, prune in enumerate(prunes, 1)}
    tell("build")
    models = build_variants(spec.model, variants, spec.image_size, device, weights_dtype(spec.precision))
    shape = (3, spec.image_size, spec.image_size)
    cases = [Case(name=name, model=model, shape=shape, precision=spec.precision) for name, model in models.items()]
    _, (base, *outcomes) = time_interleaved(cases, spec.batch_size, spec.rounds, 1, device, tell)
    cells = dict[_Search, Any]()
    for search, own in zip(pending, outcomes, strict=True):
        if reason := base.unsupported or own.unsupported:
            cells[search] = {"unsupported": reason}
        else:
            cells[search] = {"metrics": ratio("speedup", base.seconds, own.seconds), "seconds": own.seconds}
    return cells
