"""Models to time: random weights, made without timm's initialisation, which takes ten seconds on a ViT-L. The unpruned
model is the very host inside the pruned ones, so that a ViT-L with its variants takes the memory of one."""

import math
import time
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cropr.bench.device import arithmetic_dtype, kind_of
from cropr.bench.specs import UNPRUNED
from cropr.bench.timing import Outcome, clock, speed
from cropr.pruning.model import DeployedViT, PrunedViT
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks.base import build_model, require_known
from cropr.tasks.detection import DetModelSpec
from cropr.tasks.detection.model import build_encoder

NUM_CLASSES = 1000
SIZES = {"cpu": (1024, 2048), "mps": (2048, 4096), "cuda": (4096, 8192)}
"""Rows and columns of the products that give a device's peak; the fastest size counts."""
SECONDS = 0.25
"""Of each size, at least three products."""


def build_variants(
    model: ModelSpec,
    prunes: Mapping[str, PruneSpec],
    image_size: int,
    device: str,
    dtype: torch.dtype,
    channels_last: bool = False,
    detector: DetModelSpec | None = None,
) -> dict[str, nn.Module]:
    """The unpruned model and its deployed variants, all around one host with random weights, in eval mode:
    ``UNPRUNED`` (the timm model; for a ``detector`` the encoder without reducers, since timm's blocks know no windows),
    then the variants (``DeployedViT``; of a detector its encoders). ``channels_last`` is the memory layout of the patch
    embedding's weights. Raises ValueError: timm has no such model; an impossible schedule or reducer."""
    unpruned = build_on_meta(model, PruneSpec(), image_size, detector)
    host = unpruned.backbone
    random_weights(host, device, dtype)
    if channels_last:
        host.to(memory_format=torch.channels_last)
    base: nn.Module = host.host if detector is None else DeployedViT(unpruned)
    models = {UNPRUNED: base.requires_grad_(False).eval()}
    for name, prune in prunes.items():
        variant = build_on_meta(model, prune, image_size, detector).deploy()
        variant.model.backbone = host
        random_weights(variant, device, dtype)
        models[name] = variant.requires_grad_(False).eval()
    return models


def build_on_meta(
    model: ModelSpec, prune: PruneSpec, image_size: int, detector: DetModelSpec | None = None
) -> PrunedViT:
    """A model whose parameters have no memory until ``random_weights``; buffers, such as rotary tables, are real.
    Arguments and errors as of ``build_variants``."""
    require_known(model.name)

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # torch's hint has no result
    try:
        if detector is not None:
            return build_encoder(model, prune, detector, NUM_CLASSES, image_size)
        return build_model(model, prune, NUM_CLASSES, image_size)
    finally:
        handle.remove()


@torch.no_grad()
def random_weights(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Give memory and values to tensors on the meta device, and move the model; other values stay. Biases are 0, other
    vectors (norm and LayerScale) 1, matrices uniform with timm's standard deviation of 0.02: a million numbers,
    repeated, since drawing all 300 million of a ViT-L takes longer than measuring it."""
    generator = torch.Generator().manual_seed(0)
    pattern = ((torch.rand(2**20 - 3, generator=generator) - 0.5) * (0.02 * math.sqrt(12))).to(device, dtype)
    values = {}
    for name, tensor in filter(lambda item: item[1].is_meta, model.state_dict().items()):
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
    return megabytes((*model.parameters(), *model.buffers()))


def megabytes(tensors: Iterable[Tensor]) -> float:
    """Memory of tensors in 10^6 bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def model_metrics(model: nn.Module, outcome: Outcome, batch_size: int, macs: int, peak: float) -> dict[str, float]:
    """Metrics of one model alone: speed, multiply-adds of one image, memory, and utilisation ``mfu``: FLOPs of the
    forward pass, two a multiply-add, over its time and over the ``peak`` of ``matmul_peak``."""
    found = speed(outcome.seconds, batch_size) | {"gmacs": macs / 1e9, "weights_mb": weights_mb(model)}
    if outcome.working_memory_mb is not None:
        found["working_memory_mb"] = outcome.working_memory_mb
    return found | {"mfu": 2 * macs * found["images_per_s"] / peak}


def token_trace(model: nn.Module) -> list[int]:
    """Tokens with prefix at the input and after every block."""
    if isinstance(model, DeployedViT):
        return list(model.model.token_trace)
    host: Any = model
    return [host.patch_embed.num_patches + host.num_prefix_tokens] * (len(host.blocks) + 1)


def matmul_peak(precision: str, device: str) -> float:
    """FLOPs per second of the best square product on this device, in this number format; measured once a process."""
    sizes = SIZES[kind_of(device)]
    return max(_rate(size, arithmetic_dtype(precision), device, torch.get_num_threads()) for size in sizes)


@cache
@torch.inference_mode()
def _rate(size: int, dtype: torch.dtype, device: str, threads: int) -> float:
    """FLOPs per second of a product of two square matrices: the best reading, this being a peak."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = partial(torch.mm, a, b, out=torch.empty_like(a))
    clock(product, 1, device)
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        seconds.append(clock(product, 1, device))
    return 2 * size**3 / min(seconds)
