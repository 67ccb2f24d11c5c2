"""Peak memory of one piece of work: what it needs on top of what is there before it starts.

On CUDA the allocator's own count; on the CPU the peak resident size of the process, which Linux can be asked to
reset. Megabytes are 10^6 bytes.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from cropr.bench.device import Result

_PROC = Path("/proc/self")


def working_memory(work: Callable[[], Result], device: str) -> tuple[Result, float | None]:
    """Run ``work`` and return what it gave, and the peak of memory over what was in use before, in MB.

    None where the system keeps no such count: CPUs outside Linux, and MPS.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device != "cpu" or not _reset_peak():
        return work(), None
    before_mb = _status("VmRSS")
    result = work()
    return result, max(0.0, _status("VmHWM") - before_mb)


def _reset_peak() -> bool:
    """Give freed memory back, so that it counts again when it is used, and forget the peak so far."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "clear_refs").write_text("5")  # man 5 proc: resets the peak resident size
    except (OSError, AttributeError):
        return False
    return True


def _status(key: str) -> float:
    """A size in MB from the process's status."""
    lines = (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))
