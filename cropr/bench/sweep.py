"""Throughput of a model and its pruned variants in every precision with every attention kernel, by batch size.

For one batch size everything takes turns in one process: variants of one setting are compared with its unpruned model,
and every cell with the first setting's unpruned model, so that the gain of a precision or a kernel has an interval too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from cropr.bench import flops
from cropr.bench.contest import Case, Outcome, contest
from cropr.bench.device import Unsupported, check, largest_batch, weights_dtype
from cropr.bench.models import UNPRUNED, build_variants, random_images, token_trace, weights_mb
from cropr.bench.peak import matmul_peak, utilisation
from cropr.bench.specs import SweepSpec
from cropr.bench.timing import Tell, against, ratio, speed


@dataclass(frozen=True, slots=True)
class Setting:
    """How one cell of the sweep runs."""

    precision: str
    attention: str
    variant: str


@dataclass(frozen=True, slots=True)
class Hosts:
    """The models by dtype of their weights, and what they multiply."""

    models: dict[torch.dtype, dict[str, nn.Module]]
    macs: dict[str, flops.Macs]
    tokens: dict[str, list[int]]


def sweep_cells(spec: SweepSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure all cells of a sweep; arguments and errors as of ``cropr.bench.lab.measure``.

    Returns:
        One a combination: ``variant``, ``precision``, ``attention``, ``batch_size`` (asked for),
        ``tokens``, and either ``unsupported`` with the reason, or ``metrics`` (as of ``bench``, ``speedup`` being over
        the unpruned model of the same setting, ``gain`` over that of the first setting that runs), ``seconds`` (round
        by round) and ``attention_calls``.
    """
    tell("build")
    hosts = _build(spec, device)
    cells: list[dict[str, Any]] = []
    for batch_size in spec.batch_sizes:
        cells += _batch(spec, hosts, batch_size, device, tell)
    return cells


def settings(spec: SweepSpec) -> list[Setting]:
    """All combinations, the unpruned model of each precision and kernel before its variants."""
    return [Setting(*values) for values in product(spec.precisions, spec.attentions, (UNPRUNED, *spec.variants))]


def _build(spec: SweepSpec, device: str) -> Hosts:
    """A host with its variants for every dtype that some precision stores weights in and the device computes in."""
    dtypes = dict.fromkeys(weights_dtype(precision) for precision in spec.precisions if _runs(precision, device))
    models = {
        dtype: build_variants(spec.model, spec.variants, spec.image_size, device, dtype, spec.channels_last)
        for dtype in dtypes
    }
    if not models:  # for the token counts and FLOPs of cells that say why they were not measured
        models = {torch.float32: build_variants(spec.model, spec.variants, spec.image_size, "meta", torch.float32)}
    some = next(iter(models.values()))
    return Hosts(
        models,
        {name: flops.macs(model) for name, model in some.items()},
        {name: token_trace(model) for name, model in some.items()},
    )


def _runs(precision: str, device: str) -> bool:
    try:
        check(precision, device)
    except Unsupported:
        return False
    return True


def _batch(spec: SweepSpec, hosts: Hosts, batch_size: int, device: str, tell: Tell) -> list[dict[str, Any]]:
    """The cells of one batch size."""
    chosen = settings(spec)
    try:
        fitted, outcomes = largest_batch(batch_size, partial(_attempt, spec, hosts, chosen, device, tell))
    except Unsupported as error:
        fitted, outcomes = batch_size, [Outcome(unsupported=str(error)) for _ in chosen]
    by_setting = dict(zip(chosen, outcomes, strict=True))
    first = next((s for s in chosen if s.variant == UNPRUNED and by_setting[s].seconds), None)
    cells = []
    for setting, outcome in by_setting.items():
        cell: dict[str, Any] = {
            "variant": setting.variant,
            "precision": setting.precision,
            "attention": setting.attention,
            "batch_size": batch_size,
            "tokens": hosts.tokens[setting.variant],
        }
        if outcome.unsupported is not None:
            cells.append(cell | {"unsupported": outcome.unsupported})
            continue
        assert first is not None
        base = by_setting[Setting(setting.precision, setting.attention, UNPRUNED)]
        metrics = _metrics(hosts, setting, outcome, fitted, device)
        if base.seconds:
            bound = flops.bound(hosts.macs[UNPRUNED], hosts.macs[setting.variant])
            metrics |= against(base.seconds, outcome.seconds, bound)
        metrics |= ratio("gain", by_setting[first].seconds, outcome.seconds)
        cells.append(cell | {"metrics": metrics, "seconds": outcome.seconds, "attention_calls": outcome.kernels})
    return cells


def _attempt(
    spec: SweepSpec, hosts: Hosts, chosen: Sequence[Setting], device: str, tell: Tell, batch_size: int
) -> list[Outcome]:
    """Time all settings with batches of this size."""
    outcomes = [Outcome() for _ in chosen]
    cases: dict[int, Case] = {}
    for number, setting in enumerate(chosen):
        try:
            check(setting.precision, device)
        except Unsupported as error:
            outcomes[number].unsupported = str(error)
            continue
        dtype = weights_dtype(setting.precision)
        cases[number] = Case(
            name=f"{setting.variant}, {setting.precision}, {setting.attention}, batch {batch_size}",
            model=hosts.models[dtype][setting.variant],
            images=random_images(batch_size, spec.image_size, device, dtype, spec.channels_last),
            precision=setting.precision,
            attention=setting.attention,
        )
    for number, outcome in zip(
        cases, contest(list(cases.values()), spec.rounds, spec.warmup, device, tell), strict=True
    ):
        outcomes[number] = outcome
    return outcomes


def _metrics(hosts: Hosts, setting: Setting, outcome: Outcome, batch_size: int, device: str) -> dict[str, float]:
    """What is measured of one cell alone."""
    found = speed(outcome.seconds, batch_size)
    macs = hosts.macs[setting.variant].total
    peak = matmul_peak(setting.precision, device)
    found |= {
        "batch_size": batch_size,
        "gmacs": macs / 1e9,
        "mfu": utilisation(macs, 1, 1 / found["images_per_s"], peak),
        "matmul_gflops": peak / 1e9,
        "weights_mb": weights_mb(hosts.models[weights_dtype(setting.precision)][setting.variant]),
    }
    if outcome.working_memory_mb is not None:
        found["working_memory_mb"] = outcome.working_memory_mb
    return found
