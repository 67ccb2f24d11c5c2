"""Throughput of a model and its pruned variants in every precision with every attention kernel, by batch size.

For one batch size everything takes turns in one process: variants of one setting are compared with its unpruned model,
and every cell with the first setting's unpruned model, so that the gain of a precision or a kernel has an interval too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn

from cropr.bench.device import DTYPES, Unsupported, check, weights_dtype
from cropr.bench.models import build_variants, matmul_peak, model_metrics, token_trace
from cropr.bench.specs import UNPRUNED, SweepSpec
from cropr.bench.timing import Case, Tell, against, ratio, time_interleaved
from cropr.pruning import flops


def sweep_cells(spec: SweepSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure all cells of a sweep; arguments and errors as of ``cropr.bench.microbench.measure``.

    Returns:
        One a place: ``tokens``, and either ``unsupported`` with the reason, or ``metrics`` (as of ``bench``,
        ``speedup`` being over the unpruned model of the same setting, ``gain`` over that of the first setting that
        runs), ``seconds`` (round by round) and ``attention_calls``.
    """
    tell("build")
    # Of models that the device has no arithmetic for, only token counts are read.
    models = {
        dtype: build_variants(
            spec.model, spec.variants, spec.image_size, device if _runs(dtype, device) else "meta", dtype,
            spec.channels_last,
        )
        for dtype in dict.fromkeys(map(weights_dtype, spec.precisions))
    }  # fmt: skip
    macs = {name: flops.macs(model).total for name, model in next(iter(models.values())).items()}
    groups = groupby(spec.places(), key=lambda place: place["batch_size"])
    return [cell for size, places in groups for cell in _batch(spec, models, macs, size, list(places), device, tell)]


def _runs(dtype: torch.dtype, device: str) -> bool:
    try:
        check(next(name for name, kind in DTYPES.items() if kind == dtype), device)
    except Unsupported:
        return False
    return True


def _batch(
    spec: SweepSpec,
    models: Mapping[torch.dtype, Mapping[str, nn.Module]],
    macs: Mapping[str, int],
    batch_size: int,
    places: list[dict[str, Any]],
    device: str,
    tell: Tell,
) -> list[dict[str, Any]]:
    """The cells of one batch size."""
    cases = [
        Case(
            name=f"{place['variant']}, {place['precision']}, {place['attention']}, batch {batch_size}",
            model=models[weights_dtype(place["precision"])][place["variant"]],
            shape=(3, spec.image_size, spec.image_size),
            precision=place["precision"],
            attention=place["attention"],
            channels_last=spec.channels_last,
        )
        for place in places
    ]
    fitted, outcomes = time_interleaved(cases, batch_size, spec.rounds, spec.warmup, device, tell)
    unpruned = {
        (case.precision, case.attention): outcome.seconds
        for case, outcome, place in zip(cases, outcomes, places, strict=True)
        if place["variant"] == UNPRUNED and outcome.seconds
    }
    cells = []
    for place, case, outcome in zip(places, cases, outcomes, strict=True):
        cell: dict[str, Any] = {"tokens": token_trace(case.model)}
        if outcome.unsupported is not None:
            cells.append(cell | {"unsupported": outcome.unsupported})
            continue
        peak, own = matmul_peak(case.precision, device), macs[place["variant"]]
        metrics = model_metrics(case.model, outcome, fitted, own, peak)
        metrics |= {"batch_size": fitted, "matmul_gflops": peak / 1e9}
        if base := unpruned.get((case.precision, case.attention)):
            metrics |= against(base, outcome.seconds, macs[UNPRUNED] / own)
            metrics |= ratio("gain", next(iter(unpruned.values())), outcome.seconds)
        cells.append(cell | {"metrics": metrics, "seconds": outcome.seconds, "attention_calls": outcome.kernels})
    return cells
