"""How fast this machine multiplies matrices, and what share of that a model reaches.

Model FLOP utilisation (MFU) is the FLOPs of the forward pass over its time, divided by the rate of a large square
product on the same device, in the same number format, with the same threads. It is measured, not taken from a data
sheet.
"""

from __future__ import annotations

import time
from functools import cache, partial

import torch
from torch import Tensor

from cropr.bench.device import arithmetic_dtype, kind_of
from cropr.bench.timing import Run, clock

SIZES = {"cpu": (1024, 2048), "mps": (2048, 4096), "cuda": (4096, 8192)}
"""Rows and columns; the fastest size counts."""
SECONDS = 0.25
"""Time that each size is given, at least three products."""


def matmul_peak(precision: str, device: str) -> float:
    """FLOPs per second of the best square product, measured once a process."""
    return _peak(arithmetic_dtype(precision), device, torch.get_num_threads())


def utilisation(macs: float, batch_size: int, seconds: float, peak: float) -> float:
    """MFU: two FLOPs a multiply-accumulate.

    Args:
        macs: of one image.
        batch_size: images per forward pass.
        seconds: of one forward pass.
        peak: FLOPs per second, as ``matmul_peak`` gives them.
    """
    return 2 * macs * batch_size / seconds / peak


@cache
def _peak(dtype: torch.dtype, device: str, threads: int) -> float:
    return max(_rate(size, dtype, device) for size in SIZES[kind_of(device)])


@torch.inference_mode()
def _rate(size: int, dtype: torch.dtype, device: str) -> float:
    """FLOPs per second of a product of two square matrices: the best reading, this being a peak."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    run = Run(partial(_multiply, a, b, product), repeats=1)
    clock(run, device)
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        seconds.append(clock(run, device))
    return 2 * size**3 / min(seconds)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out)
