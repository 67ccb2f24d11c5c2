"""Images per second of a pruned model beside the unpruned one.

A benchmark result is a record, not a number: medians over rounds with their spread, the speed-up with a bootstrap
interval beside the bound of the FLOP count, memory, utilisation, and which attention kernels ran. Weights are random:
speed does not depend on them. Time is that of the forward pass alone, without loading of data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cropr.bench import flops
from cropr.bench.contest import Case, Outcome, contest
from cropr.bench.device import Unsupported, check, largest_batch, weights_dtype
from cropr.bench.models import UNPRUNED, build_variants, random_images, token_trace, weights_mb
from cropr.bench.peak import matmul_peak, utilisation
from cropr.bench.specs import BenchSpec, Precision
from cropr.bench.timing import Tell, ratio, say_nothing, speed, summary
from cropr.records import provenance
from cropr.runtime import reuse_freed_memory

if TYPE_CHECKING:
    from cropr.bench.heads import Heads


@dataclass(frozen=True, slots=True)
class Rest:
    """What follows the encoder of a detector."""

    model: Heads
    precision: Precision


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models of a measurement, on the device and in the precision that they run in."""

    base: nn.Module
    """The unpruned timm model; of a detector, its unpruned encoder."""
    pruned: nn.Module
    """A ``DeployedViT``."""
    sizes: tuple[int, int]
    """Pixels a side of the images of either."""
    rest: Rest | None
    """What follows the encoders of a detector; None for a classifier."""


def measure(spec: BenchSpec, device: str = "cpu", tick: Tell | None = None) -> dict[str, Any]:
    """Measure one row of a throughput table.

    Args:
        spec: both models, image size, batch, precision, attention, rounds.
        device: torch's name of the device.
        tick: called with a word on what comes next before each warm-up and each round.

    Returns:
        The record: ``metrics``, ``tokens`` of the pruned model, ``series`` (seconds per forward pass of either, round
        by round), ``provenance`` with the attention kernels that ran. Metrics are flat numbers: times are medians over
        rounds, ``*_iqr`` interquartile ranges, ``speedup_low`` and ``speedup_high`` a 95 % interval; ``mfu`` is model
        FLOP utilisation; ``working_memory_mb`` is what a forward pass takes besides the weights, read in the second
        warm-up pass, where there is one; ``batch_size`` is that of the spec or, where the device lacks the memory for
        it, the half or less that fitted; ``base_*`` are those of the unpruned model. Of a detector, all this is of its
        encoder; ``*_whole`` are with pyramid and heads, whose seconds, ``series.heads_seconds``, are added to either.
        Where the device cannot run these, ``provenance.heads_unsupported`` says why.

    Raises:
        Unsupported: the device cannot run this precision or kernel, or has no memory for one image.
        ValueError: an impossible model, schedule or reducer, or there is no such device.
    """
    started = time.time()
    tell = tick or say_nothing
    check(spec.precision, device)
    # Otherwise large activations are mapped afresh in every pass, and the unpruned model, whose are larger, pays more
    # page faults: that would flatter pruning.
    reused = reuse_freed_memory() if device == "cpu" else False
    tell("build")
    pair = build(spec, device)
    batch_size, (base, pruned, *rest) = largest_batch(spec.batch_size, partial(_attempt, spec, pair, device, tell))
    tell("matrix product")
    peak = matmul_peak(spec.precision, device)
    counts = flops.macs(pair.base), flops.macs(pair.pruned)
    metrics = {
        **summary(base.seconds, pruned.seconds, batch_size, bound=flops.bound(*counts)),
        "batch_size": batch_size,
        "base_tokens": token_trace(pair.base)[0],
        "matmul_gflops": peak / 1e9,
    }
    for prefix, model, count, outcome in zip(
        ("base_", ""), (pair.base, pair.pruned), counts, (base, pruned), strict=True
    ):
        metrics[f"{prefix}gmacs"] = count.total / 1e9
        if spec.detector is not None:  # published counts of detectors are of this kind
            metrics[f"{prefix}gmacs_linear"] = count.linear / 1e9
        metrics[f"{prefix}weights_mb"] = weights_mb(model)
        metrics[f"{prefix}mfu"] = utilisation(count.total, 1, 1 / metrics[f"{prefix}images_per_s"], peak)
        if outcome.working_memory_mb is not None:
            metrics[f"{prefix}working_memory_mb"] = outcome.working_memory_mb
    series = {"base_seconds": base.seconds, "seconds": pruned.seconds}
    origin: dict[str, Any] = {}
    if pair.rest is not None:
        (heads,) = rest
        origin = {"heads_precision": pair.rest.precision, "heads_unsupported": heads.unsupported}
        if heads.seconds:
            series["heads_seconds"] = heads.seconds
            totals = [count.total + pair.rest.model.macs().total for count in counts]
            metrics |= _whole(series, batch_size) | {"bound_whole": totals[0] / totals[1]}
    return {
        "kind": "bench",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": metrics,
        "tokens": token_trace(pair.pruned),
        "series": series,
        "provenance": provenance(
            started,
            device=device,
            precision=spec.precision,
            attention={"base": base.kernels, "pruned": pruned.kernels},
            freed_memory_reused=reused,
            **origin,
        ),
    }


def build(spec: BenchSpec, device: str) -> Pair:
    """Both models; at equal image sizes the weights of the unpruned one are the very ones of the pruned one's host.

    Raises:
        ValueError: timm has no such model; an impossible schedule or reducer.
    """
    dtype, pruned_size = weights_dtype(spec.precision), spec.pruned_image_size or spec.image_size
    settings = (device, dtype, spec.channels_last, spec.detector)
    models = build_variants(spec.model, {"pruned": spec.prune}, pruned_size, *settings)
    base = models[UNPRUNED]
    if pruned_size != spec.image_size:
        base = build_variants(spec.model, {}, spec.image_size, *settings)[UNPRUNED]
    return Pair(base, models["pruned"], (spec.image_size, pruned_size), _heads(spec, models["pruned"], device))


def _heads(spec: BenchSpec, encoder: Any, device: str) -> Rest | None:
    """What follows a detector's encoder; imported here, so that other measurements do not depend on it."""
    if spec.detector is None:
        return None
    code = import_module("cropr.bench.heads")
    backbone = encoder.model.backbone
    patch = backbone.host.patch_embed.patch_size[0]
    model: Heads = code.Heads(spec.detector, backbone.dim, patch, (spec.image_size // patch,) * 2)
    return Rest(model.to(device).requires_grad_(False).eval(), code.head_precision(spec.precision))


def _whole(series: dict[str, list[float]], batch_size: int) -> dict[str, float]:
    """Speeds of encoder and heads together, of the unpruned model and of the pruned one, and their ratio."""
    base, pruned = (
        [encoder + heads for encoder, heads in zip(series[name], series["heads_seconds"], strict=True)]
        for name in ("base_seconds", "seconds")
    )
    return {
        **ratio("speedup_whole", base, pruned),
        "images_per_s_whole": speed(pruned, batch_size)["images_per_s"],
        "base_images_per_s_whole": speed(base, batch_size)["images_per_s"],
    }


def _attempt(spec: BenchSpec, pair: Pair, device: str, tell: Tell, batch_size: int) -> list[Outcome]:
    """Time both with batches of this size, and the heads of a detector.

    Raises:
        Unsupported: the device cannot run either. Heads that it cannot run say so in their outcome.
    """
    dtype = weights_dtype(spec.precision)
    cases = [
        Case(
            name=name,
            model=model,
            images=random_images(batch_size, size, device, dtype, spec.channels_last),
            precision=spec.precision,
            attention=spec.attention,
            compile=spec.compile,
        )
        for name, model, size in zip(("base", "pruned"), (pair.base, pair.pruned), pair.sizes, strict=True)
    ]
    if (rest := pair.rest) is not None:
        features = torch.randn(batch_size, *rest.model.shape, generator=torch.Generator().manual_seed(0))
        cases.append(Case(name="heads", model=rest.model, images=features.to(device), precision=rest.precision))
    outcomes = contest(cases, spec.rounds, spec.warmup, device, tell)
    for outcome in outcomes[:2]:
        if outcome.unsupported is not None:
            raise Unsupported(outcome.unsupported)
    return outcomes
