"""Host memory that was freed: kept, where XLA would fault it in again at every step, or given back, where memory is short."""

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> bool:
    """Asks glibc to serve large buffers from one heap that it does not shrink.

    XLA's CPU client allocates its temporary buffers anew at every call. By default glibc maps each from the kernel and unmaps it after, so a
    training step of half a million parameters spends a third of its time on 60,000 page faults (benchmarks/allocator.py). Has effect only before
    threads have heaps of their own, so it is called before jax is imported. Memory that was needed once stays with the process.

    Returns:
      whether the C library took it; False on systems without glibc.
    """
    return _set({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20})


def return_freed_memory() -> bool:
    """Asks glibc to give every buffer above 1 MB back as soon as it is freed: for work that goes once over a large model.

    By default glibc raises that bound to 32 MB as it sees larger buffers freed, and every thread keeps a heap of its own: saving a model of 280 MB
    then took up to 85 MB more. Has effect only before threads have heaps of their own, so it is called before jax is imported.

    Returns:
      whether the C library took it; False on systems without glibc.
    """
    return _set({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 2**20})


def _set(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
