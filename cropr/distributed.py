"""One process or many: what ``torchrun --nproc-per-node 8 -m cropr train`` sets up, and what training needs of it."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers. The default is alone, on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module, idle: bool = False) -> nn.Module:
        """The model with gradients averaged over processes; the model itself when alone. ``idle``: there are steps in
        which some weights have no part; torch then looks for these, and refuses them else."""
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        how: Any = {"device_ids": devices, "gradient_as_bucket_view": True, "find_unused_parameters": idle}
        return DistributedDataParallel(model, **how)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, joined in their order."""
        if self.size == 1:
            return items
        lists: list[Any] = [None] * self.size
        distributed.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


ALONE = World()
SAME_SECONDS = 3
"""After a signal, in which another asks for nothing new."""


@contextmanager
def start(device: str | None = None, threads: int | None = None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, if it did, and set torch up: repeatable, and fast on the CPU.
    ``device`` is ``cpu`` or ``cuda``, by default the first GPU of this process if there is one; ``threads`` of one
    operation are by default ``OMP_NUM_THREADS`` or torch's choice. Raises ValueError: a device that is not there."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {kind}: choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; leave the option out to train on the CPU")
    set_threads(threads)
    place, size = torch.device("cpu"), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    if size > 1:
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if kind == "cpu":  # deterministic kernels cost nothing here; on CUDA they would replace fast ones
        reuse_freed_memory()
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield World(distributed.get_rank(), size, place) if size > 1 else World(device=place)
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
        if size > 1:
            distributed.destroy_process_group()


def set_threads(threads: int | None) -> None:
    """Use so many threads for one operation; None changes nothing. Raises ValueError: below 1."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads {threads}: must be 1 or more")
        torch.set_num_threads(threads)


def reuse_freed_memory() -> bool:
    """Let the C allocator keep large freed blocks for the next allocation; False without glibc, where nothing changes.
    glibc may otherwise map large tensors afresh in every pass, and the kernel zeroes their pages again: more of them
    for the larger activations of an unpruned model, which would flatter pruning. Six blocks of a ViT-B/16, batches of
    4: 16,500 minor page faults a pass unpruned and 9,400 pruned; none with these settings."""
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # M_MMAP_THRESHOLD and so on in glibc's malloc.h
    try:
        libc = ctypes.CDLL(None)
        settings = {mmap_threshold: 1 << 30, trim_threshold: (1 << 31) - 1, top_pad: 64 << 20}
        return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
    except (OSError, AttributeError):
        return False


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop reads between two steps; one that comes seconds later ends
    at once, earlier ones are the same: a batch system and ``torchrun`` both send theirs."""

    def __init__(self) -> None:
        self.requested: int | None = None

    @property
    def name(self) -> str:
        return signal.Signals(self.requested).name if self.requested else "another process"

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)
