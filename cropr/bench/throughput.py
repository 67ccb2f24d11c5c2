"""Images per second of a pruned model beside the unpruned one.

A record holds medians over rounds with their spread, the speed-up with a bootstrap interval beside the ratio of
multiply-adds, memory, utilisation, and which attention kernels ran. Weights are random: speed does not depend on them.
Timed is the forward pass alone, without loading of data.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from cropr.bench.device import Unsupported, check, weights_dtype
from cropr.bench.microbench import recorded
from cropr.bench.models import build_variants, matmul_peak, model_metrics, token_trace
from cropr.bench.specs import UNPRUNED, BenchSpec, Precision
from cropr.bench.timing import Case, Tell, against, ratio, speed, time_interleaved
from cropr.pruning import flops

if TYPE_CHECKING:
    from cropr.bench.heads import Heads


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models of a measurement, on the device in their precision, and what follows a detector's encoders."""

    base: nn.Module
    """The unpruned timm model; of a detector, its unpruned encoder."""
    pruned: nn.Module
    """A ``DeployedViT``."""
    sizes: tuple[int, int]
    """Pixels a side of the images of either."""
    heads: Heads | None
    heads_precision: Precision


@recorded
def measure(spec: BenchSpec, device: str, tick: Tell) -> dict[str, Any]:
    """Measure one row of a throughput table on a device, by torch's name; ``tick`` is called with each next step.

    Returns:
        The record: ``metrics``, ``tokens`` of the pruned model, ``series`` (seconds per forward pass of either, round
        by round), ``provenance`` with the attention kernels that ran. Metrics are medians over rounds, ``*_iqr`` their
        interquartile ranges, ``*_low`` and ``*_high`` a 95 % interval, ``base_*`` those of the unpruned model;
        ``working_memory_mb`` is the memory of a forward pass besides the weights, and ``batch_size`` the one that
        fitted. Of a detector, all this is of its encoder; ``*_whole`` are with pyramid and heads, whose seconds are
        added to either. Where the device cannot run these, ``provenance.heads_unsupported`` is the reason.

    Raises:
        ValueError: an impossible model, schedule or reducer, or there is no such device.
    """
    check(spec.precision, device)
    tick("build")
    pair = build(spec, device)
    batch_size, (base, pruned, *rest) = time_interleaved(
        _cases(spec, pair), spec.batch_size, spec.rounds, spec.warmup, device, tick
    )
    if reason := base.unsupported or pruned.unsupported:
        raise Unsupported(reason)
    tick("matrix product")
    peak = matmul_peak(spec.precision, device)
    base_macs, macs = flops.macs(pair.base), flops.macs(pair.pruned)
    unpruned = model_metrics(pair.base, base, batch_size, base_macs.total, peak)
    metrics = {
        **{f"base_{name}": value for name, value in unpruned.items()},
        **model_metrics(pair.pruned, pruned, batch_size, macs.total, peak),
        **against(base.seconds, pruned.seconds, base_macs.total / macs.total),
        "batch_size": batch_size,
        "base_tokens": token_trace(pair.base)[0],
        "matmul_gflops": peak / 1e9,
    }
    series = {"base_seconds": base.seconds, "seconds": pruned.seconds}
    origin: dict[str, Any] = {"attention": {"base": base.kernels, "pruned": pruned.kernels}}
    if pair.heads is not None:
        metrics |= {"base_gmacs_linear": base_macs.linear / 1e9, "gmacs_linear": macs.linear / 1e9}
        origin |= {"heads_precision": pair.heads_precision, "heads_unsupported": rest[0].unsupported}
        if rest[0].seconds:
            series["heads_seconds"] = rest[0].seconds
            heads_macs = pair.heads.macs()
            metrics["mac_ratio_whole"] = (base_macs.total + heads_macs) / (macs.total + heads_macs)
            wholes = [[a + b for a, b in zip(own.seconds, rest[0].seconds, strict=True)] for own in (base, pruned)]
            metrics |= ratio("speedup_whole", *wholes)
            for prefix, seconds in zip(("base_", ""), wholes, strict=True):
                metrics[f"{prefix}images_per_s_whole"] = speed(seconds, batch_size)["images_per_s"]
    return {"metrics": metrics, "tokens": token_trace(pair.pruned), "series": series, "provenance": origin}


def build(spec: BenchSpec, device: str) -> Pair:
    """Both models; at equal image sizes the pruned one's host is the unpruned one, so that they share weights."""
    dtype, size = weights_dtype(spec.precision), spec.pruned_image_size or spec.image_size
    settings = (device, dtype, spec.channels_last, spec.detector)
    models = build_variants(spec.model, {"pruned": spec.prune}, size, *settings)
    pruned: Any = models["pruned"]
    base = models[UNPRUNED]
    if size != spec.image_size:
        base = build_variants(spec.model, {}, spec.image_size, *settings)[UNPRUNED]
    heads, precision = None, spec.precision
    if spec.detector is not None:
        code = import_module("cropr.bench.heads")  # by name: other measurements do not depend on detectors
        backbone, patch = pruned.model.backbone, pruned.model.backbone.host.patch_embed.patch_size[0]
        heads = code.Heads(spec.detector, backbone.dim, patch, (size // patch,) * 2)
        heads.to(device).requires_grad_(False).eval()
        precision = code.head_precision(spec.precision)
    return Pair(base, pruned, (spec.image_size, size), heads, precision)


def _cases(spec: BenchSpec, pair: Pair) -> list[Case]:
    how: dict[str, Any] = {key: getattr(spec, key) for key in ("precision", "attention", "compile", "channels_last")}
    cases = [
        Case(name=name, model=model, shape=(3, size, size), **how)
        for name, model, size in zip(("base", "pruned"), (pair.base, pair.pruned), pair.sizes, strict=True)
    ]
    if pair.heads is not None:
        cases.append(Case(name="heads", model=pair.heads, shape=pair.heads.shape, precision=pair.heads_precision))
    return cases
