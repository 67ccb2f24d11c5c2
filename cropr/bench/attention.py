"""Attention kernels: to force one with torch's own switch, and to find out which really ran."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler
from torch.nn.attention import SDPBackend, sdpa_kernel

from cropr.bench.device import Result, Unsupported, first_line, mixed

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Kernels that can be forced; ``auto`` leaves the choice to torch."""

_KERNEL = re.compile(r"^aten::_scaled_dot_product_(?:attention_)?(math|flash|efficient|cudnn)")


def with_attention_kernel(
    attention: str, precision: str, device: str, forward: Callable[[], Result]
) -> Callable[[], Result]:
    """The forward pass with its kernel forced and, for a mixed precision, within an autocast of its own."""

    def run() -> Result:
        kernel: AbstractContextManager[Any] = nullcontext() if attention == "auto" else sdpa_kernel(BACKENDS[attention])
        with kernel, mixed(precision, device):
            return forward()

    return run


def quiet_profile(cuda: bool = False) -> profiler.profile:
    """torch's profiler, without its notes on starting, stopping and missing GPUs in the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler is used for the first time
    return profiler.profile(use_device="cuda" if cuda else None)


def run_forced(forward: Callable[[], Result], attention: str, compiled: bool = False) -> tuple[Result, dict[str, int]]:
    """Run a pass that forces a kernel; returns its result and the attention kernels that ran: name -> calls.

    Compiled code that has turned attention into plain products calls none.

    Raises:
        Unsupported: the device has no such kernel for these shapes and this precision, or another ran.
    """
    try:
        with quiet_profile() as profile:
            result = forward()
    except RuntimeError as error:
        if attention == "auto" or not re.search(r"no (viable|available) (backend|kernel)", str(error), re.IGNORECASE):
            raise
        raise Unsupported(f"attention {attention}: torch has no such kernel here: {first_line(error)}") from None
    ran = dict(Counter(match[1] for event in profile.function_events if (match := _KERNEL.match(event.name))))
    verify(ran, attention, compiled)
    return result, ran


def verify(ran: Mapping[str, int], attention: str, compiled: bool = False) -> None:
    """Raises: Unsupported: the forced kernel was not the one that ran; with what ran instead."""
    # Compiled, the math kernel is a few products without a name of their own.
    nameless = compiled and attention == "math" and not ran
    if attention == "auto" or nameless or set(ran) == {attention}:
        return
    instead = ", ".join(f"{count} calls of {name}" for name, count in ran.items()) or "no attention kernel at all"
    how = " after torch.compile" if compiled else ""
    raise Unsupported(f"attention {attention}: forced, but {instead} ran{how}")
