"""From a target to a schedule: measure what the parts of a model cost on a device, then search.

    plan = cropr.plan("vit_large_patch16_224", speedup=1.5)
    model = cropr.prune(vit, plan.schedule, fusion="llf")

"The fewest tokens pruned" needs a shape to be a question at all. If every block could be chosen freely, it would have
one answer for every target: prune all of it after the first block, where a token that goes saves most. That is where
pruning costs most accuracy, which no latency curve knows. So the search runs over families of schedules that the paper
trains, of one number each, and finds the smallest number that reaches the target:

========  ======================================================  ==============
family    prunes                                                  paper
========  ======================================================  ==============
constant  R tokens after every block (the first: R + 1)           R=8, R=40
stages    R tokens after a quarter, half and three quarters       R=50 @ 6,12,18
early     R tokens after an eighth of the depth, all at once      80% @ 3
========  ======================================================  ==============

``auto`` takes the first of them, in this order of lateness, that reaches the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cropr.bench import roofline
from cropr.bench.costs import Costs, load_costs
from cropr.bench.device import Unsupported
from cropr.bench.flops import BlockDims, block_dims, block_macs, macs
from cropr.bench.models import hosted
from cropr.bench.specs import PlanSpec, SweepSpec
from cropr.bench.sweep import sweep_cells
from cropr.bench.timing import Tell, say_nothing
from cropr.pruning.schedule import Schedule, attended, total_pruning_ratio, trace
from cropr.records import provenance
from cropr.runtime import reuse_freed_memory
from cropr.specs import ModelSpec, PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a schedule needs to know of a model."""

    num_patches: int
    depth: int
    prefix: int
    fused: bool
    """Pruned tokens come back before the last block."""
    dims: tuple[BlockDims, ...]
    """Of every block."""
    fixed_macs: int
    """Patch embedding and head. Scoring, less than 0.1 %, is left out."""

    @property
    def last(self) -> int:
        """The last block after which tokens can be pruned."""
        return max(0, self.depth - (2 if self.fused else 1))

    def macs(self, entering: Sequence[int]) -> int:
        """Multiply-accumulates of an image whose blocks compute on these counts."""
        blocks = zip(entering, self.dims, strict=True)
        return self.fixed_macs + sum(block_macs(count, dims) for count, dims in blocks)


@dataclass(frozen=True, slots=True)
class Family:
    """Schedules of one shape, by the number of tokens that go at each place."""

    places: Callable[[Layout], tuple[int, ...]]
    """Blocks to prune after."""
    make: Callable[[int, tuple[int, ...], int], Schedule]
    """From number, places and alignment."""
    extra: int = 0
    """Tokens that the first place prunes on top."""

    def candidates(self, layout: Layout, align: int) -> list[Schedule]:
        """The unpruned model first, then 1, 2, ... tokens at each place while one patch is left."""
        places = self.places(layout)
        largest = (layout.num_patches - 1 - self.extra) // len(places) if places else 0
        return [Schedule.constant(0), *(self.make(number, places, align) for number in range(1, largest + 1))]


def _quarters(layout: Layout) -> tuple[int, ...]:
    found = {round(layout.depth * quarter / 4) for quarter in (1, 2, 3)}
    return tuple(sorted(block for block in found if 1 <= block <= layout.last))


def _stages(number: int, places: tuple[int, ...], align: int) -> Schedule:
    return Schedule.stages(dict.fromkeys(places, number), align=align)


FAMILIES: dict[str, Family] = {
    "constant": Family(
        lambda layout: tuple(range(1, layout.last + 1)),
        lambda number, places, align: Schedule.constant(number, align=align),
        extra=1,
    ),
    "stages": Family(_quarters, _stages),
    "early": Family(lambda layout: (max(1, round(layout.depth / 8)),)[: layout.last], _stages),
}
"""In the order in which ``auto`` tries them: what prunes later comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule and what is predicted of it. Predictions are not measurements: ``verify`` measures."""

    family: str
    schedule: Schedule
    tokens: tuple[int, ...]
    """With prefix, at the input and after every block."""
    pruned: float
    """Share of the patches that is pruned anywhere."""
    speedup: float
    latency_ms: float
    """Of a batch."""
    base_latency_ms: float
    """Of the unpruned model."""
    flops: float
    """Share of the unpruned model's."""

    def reaches(self, quantity: str, target: float) -> bool:
        """Whether the prediction meets the target: at least so fast, or at most so slow or so many FLOPs."""
        value = float(getattr(self, quantity))
        return value >= target if quantity == "speedup" else value <= target


def plan(
    model: str | ModelSpec,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    flops: float | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    reducer: str = "cropr",
    fusion: str = "llf",
    **settings: Any,
) -> Plan:
    """The schedule that reaches a target with the fewest tokens pruned; see the head of this module.

    Args:
        model: timm's name of a ViT or EVA, or a ``ModelSpec``. Weights are random: latency does not depend on them.
        speedup: over the unpruned model, at least. Give one of the three targets.
        latency_ms: milliseconds a batch, at most.
        flops: share of the unpruned model's, at most.
        device: torch's name of the device.
        cache: folder for what was measured; None for ``CROPR_CACHE``, else the user's cache folder.
        reducer: what scores the tokens.
        fusion: ``llf`` or ``none``.
        settings: further fields of ``PlanSpec``: family, align, image_size, batch_size, precision, rounds.

    Raises:
        ValueError: no target or several, a setting that is not allowed, or a target out of reach, with what is not.
    """
    targets = {"speedup": speedup, "latency_ms": latency_ms, "flops": flops}
    given = {quantity: target for quantity, target in targets.items() if target is not None}
    if len(given) != 1:
        raise ValueError(f"give one target of {', '.join(targets)}; got {', '.join(given) or 'none'}")
    ((quantity, target),) = given.items()
    spec = PlanSpec.model_validate(
        {
            "model": {"name": model} if isinstance(model, str) else model,
            "prune": {"reducer": reducer, "fusion": fusion},
            "quantity": quantity,
            "targets": (target,),
            **settings,
        }
    )
    return search(spec, layout_of(spec), load_costs(spec, device, cache))[0]


def search(spec: PlanSpec, layout: Layout, costs: Costs) -> list[Plan]:
    """A plan for every target.

    Raises:
        ValueError: a target out of reach, with the best of each family.
    """
    names = list(FAMILIES) if spec.family == "auto" else [spec.family]
    candidates = {name: predict(name, spec.align, layout, costs) for name in names}
    return [_first(spec, target, candidates) for target in spec.targets]


def predict(family: str, align: int, layout: Layout, costs: Costs) -> list[Plan]:
    """All schedules of a family, the fewest tokens pruned first, with what is predicted of them."""
    patches, depth, prefix = layout.num_patches, layout.depth, layout.prefix
    full = [patches + prefix] * depth
    base = costs.fixed + costs.blocks(full)
    plans = []
    for schedule in FAMILIES[family].candidates(layout, align):
        counts = schedule.resolve(patches, depth, layout.fused, prefix)
        entering = attended(counts, patches, layout.fused, prefix)
        tokens = trace(counts, patches, prefix)
        sites = [entering[b] for b in range(depth - 1) if tokens[b + 1] < tokens[b]]
        seconds = costs.fixed + costs.blocks(entering)
        if sites:
            seconds += costs.reducers(sites) + costs.extra
        plans.append(
            Plan(
                family=family,
                schedule=schedule,
                tokens=tokens,
                pruned=total_pruning_ratio(counts, patches),
                speedup=base / seconds,
                latency_ms=1e3 * seconds,
                base_latency_ms=1e3 * base,
                flops=layout.macs(entering) / layout.macs(full),
            )
        )
    return plans


def layout_of(spec: PlanSpec) -> Layout:
    """Read from the model, which is built without memory.

    Raises:
        ValueError: timm has no such model.
        TypeError: one that no adapter knows.
    """
    model = hosted(spec.model, PruneSpec(), spec.image_size)
    backbone, price = model.backbone, macs(model)
    return Layout(
        num_patches=backbone.num_patches,
        depth=backbone.depth,
        prefix=backbone.prefix,
        fused=spec.prune.fusion == "llf",
        dims=tuple(block_dims(block) for block in backbone.host.blocks),
        fixed_macs=price.patch_embed + price.head,
    )


def run(
    spec: PlanSpec,
    device: str = "cpu",
    cache: Path | None = None,
    fresh: bool = False,
    sheets: Path | None = None,
    tick: Tell | None = None,
) -> dict[str, Any]:
    """Plan every target, measure the plans if the spec says so, and put it all in a record.

    Args:
        spec: model, targets and how to measure.
        device: torch's name of the device.
        cache: see ``load_costs``.
        fresh: measure costs again.
        sheets: data sheets of GPUs, on which to predict the paper's speed-ups; see ``cropr.bench.roofline``.
        tick: called with a word on what comes next.

    Returns:
        The record: ``metrics`` (number of targets and, where they were measured, the largest and the median error of
        the predicted speed-ups in percent), ``series.plans`` (a line a target), ``series.reach`` (the fastest schedule
        of each family), ``series.costs`` (ms of a block and of a reducer by token count), ``series.gpus`` (where
        ``sheets`` are given, a line a row of the paper and GPU), ``provenance``.

    Raises:
        Unsupported: the device cannot run this precision.
        ValueError: a target out of reach, an impossible model.
    """
    started = time.time()
    tell = tick or say_nothing
    reused = reuse_freed_memory() if device == "cpu" else False
    tell("build")
    gpus = roofline.table(sheets) if sheets else []
    layout = layout_of(spec)
    costs = load_costs(spec, device, cache, fresh, tell)
    plans = search(spec, layout, costs)
    lines = [_line(target, found) for target, found in zip(spec.targets, plans, strict=True)]
    metrics: dict[str, float] = {"targets": len(plans)}
    if spec.verify:
        for line, measured in zip(lines, verify(spec, plans, device, tell), strict=True):
            line |= measured
        errors = [abs(line["error_percent"]) for line in lines]
        metrics |= {"largest_error_percent": max(errors), "median_error_percent": float(np.median(errors))}
    names = list(FAMILIES) if spec.family == "auto" else [spec.family]
    return {
        "kind": "plan",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": metrics,
        "series": {
            "plans": lines,
            "reach": [_line(None, predict(name, spec.align, layout, costs)[-1]) for name in names],
            "costs": {
                name: [{"tokens": count, "ms": 1e3 * seconds} for count, seconds in sorted(curve.items())]
                for name, curve in (("block", costs.block), ("reduce", costs.reduce))
            },
            "gpus": gpus,
        },
        "provenance": provenance(started, device=device, precision=spec.precision, freed_memory_reused=reused),
    }


def verify(
    spec: PlanSpec, plans: Sequence[Plan], device: str, tell: Tell = say_nothing
) -> list[dict[str, float | str]]:
    """Measure plans: speed-up with its interval, and by how many percent the prediction is above it.

    All of them take turns with one unpruned model in one process.

    Raises:
        Unsupported: the device cannot run one of them.
    """
    variants = {
        f"plan {number}": spec.prune.model_copy(update={"schedule": found.schedule.to_config()})
        for number, found in enumerate(plans, start=1)
    }
    asked = SweepSpec(
        measure="sweep",
        model=spec.model,
        image_size=spec.image_size,
        variants=variants,
        batch_sizes=[spec.batch_size],
        precisions=[spec.precision],
        rounds=spec.rounds,
    )
    cells = {cell["variant"]: cell for cell in sweep_cells(asked, device, tell)}
    lines: list[dict[str, float | str]] = []
    for name, found in zip(variants, plans, strict=True):
        if "unsupported" in cells[name]:
            raise Unsupported(cells[name]["unsupported"])
        metrics = cells[name]["metrics"]
        measured = {f"measured_{key}": metrics[key] for key in ("speedup", "speedup_low", "speedup_high")}
        lines.append(
            measured
            | {
                "bound": metrics["bound"],
                "measured_latency_ms": 1e3 * float(np.median(cells[name]["seconds"])),
                "error_percent": 100 * (found.speedup / metrics["speedup"] - 1),
                "bench": asked.digest(),
            }
        )
    return lines


def _line(target: float | None, found: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    line: dict[str, Any] = {} if target is None else {"target": target}
    return line | {
        "family": found.family,
        "schedule": found.schedule.to_config(),
        "described": found.schedule.describe(),
        "tokens": list(found.tokens),
        "pruned": found.pruned,
        "predicted_speedup": found.speedup,
        "predicted_latency_ms": found.latency_ms,
        "predicted_base_latency_ms": found.base_latency_ms,
        "predicted_flops": found.flops,
    }


def _first(spec: PlanSpec, target: float, candidates: dict[str, list[Plan]]) -> Plan:
    """The first candidate that reaches the target, family by family."""
    for plans in candidates.values():
        for candidate in plans:
            if candidate.reaches(spec.quantity, target):
                return candidate
    best = {name: max(plans, key=lambda found: found.speedup) for name, plans in candidates.items()}
    reach = ", ".join(f"{name} {found.speedup:.3f}x ({found.schedule.describe()})" for name, found in best.items())
    fix = {
        "speedup": "ask for less",
        "latency_ms": f"at best {min(found.latency_ms for found in best.values()):.3g} ms a batch",
        "flops": f"at best {min(found.flops for found in best.values()):.3g} of the unpruned",
    }[spec.quantity]
    other = ", another family" if spec.family != "auto" else ""
    fusion = " or fusion 'none'" if spec.prune.fusion == "llf" else ""
    raise ValueError(
        f"{spec.quantity} {target:g} is out of reach; the largest speed-up predicted here is {reach}: "
        f"{fix}{other}{fusion}"
    )
