"""Model FLOP utilisation (MFU): FLOPs of the forward pass over its time, over the rate of a large matrix product.

That rate is measured on the same device, in the same number format, with the same threads; it is not taken from a data
sheet.
"""

from __future__ import annotations

import time
from functools import cache, partial

import torch

from cropr.bench.device import arithmetic_dtype, kind_of
from cropr.bench.timing import clock

SIZES = {"cpu": (1024, 2048), "mps": (2048, 4096), "cuda": (4096, 8192)}
"""Rows and columns; the fastest size counts."""
SECONDS = 0.25
"""Time that each size is given, at least three products."""


def matmul_peak(precision: str, device: str) -> float:
    """FLOPs per second of the best square product, measured once a process."""
    return _peak(arithmetic_dtype(precision), device, torch.get_num_threads())


def utilisation(macs: float, images_per_s: float, peak: float) -> float:
    """MFU, of multiply-adds of one image: two FLOPs each. ``peak`` as of ``matmul_peak``."""
    return 2 * macs * images_per_s / peak


@cache
def _peak(dtype: torch.dtype, device: str, threads: int) -> float:
    return max(_rate(size, dtype, device) for size in SIZES[kind_of(device)])


@torch.inference_mode()
def _rate(size: int, dtype: torch.dtype, device: str) -> float:
    """FLOPs per second of a product of two square matrices: the best reading, this being a peak."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = partial(torch.mm, a, b, out=torch.empty_like(a))
    clock(product, 1, device)
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        seconds.append(clock(product, 1, device))
    return 2 * size**3 / min(seconds)
