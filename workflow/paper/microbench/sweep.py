"""Throughput of a model and its pruned variants in every precision with every attention kernel, by batch size.

For one batch size everything takes turns in one process. Variants of one setting are compared with its unpruned model,
which runs right before or after each; and every cell with the first setting's unpruned model, so that the gain of a
precision or a kernel has an interval too.
"""

from contextlib import suppress
from itertools import groupby
from typing import Any

from cropr.bench.device import Unsupported, check, weights_dtype
from cropr.bench.models import build_variants, matmul_peak, model_metrics, token_trace
from cropr.bench.specs import UNPRUNED
from cropr.bench.timing import Case, Tell, against, ratio, time_interleaved
from cropr.pruning import flops
from cropr.specs import PruneSpec
from workflow.paper.microbench import SweepSpec


def sweep_cells(spec: SweepSpec, device: str, tell: Tell) -> list[dict[str, Any]]:
    """Measure all cells of a sweep; arguments and errors as of ``microbench.measure.measure``.

    Returns:
        One a place: ``tokens``, and either ``unsupported`` with the reason, or ``metrics`` (as of ``bench``,
        ``speedup`` being over the unpruned model of the same setting, ``gain`` over that of the first setting that
        runs), ``seconds`` (round by round), ``base_seconds`` (the unpruned model's, next to
        them) and ``attention_calls``.
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
    for each in models.values():  # a control is the unpruned model itself: its deployed form takes 0.5 % longer (ViT-L)
        each |= {name: each[UNPRUNED] for name, prune in spec.variants.items() if prune == PruneSpec()}
    macs = {name: flops.macs(model).total for name, model in next(iter(models.values())).items()}
    cells = []
    for batch_size, group in groupby(spec.places(), key=lambda place: place["batch_size"]):
        places = list(group)
        cases, beside = _turns(spec, models, places)
        fitted, outcomes = time_interleaved(cases, batch_size, spec.rounds, spec.warmup, device, tell)
        first: list[float] = []  # of the unpruned model in the first setting that runs
        for place, (own, base) in zip(places, beside, strict=True):
            case, outcome, unpruned = cases[own], outcomes[own], outcomes[base].seconds
            cell: dict[str, Any] = {"tokens": token_trace(case.model)}
            cells.append(cell)
            if outcome.unsupported is not None:
                cell["unsupported"] = outcome.unsupported
                continue
            first = first or unpruned
            peak, cost = matmul_peak(case.precision, device), macs[place["variant"]]
            metrics = model_metrics(case.model, outcome, fitted, cost, peak)
            metrics |= {"batch_size": fitted, "matmul_gflops": peak / 1e9}
            if unpruned:
                metrics |= against(unpruned, outcome.seconds, macs[UNPRUNED] / cost)
                metrics |= ratio("gain", first, outcome.seconds)
                cell["base_seconds"] = unpruned
            cell |= {"metrics": metrics, "seconds": outcome.seconds, "attention_calls": outcome.kernels}
    return cells


def _turns(
    spec: SweepSpec, models: dict[Any, Any], places: list[dict[str, Any]]
) -> tuple[list[Case], list[tuple[int, int]]]:
    """Cases in turns of a variant, the unpruned model and a second variant, so that each is timed next to the unpruned
    model; and for every place, the numbers of its own case and of the unpruned one beside it."""
    cases: list[Case] = []
    beside: list[tuple[int, int]] = []
    for setting, group in groupby(places, key=lambda place: (place["precision"], place["attention"])):
        base, *variants = group  # the unpruned model is a setting's first place
        beside.append((len(cases) + 1,) * 2)
        for number in range(0, len(variants), 2):
            turn, start = variants[number : number + 2], len(cases)
            turn.insert(1, base)
            beside += [(start + k, start + 1) for k in range(0, len(turn), 2)]
            cases += [
                Case(
                    name=f"{place['variant']}, {', '.join(setting)}, batch {place['batch_size']}",
                    model=models[weights_dtype(place["precision"])][place["variant"]],
                    shape=(3, spec.image_size, spec.image_size),
                    precision=place["precision"],
                    attention=place["attention"],
                    channels_last=spec.channels_last,
                    turn=(setting, number),
                )
                for place in turn
            ]
    return cases, beside
