"""Images per second of a pruned model beside the unpruned one. Weights are random: speed does not depend on them. Timed
is the forward pass alone, without loading of data."""

from importlib import import_module
from typing import Any

from cropr.bench.device import Unsupported, check, weights_dtype
from cropr.bench.models import build_variants, matmul_peak, model_metrics, token_trace
from cropr.bench.specs import UNPRUNED, BenchSpec
from cropr.bench.timing import Case, Tell, against, ratio, recorded, speed, time_interleaved
from cropr.pruning import flops


@recorded("bench")
def measure(spec: BenchSpec, device: str, tick: Tell) -> dict[str, Any]:
    """Measure one row of a throughput table on a device, by torch's name; ``tick`` is called with each next step.

    Returns the record: ``metrics``, ``tokens`` of the pruned model, ``series`` (seconds per forward pass, round by
    round), ``provenance`` with the attention kernels that ran. Metrics are medians over rounds, ``*_iqr`` their
    interquartile ranges, ``*_low`` and ``*_high`` a 95 % interval, ``base_*`` those of the unpruned model;
    ``working_memory_mb`` is the memory of a forward pass besides the weights, and ``batch_size`` the one that fitted.
    Of a detector, all this is of its encoder; ``*_whole`` are with pyramid and heads, whose seconds are added to
    either. Where the device cannot run these, ``provenance.heads_unsupported`` is the reason.
    """
    check(spec.precision, device)
    tick("build")
    cases = build(spec, device)
    how = spec.batch_size, spec.rounds, spec.warmup
    batch_size, (base, pruned, *rest) = time_interleaved(list(cases.values()), *how, device, tick)
    if reason := base.unsupported or pruned.unsupported:
        raise Unsupported(reason)
    tick("matrix product")
    peak = matmul_peak(spec.precision, device)
    host, model = cases["base"].model, cases["pruned"].model
    base_macs, macs = flops.macs(host), flops.macs(model)
    unpruned = model_metrics(host, base, batch_size, base_macs.total, peak)
    metrics = {
        **{f"base_{name}": value for name, value in unpruned.items()},
        **model_metrics(model, pruned, batch_size, macs.total, peak),
        **against(base.seconds, pruned.seconds, base_macs.total / macs.total),
        "batch_size": batch_size,
        "base_tokens": token_trace(host)[0],
        "matmul_gflops": peak / 1e9,
    }
    series = {"base_seconds": base.seconds, "seconds": pruned.seconds}
    origin: dict[str, Any] = {"attention": {"base": base.kernels, "pruned": pruned.kernels}}
    for heads in rest:
        metrics |= {"base_gmacs_linear": base_macs.linear / 1e9, "gmacs_linear": macs.linear / 1e9}
        origin |= {"heads_precision": cases["heads"].precision, "heads_unsupported": heads.unsupported}
        if heads.seconds:
            series["heads_seconds"] = heads.seconds
            code: Any = cases["heads"].model
            metrics["mac_ratio_whole"] = (base_macs.total + code.macs()) / (macs.total + code.macs())
            wholes = [[a + b for a, b in zip(own.seconds, heads.seconds, strict=True)] for own in (base, pruned)]
            metrics |= ratio("speedup_whole", *wholes)
            for prefix, seconds in zip(("base_", ""), wholes, strict=True):
                metrics[f"{prefix}images_per_s_whole"] = speed(seconds, batch_size)["images_per_s"]
    return {"metrics": metrics, "tokens": token_trace(model), "series": series, "provenance": origin}


def build(spec: BenchSpec, device: str) -> dict[str, Case]:
    """What is timed: ``base``, the timm model or a detector's unpruned encoder; ``pruned``, a ``DeployedViT``; and of a
    detector, ``heads``. At equal image sizes the pruned model's host is the unpruned one, and they share weights."""
    dtype, size = weights_dtype(spec.precision), spec.pruned_image_size or spec.image_size
    settings = (device, dtype, spec.channels_last, spec.detector)
    models: dict[str, Any] = build_variants(spec.model, {"pruned": spec.prune}, size, *settings)
    base, pruned = models[UNPRUNED], models["pruned"]
    if size != spec.image_size:
        base = build_variants(spec.model, {}, spec.image_size, *settings)[UNPRUNED]
    how: dict[str, Any] = {key: getattr(spec, key) for key in ("precision", "attention", "compile", "channels_last")}
    sized = {"base": (base, spec.image_size), "pruned": (pruned, size)}
    cases = {name: Case(name=name, model=model, shape=(3, px, px), **how) for name, (model, px) in sized.items()}
    if spec.detector is not None:
        code = import_module("cropr.bench.heads")  # by name: other measurements do not depend on detectors
        backbone, patch = pruned.model.backbone, pruned.model.backbone.patch_size[0]
        heads = code.Heads(spec.detector, backbone.dim, patch, (size // patch,) * 2).to(device)
        # Boxes need float32, so that weights of heads are not cast for good.
        mixed = f"amp_{spec.precision}" if spec.precision in ("bf16", "fp16") else spec.precision
        model = heads.requires_grad_(False).eval()
        cases["heads"] = Case(name="heads", model=model, shape=heads.shape, precision=mixed)
    return cases
