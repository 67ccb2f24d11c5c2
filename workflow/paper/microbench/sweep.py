"""Throughput of a model and its pruned variants in every precision with every attention kernel, by batch size.

For one batch size everything takes turns in one process: variants of one setting are compared with its unpruned model,
and every cell with the first setting's unpruned model, so that the gain of a precision or a kernel has an interval too.
"""

from contextlib import suppress
from itertools import groupby
from typing import Any

from cropr.bench.device import Unsupported, check, weights_dtype
from cropr.bench.models import build_variants, matmul_peak, model_metrics, token_trace
from cropr.bench.specs import UNPRUNED
from cropr.bench.timing import Case, Tell, against, ratio, time_interleaved
from cropr.pruning import flops
from workflow.paper.microbench import SweepSpec


def sweep_cells(spec: SweepSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure all cells of a sweep; arguments and errors as of ``microbench.measure.measure``.

    Returns:
        One a place: ``tokens``, and either ``unsupported`` with the reason, or ``metrics`` (as of ``bench``,
        ``speedup`` being over the unpruned model of the same setting, ``gain`` over that of the first setting that
        runs), ``seconds`` (round by round) and ``attention_calls``.
    """
    tell("build")
    # Of models that the device has no arithmetic for, only token counts are read.
    homes = dict.fromkeys(map(weights_dtype, spec.precisions), "meta")
    for precision in spec.precisions:
        with suppress(Unsupported):
            check(precision, device)
            homes[weights_dtype(precision)] = device
    models = {
        dtype: build_variants(spec.model, spec.variants, spec.image_size, home, dtype, spec.channels_last)
        for dtype, home in homes.items()
    }
    macs = {name: flops.macs(model).total for name, model in next(iter(models.values())).items()}
    cells = []
    for batch_size, group in groupby(spec.places(), key=lambda place: place["batch_size"]):
        places = list(group)
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
        unpruned: dict[Any, list[float]] = {}
        for place, case, outcome in zip(
            places, cases, outcomes, strict=True
        ):  # the unpruned model is a setting's first
            cell: dict[str, Any] = {"tokens": token_trace(case.model)}
            cells.append(cell)
            if outcome.unsupported is not None:
                cell["unsupported"] = outcome.unsupported
                continue
            setting, own = (case.precision, case.attention), macs[place["variant"]]
            if place["variant"] == UNPRUNED:
                unpruned[setting] = outcome.seconds
            peak = matmul_peak(case.precision, device)
            metrics = model_metrics(case.model, outcome, fitted, own, peak)
            metrics |= {"batch_size": fitted, "matmul_gflops": peak / 1e9}
            if base := unpruned.get(setting):
                metrics |= against(base, outcome.seconds, macs[UNPRUNED] / own)
                metrics |= ratio("gain", next(iter(unpruned.values())), outcome.seconds)
            cell |= {"metrics": metrics, "seconds": outcome.seconds, "attention_calls": outcome.kernels}
    return cells
