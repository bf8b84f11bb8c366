"""What glibc does with freed host memory: keep it, so that XLA does not fault it in again at every step, or return it where memory is short."""

import ctypes
import sys
from collections.abc import Callable

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> bool:
    """Asks glibc to serve large buffers from one heap that it does not shrink.

    XLA's CPU client allocates new temporary buffers at every call. By default glibc maps each one and unmaps it afterwards, so a
    training step of half a million parameters spends a third of its time on 60,000 page faults (benchmarks/allocator.py). Call it before jax is
    imported: it has no effect once threads have their own heaps. The process keeps its peak memory until `release_freed_memory`.

    Returns:
      Whether the C library accepted the settings; False on systems without glibc.
    """
    return _set({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20})


def return_freed_memory() -> bool:
    """Asks glibc to return every buffer above 1 MB as soon as it is freed, for work that passes over a large model once.

    By default glibc raises this threshold to 32 MB as larger buffers are freed, and every thread keeps its own heap: saving a 280 MB model then took
    up to 85 MB more. Call it before jax is imported: it has no effect once threads have their own heaps.

    Returns:
      Whether the C library accepted the settings; False on systems without glibc.
    """
    return _set({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 2**20})


def release_freed_memory() -> bool:
    """Gives the kernel every whole page that is free now, for a process that goes on after its work: a notebook, a loop over studies.

    Returns:
      Whether there were any; False on systems without glibc.
    """
    malloc_trim = _glibc("malloc_trim")
    return malloc_trim is not None and malloc_trim(ctypes.c_size_t(0)) == 1


def _set(settings: dict[int, int]) -> bool:
    mallopt = _glibc("mallopt")
    return mallopt is not None and all([mallopt(name, value) == 1 for name, value in settings.items()])


def _glibc(function: str) -> Callable[..., int] | None:
    """A function of glibc's; None on systems without it."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL("libc.so.6"), function)
    except (OSError, AttributeError):
        return None
