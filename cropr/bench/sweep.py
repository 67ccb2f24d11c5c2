"""Throughput of a model and its pruned variants in every precision with every attention kernel, by batch size.

For one batch size everything takes turns in one process: variants of one setting are compared with its unpruned model,
and every cell with the first setting's unpruned model, so that the gain of a precision or a kernel has an interval too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from cropr.bench.device import DTYPES, Unsupported, check, largest_batch, weights_dtype
from cropr.bench.models import UNPRUNED, build_variants, model_metrics, random_images, token_trace
from cropr.bench.peak import matmul_peak
from cropr.bench.specs import SweepSpec
from cropr.bench.timing import Case, Outcome, Tell, against, ratio, time_interleaved
from cropr.pruning import flops

Models = Mapping[torch.dtype, Mapping[str, nn.Module]]
"""By dtype of their weights and by variant."""


class Setting(NamedTuple):
    """How one cell of the sweep runs."""

    precision: str
    attention: str
    variant: str


def sweep_cells(spec: SweepSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure all cells of a sweep; arguments and errors as of ``cropr.bench.microbench.measure``.

    Returns:
        One a combination: ``variant``, ``precision``, ``attention``, ``batch_size`` (asked for),
        ``tokens``, and either ``unsupported`` with the reason, or ``metrics`` (as of ``bench``, ``speedup`` being over
        the unpruned model of the same setting, ``gain`` over that of the first setting that runs), ``seconds`` (round
        by round) and ``attention_calls``.
    """
    tell("build")
    # Of models that the device has no arithmetic for, only token counts are read.
    models = {
        dtype: build_variants(
            spec.model, spec.variants, spec.image_size, device if _runs(dtype, device) else "meta", dtype,
            spec.channels_last,
        )
        for dtype in dict.fromkeys(weights_dtype(precision) for precision in spec.precisions)
    }  # fmt: skip
    macs = {name: flops.macs(model).total for name, model in next(iter(models.values())).items()}
    return [cell for size in spec.batch_sizes for cell in _batch(spec, models, macs, size, device, tell)]


def _runs(dtype: torch.dtype, device: str) -> bool:
    try:
        check(next(name for name, kind in DTYPES.items() if kind == dtype), device)
    except Unsupported:
        return False
    return True


def _batch(
    spec: SweepSpec, models: Models, macs: Mapping[str, int], batch_size: int, device: str, tell: Tell
) -> list[dict[str, Any]]:
    """The cells of one batch size."""
    settings = [Setting(*values) for values in product(spec.precisions, spec.attentions, macs)]
    try:
        fitted, outcomes = largest_batch(batch_size, partial(_attempt, spec, models, settings, device, tell))
    except Unsupported as error:
        fitted, outcomes = batch_size, [Outcome(unsupported=str(error)) for _ in settings]
    found = dict(zip(settings, outcomes, strict=True))
    first = next((found[s].seconds for s in settings if s.variant == UNPRUNED and found[s].seconds), [])
    cells = []
    for setting, outcome in found.items():
        model = models[weights_dtype(setting.precision)][setting.variant]
        cell: dict[str, Any] = {**setting._asdict(), "batch_size": batch_size, "tokens": token_trace(model)}
        if outcome.unsupported is not None:
            cells.append(cell | {"unsupported": outcome.unsupported})
            continue
        peak = matmul_peak(setting.precision, device)
        metrics = model_metrics(model, outcome, fitted, macs[setting.variant], peak)
        metrics |= {"batch_size": fitted, "matmul_gflops": peak / 1e9}
        if base := found[setting._replace(variant=UNPRUNED)].seconds:
            metrics |= against(base, outcome.seconds, macs[UNPRUNED] / macs[setting.variant])
        metrics |= ratio("gain", first, outcome.seconds) if first else {}
        cells.append(cell | {"metrics": metrics, "seconds": outcome.seconds, "attention_calls": outcome.kernels})
    return cells


def _attempt(
    spec: SweepSpec, models: Models, settings: Sequence[Setting], device: str, tell: Tell, batch_size: int
) -> list[Outcome]:
    """Time all settings with batches of this size."""
    cases = []
    for setting in settings:
        dtype = weights_dtype(setting.precision)
        images = random_images(batch_size, spec.image_size, device, dtype, spec.channels_last)
        name = f"{setting.variant}, {setting.precision}, {setting.attention}, batch {batch_size}"
        model, precision, attention = models[dtype][setting.variant], setting.precision, setting.attention
        cases.append(Case(name=name, model=model, images=images, precision=precision, attention=attention))
    return time_interleaved(cases, spec.rounds, spec.warmup, device, tell)
