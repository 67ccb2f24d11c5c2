"""Images per second of a pruned model beside the unpruned one.

A benchmark result is a record, not a number: both models run in one process on the same weights, one after the other in
every round and in alternating order, so that whatever slows the machine down for a while slows both. Warm-up rounds are
left out. What is reported is the median over rounds, the interquartile range, and for the speed-up, which is a ratio
taken round by round, a bootstrap interval of its median. The bound of the FLOP count stands beside it.

Weights are random: speed does not depend on them. Time is that of the forward pass alone, without loading of data.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cropr.bench import flops
from cropr.model import DeployedViT, build_model
from cropr.records import provenance
from cropr.runtime import reuse_freed_memory
from cropr.specs import BenchSpec, PruneSpec

NUM_CLASSES = 1000
"""Outputs of the classifier: ImageNet-1k's, as in the paper's tables."""

MIN_SAMPLE_S = 0.1
"""A round repeats the forward pass of a fast model until it lasts about so long, for the sake of the clock."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Unsupported(ValueError):
    """This device cannot run what the spec asks for; the message says why and what it can run."""


@dataclass(frozen=True, slots=True)
class Contestants:
    """The two models of a measurement, on the device and in the precision that they run in."""

    base: Any
    """The unpruned timm model."""
    pruned: DeployedViT
    base_images: Tensor
    pruned_images: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """A forward pass that is timed, and how often one round repeats it."""

    forward: Callable[[], Tensor]
    repeats: int


def measure(spec: BenchSpec, device: str = "cpu", tick: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure one row of a throughput table.

    Args:
        spec: both models, image size, batch, precision, rounds.
        device: torch's name of the device.
        tick: called with a word on what comes next before each warm-up pass and each round.

    Returns:
        The record: ``metrics`` (flat numbers; times are medians over rounds, ``*_iqr`` interquartile ranges,
        ``speedup_low`` and ``speedup_high`` a 95 % interval), ``tokens`` of the pruned model, ``series`` (seconds per
        forward pass of either, round by round), ``provenance`` with the attention kernels that ran.

    Raises:
        Unsupported: the device cannot run this precision.
        ValueError: an impossible model, schedule or reducer.
    """
    started = time.time()
    tell = tick or (lambda what: None)
    check(spec.precision, device)
    # Otherwise large activations are mapped afresh in every pass, and the unpruned model, whose are larger, pays more
    # page faults: that would flatter pruning.
    reused = reuse_freed_memory() if device == "cpu" else False
    tell("build")
    pair = build(spec, device)
    counts = flops.macs(pair.base), flops.macs(pair.pruned)

    runs: list[Run] = []
    kernels: dict[str, dict[str, int]] = {}
    peaks: dict[str, float] = {}
    contestants = {"base": (pair.base, pair.base_images), "pruned": (pair.pruned, pair.pruned_images)}
    for name, (model, images) in contestants.items():
        tell(f"warm up {name}")
        with _peak_memory(device, f"{name}_peak_memory_mb", peaks):
            begin = time.perf_counter()
            kernels[name] = trial(model, images)
            runs.append(warm_up(partial(model, images), spec.warmup, device, time.perf_counter() - begin))
    with torch.inference_mode():
        base_seconds, seconds = interleave([partial(clock, run, device) for run in runs], spec.rounds, tell)

    return {
        "kind": "bench",
        "id": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "metrics": {
            **summary(base_seconds, seconds, spec.batch_size, bound=flops.bound(*counts)),
            "base_gmacs": counts[0].total / 1e9,
            "gmacs": counts[1].total / 1e9,
            "base_weights_mb": weights_mb(pair.base),
            "weights_mb": weights_mb(pair.pruned),
            "base_tokens": flops.num_patches(pair.base) + pair.base.num_prefix_tokens,
            **peaks,
        },
        "tokens": list(pair.pruned.model.token_trace),
        "series": {"base_seconds": base_seconds, "seconds": seconds},
        "provenance": provenance(
            started, device=device, precision=spec.precision, attention=kernels, freed_memory_reused=reused
        ),
    }


def check(precision: str, device: str) -> None:
    """Refuse what the device has no arithmetic for.

    Raises:
        ValueError: there is no such device.
        Unsupported: with the reason and what to use instead.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {device}: measured are cpu and cuda (or cuda:1 and so on)")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch sees no CUDA device; use cpu")
    # torch computes either through oneDNN, and far slower where the processor has no units for it. A build without
    # oneDNN (Apple's processors) has other ways, and cannot be asked.
    if kind != "cpu" or precision == "fp32" or not torch.backends.mkldnn.is_available():
        return
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise Unsupported("precision fp16: this CPU has no fast half-precision arithmetic; use fp32 or bf16, or CUDA")
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unsupported("precision bf16: this CPU has no fast bfloat16 arithmetic; use fp32, or CUDA")


# Models --------------------------------------------------------------------------------------------------------------


def build(spec: BenchSpec, device: str) -> Contestants:
    """Both models with random weights, built without timm's initialisation, which takes ten seconds on a ViT-L.

    At equal image sizes the unpruned model is the very host inside the pruned one: same weights, same memory.

    Raises:
        ValueError: timm has no such model; an impossible schedule or reducer.
    """
    if not timm.is_model(spec.model.name):
        family = spec.model.name.split(".")[0].split("_patch")[0]
        close = ", ".join(timm.list_models(f"{family}*")[:8]) or "none"
        raise ValueError(f"timm has no model {spec.model.name!r}; of this family it has: {close}")
    dtype = DTYPES[spec.precision]
    pruned_size = spec.pruned_image_size or spec.image_size
    with parameters_on_meta():
        pruned = build_model(spec.model, spec.prune, NUM_CLASSES, pruned_size).deploy()
        host = pruned.model.backbone.host
        if pruned_size != spec.image_size:
            host = build_model(spec.model, PruneSpec(), NUM_CLASSES, spec.image_size).backbone.host
    random_weights(pruned, device, dtype)
    random_weights(host, device, dtype)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randn(spec.batch_size, 3, size, size, generator=generator).to(device, dtype)
        for size in (spec.image_size, pruned_size)
    ]
    return Contestants(host.requires_grad_(False).eval(), pruned, images[0], images[1])


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers, such as rotary tables, are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # torch's hint forgets the result
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def random_weights(model: nn.Module, device: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Give memory and values to what lies on the meta device, and move the model; what has values keeps them.

    Biases are 0, other vectors (norm and LayerScale) 1, matrices uniform with timm's standard deviation of 0.02. One
    million random numbers are drawn and repeated: drawing all 300 million of a ViT-L takes longer than measuring it.
    """
    generator = torch.Generator().manual_seed(seed)
    pattern = (torch.rand(2**20 - 3, generator=generator) - 0.5) * (0.02 * math.sqrt(12))
    pattern = pattern.to(device, dtype)
    values = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            continue
        value = values[name] = torch.empty(tensor.shape, device=device, dtype=dtype)
        if tensor.ndim < 2 and "scorer" not in name:
            value.fill_(0 if name.endswith("bias") else 1)
        else:
            for part in value.view(-1).split(len(pattern)):
                part.copy_(pattern[: len(part)])
    model.load_state_dict(values, strict=False, assign=True)
    model.to(device, dtype)


def weights_mb(model: nn.Module) -> float:
    """Parameters and buffers in 10^6 bytes."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6


@contextmanager
def _peak_memory(device: str, name: str, peaks: dict[str, float]) -> Iterator[None]:
    """Note the allocator's peak inside under ``name``; on CPU only the process has a peak, and provenance holds it."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if cuda:
        peaks[name] = torch.cuda.max_memory_allocated(device) / 1e6


# Attention kernels ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def trial(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Run the model once and return which attention kernels really ran: name -> calls.

    Raises:
        ValueError: the logits are not finite.
    """
    # Not under inference_mode: there, attention reaches the mode before torch has chosen a kernel for it.
    with _Calls() as calls, _Kernels() as kernels:
        logits = model(images)
    if not logits.isfinite().all():
        raise ValueError(f"{type(model).__name__} gives non-finite logits in {images.dtype}; use another precision")
    ran = Counter(kernels.ran)
    if unfused := calls.count - ran.total():
        ran["math"] = unfused
    return dict(ran)


class _Calls(TorchFunctionMode):
    """Counts calls of torch's attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """Collects the fused attention kernels that torch dispatches to; the math path shows up as none."""

    NAMES = ("flash", "efficient", "cudnn")

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if "_scaled_dot_product_" in name:
            self.ran.extend(kernel for kernel in self.NAMES if kernel in name)
        return func(*args, **(kwargs or {}))


# Time ----------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def warm_up(forward: Callable[[], Tensor], passes: int, device: str, first: float) -> Run:
    """Finish the warm-up and find out how many passes make a round long enough.

    Args:
        forward: the pass that will be timed.
        passes: untimed passes in all, the one that ran already included.
        device: torch's name of the device.
        first: seconds of that one. If it was fast, one more is run for an estimate without the cost of a first time.
    """
    once = first
    for _ in range(max(passes - 1, int(first < 10 * MIN_SAMPLE_S))):
        once = clock(Run(forward, 1), device)
    return Run(forward, max(1, math.ceil(MIN_SAMPLE_S / once)))


def clock(run: Run, device: str = "cpu") -> float:
    """Seconds per forward pass, over the run's repeats: events on CUDA, else the wall clock."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(run.repeats):
            run.forward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / run.repeats
    begin = time.perf_counter()
    for _ in range(run.repeats):
        run.forward()
    return (time.perf_counter() - begin) / run.repeats


def interleave(
    clocks: Sequence[Callable[[], float]], rounds: int, tell: Callable[[str], None] = lambda what: None
) -> list[list[float]]:
    """Read every clock once a round, in turn; every other round runs backwards: A B, B A, A B, ...

    Returns:
        Seconds per clock, in the order of rounds.
    """
    seconds: list[list[float]] = [[] for _ in clocks]
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        order = range(len(clocks)) if number % 2 == 0 else reversed(range(len(clocks)))
        for i in order:
            seconds[i].append(clocks[i]())
    return seconds


# Numbers -------------------------------------------------------------------------------------------------------------


def summary(base_seconds: Sequence[float], seconds: Sequence[float], batch_size: int, bound: float) -> dict[str, float]:
    """Medians, spreads and the speed-up of paired rounds.

    Args:
        base_seconds: per forward pass of the unpruned model, a round each.
        seconds: the same of the pruned one.
        batch_size: images per forward pass of either.
        bound: speed-up that the FLOP count allows.
    """
    base_speed, speed = batch_size / np.asarray(base_seconds), batch_size / np.asarray(seconds)
    ratio = speed / base_speed
    low, high = bootstrap_median(ratio)
    return {
        "base_images_per_s": float(np.median(base_speed)),
        "base_images_per_s_iqr": _iqr(base_speed),
        "images_per_s": float(np.median(speed)),
        "images_per_s_iqr": _iqr(speed),
        "speedup": float(np.median(ratio)),
        "speedup_iqr": _iqr(ratio),
        "speedup_low": low,
        "speedup_high": high,
        "bound": bound,
        "share_of_bound": float(np.median(ratio)) / bound,
    }


def bootstrap_median(
    values: Sequence[float] | np.ndarray, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median: resampled with replacement, ``draws`` times."""
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    low, high = np.quantile(np.median(data[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _iqr(values: np.ndarray) -> float:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low)
