# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays with the process, so that a training step does not have all of its memory mapped anew."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = -1
_MMAP_THRESHOLD = 1 << 30  # larger blocks still come from mmap and go back at once

# A function that each allocator exports under its own name, whether it is preloaded or linked.
_OTHER_ALLOCATORS = {
    "jemalloc": ("mallctl", "je_mallctl"),
    "tcmalloc": ("tc_malloc", "TCMallocInternalMalloc"),
    "mimalloc": ("mi_malloc",),
}

_kept = False


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep the memory that is freed, for the whole process. Call it once, before the first step.

    Example:
        >>> mvit_kernels.keep_freed_memory()
        True
        >>> for images, labels in loader:
        ...     ...  # from the second step on, tensors lie in memory that is mapped already

    By default glibc asks the system for each block above a threshold (128 KiB, which rises to at most 32 MiB) and
    returns it when it is freed, and returns the free end of its heap. Each page that comes back costs a fault, in which
    the kernel fills it with zeros: 30 % of a training step of MobileViT on the CPU (docs/training.md). This sets
    ``M_MMAP_THRESHOLD`` to 1 GiB (a glibc that takes at most 32 MiB gets ``M_MMAP_MAX`` = 0) and switches
    ``M_TRIM_THRESHOLD`` off. Values set
    by ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_`` or ``GLIBC_TUNABLES`` are replaced.

    The process then stays as large as it once was. Processes forked later, such as a loader's workers, inherit the
    setting. glibc cannot forget it; ``ctypes.CDLL(None).malloc_trim(0)`` returns what is free at the moment.

    Returns:
        True where it is set. False where there is nothing to set: no glibc (musl, macOS, Windows), or another allocator
        is loaded (jemalloc, tcmalloc and mimalloc keep freed memory by themselves, and are an alternative to this call:
        ``LD_PRELOAD=libjemalloc.so.2``).
    """
    global _kept
    if sys.platform != "linux" or other_allocator():
        return False
    process = ctypes.CDLL(None)
    if not (hasattr(process, "gnu_get_libc_version") and hasattr(process, "mallopt")):
        return False
    in_heap = process.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) or process.mallopt(_M_MMAP_MAX, 0)
    _kept = bool(in_heap and process.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    return _kept


def other_allocator() -> str:
    """What serves this process instead of the C library's malloc: "jemalloc", "tcmalloc" or "mimalloc"; "" for none."""
    if sys.platform != "linux":
        return ""
    process = ctypes.CDLL(None)
    found = (name for name, functions in _OTHER_ALLOCATORS.items() if any(hasattr(process, f) for f in functions))
    return next(found, "")


def allocator() -> str:
    """What becomes of freed memory in this process, for the origin of measurements; "" where it is as usual."""
    return "malloc keeps freed memory" if _kept else other_allocator()
