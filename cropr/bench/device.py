"""In which precision and with which attention kernel a device computes, the refusal of what it cannot, and memory.

A precision is a cast of model and images (``fp32``, ``bf16``, ``fp16``) or mixed (``amp_bf16``, ``amp_fp16``): weights
in fp32 under torch's autocast, the paper's AMP, which is entered, and casts every weight, in every forward pass.
"""

import ctypes
import gc
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn.attention import SDPBackend, sdpa_kernel

Result = TypeVar("Result")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda", "mps")
KERNELS = {name.partition("_")[0].lower(): kernel for name, kernel in SDPBackend.__members__.items()}
_KERNEL_CALL = re.compile(r"^aten::_scaled_dot_product_(?:attention_)?(math|flash|efficient|cudnn)")
_PROC = Path("/proc/self")
_LOG = logging.getLogger(__name__)


class Unsupported(ValueError):
    """This device cannot run what the spec asks for; the message says why and what it can run."""


def weights_dtype(precision: str) -> torch.dtype:
    """What weights and images are stored in."""
    return torch.float32 if precision.startswith("amp_") else DTYPES[precision]


def arithmetic_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in."""
    return DTYPES[precision.removeprefix("amp_")]


def mixed(precision: str, device: str) -> AbstractContextManager[Any]:
    """Autocast for a mixed precision; nothing for a cast."""
    if not precision.startswith("amp_"):
        return nullcontext()
    return torch.autocast(kind_of(device), arithmetic_dtype(precision))


def kind_of(device: str) -> str:
    """``cuda`` of ``cuda:1``. Raises: ValueError: nothing is measured on such a device, or it is not there."""
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device {device}: measured are {', '.join(DEVICES)} (or cuda:1 and so on)")
    if kind != "cpu" and not (torch.cuda if kind == "cuda" else torch.backends.mps).is_available():
        raise ValueError(f"device {device}: torch sees no {kind.upper()} device; use cpu")
    return kind


def check(precision: str, device: str) -> None:
    """Raises: Unsupported: the device has no arithmetic for it; ValueError: there is no such device."""
    kind, dtype = kind_of(device), arithmetic_dtype(precision)
    if kind == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Unsupported(f"precision {precision}: this GPU has no bfloat16 arithmetic; use fp32 or fp16")
    # torch computes either through oneDNN, far slower without units for it; other code (Apple's) cannot be asked.
    if kind != "cpu" or dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision.removeprefix('amp_')}_supported")():
        number = str(dtype).removeprefix("torch.")
        raise Unsupported(f"precision {precision}: this CPU has no fast {number} arithmetic; use fp32, or CUDA")


def noise(batch_size: int, shape: Sequence[int], device: str, precision: str, channels_last: bool = False) -> Tensor:
    """Images or features [B, C, rows, columns] of normal noise, the same ones every time."""
    values = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return values.to(device, weights_dtype(precision)).contiguous(memory_format=layout)


def largest_batch(batch_size: int, attempt: Callable[[int], Result]) -> tuple[int, Result]:
    """The batch size, halved until it fits, and what ``attempt`` gives. Raises Unsupported: not even one image fits."""
    while True:
        try:
            return batch_size, attempt(batch_size)
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        # Outside of the handler: until it ends, the error keeps alive what the attempt had allocated.
        if batch_size == 1:
            raise Unsupported(f"out of memory with a single image: {reason}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _LOG.warning("out of memory with batches of %d; trying %d", batch_size, batch_size // 2)
        batch_size //= 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def working_memory(work: Callable[[], Result], device: str) -> tuple[Result, float | None]:
    """The result of ``work``, and its peak of memory over what was in use before, in 10^6 bytes: on CUDA the
    allocator's count, on the CPU under Linux the resident size of the process; None elsewhere."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device != "cpu":
        return work(), None
    gc.collect()
    try:  # give freed memory back, so that it counts again when it is used, and forget the peak so far
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "clear_refs").write_text("5")  # man 5 proc: resets the peak resident size
    except (OSError, AttributeError):
        return work(), None
    before_mb = _status("VmRSS")
    result = work()
    return result, max(0.0, _status("VmHWM") - before_mb)


def _status(key: str) -> float:
    """A size in MB from the process's status."""
    lines = (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


def with_attention_kernel(
    attention: str, precision: str, device: str, forward: Callable[[], Result]
) -> Callable[[], Result]:
    """The forward pass with its kernel forced and, for a mixed precision, within an autocast of its own. Raises:
    Unsupported: the device lacks the precision."""
    check(precision, device)

    def run() -> Result:
        kernel: AbstractContextManager[Any] = nullcontext() if attention == "auto" else sdpa_kernel(KERNELS[attention])
        with kernel, mixed(precision, device):
            return forward()

    return run


def quiet_profile(cuda: bool = False) -> profiler.profile:
    """torch's profiler, without its notes on starting, stopping and missing GPUs in the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler is used for the first time
    return profiler.profile(use_device="cuda" if cuda else None)


def run_forced(forward: Callable[[], Result], attention: str, compiled: bool = False) -> tuple[Result, dict[str, int]]:
    """The result of a pass that forces a kernel, and the attention kernels that ran: name -> calls. Raises:
    Unsupported: the device lacks the kernel or an operator, the compiler refuses the model, or another kernel ran."""
    try:
        with quiet_profile() as profile:
            result = forward()
    except NotImplementedError as error:
        raise Unsupported(f"torch has no such operator here: {first_line(error)}") from None
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise Unsupported(f"torch.compile: {first_line(error)}") from None
        if attention == "auto" or not re.search(r"no (viable|available) (backend|kernel)", str(error), re.IGNORECASE):
            raise
        raise Unsupported(f"attention {attention}: torch has no such kernel here: {first_line(error)}") from None
    ran = dict(Counter(match[1] for event in profile.function_events if (match := _KERNEL_CALL.match(event.name))))
    # Compiled, the math kernel is a few products without a name of their own.
    nameless = compiled and attention == "math" and not ran
    if attention == "auto" or nameless or set(ran) == {attention}:
        return result, ran
    instead = ", ".join(f"{count} calls of {name}" for name, count in ran.items()) or "no attention kernel at all"
    how = " after torch.compile" if compiled else ""
    raise Unsupported(f"attention {attention}: forced, but {instead} ran{how}")
