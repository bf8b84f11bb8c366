"""Peak FLOP/s, memory, its bandwidth, and devices per host of known accelerators."""

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GIB = 2**30
MATMUL_SIZE, SUM_SIZE, ROUNDS = 1024, 2**25, 5


@dataclass(frozen=True)
class Hardware:
    """One kind of device, as jax counts devices (a TPU v4 chip with its two cores joined is one).

    Attributes:
      name: as in a topology, such as "v5e".
      kind: jax's `device_kind`.
      peak_flops: dense bf16 FLOP/s, as its maker states it; for an unknown device, the measured speed of a matmul.
      bandwidth: bytes/s that are read from memory, as its maker states it; for an unknown device, the measured speed of a sum.
      memory: bytes.
      reserve: bytes of memory that programs cannot use: the runtime's, and on GPUs the library workspaces and the CUDA context.
      per_host: number of devices of a full host.
    """

    name: str
    kind: str
    peak_flops: float
    bandwidth: float
    memory: int
    reserve: int
    per_host: int

    @property
    def limit(self) -> int:
        """Bytes that a program can use."""
        return self.memory - self.reserve


# Peaks and bandwidths: Google Cloud's pages of each TPU version; NVIDIA's data sheets of A100, H100 and H200 (SXM, without sparsity). A TPU's reserve is what its
# compiler leaves out: its refusals name 30.75, 15.75, 95.74 and 31.25 GiB as available. A GPU's is ours, for the CUDA context, NCCL, and cuDNN's
# workspace, which the compiler reads as zero.
_GPU_RESERVE = 4 * GIB
KNOWN = (
    Hardware("v4", "TPU v4", 275e12, 1200e9, 32 * GIB, 5 * GIB // 4, 4),
    Hardware("v5e", "TPU v5 lite", 197e12, 819e9, 16 * GIB, GIB // 4, 4),
    Hardware("v5p", "TPU v5", 459e12, 2765e9, 96 * GIB, 26 * GIB // 100, 4),
    Hardware("v6e", "TPU v6 lite", 918e12, 1640e9, 32 * GIB, 3 * GIB // 4, 4),
    Hardware("a100", "NVIDIA A100-SXM4-80GB", 312e12, 2039e9, 80 * GIB, _GPU_RESERVE, 8),
    Hardware("a100-40", "NVIDIA A100-SXM4-40GB", 312e12, 1555e9, 40 * GIB, _GPU_RESERVE, 8),
    Hardware("h100", "NVIDIA H100 80GB HBM3", 989e12, 3352e9, 80 * GIB, _GPU_RESERVE, 8),
    Hardware("h200", "NVIDIA H200", 989e12, 4800e9, 141 * 10**9, _GPU_RESERVE, 8),
)
# (regex over jax's device_kind, name); the first match wins.
_KINDS = (
    (r"TPU v4$", "v4"),
    (r"TPU v5 ?(lite|e)", "v5e"),
    (r"TPU v5p?$", "v5p"),
    (r"TPU v6 ?(lite|e)", "v6e"),
    (r"A100.*40GB", "a100-40"),
    (r"A100", "a100"),
    (r"H100.*HBM3", "h100"),
    (r"H200", "h200"),
)


def named(name: str) -> Hardware | None:
    """Returns the hardware with this topology name, or None if it is unknown."""
    return next((hardware for hardware in KNOWN if hardware.name == name), None)


def of_kind(device_kind: str) -> Hardware | None:
    """Returns the hardware with this jax `device_kind`, or None if it is unknown."""
    return next((named(name) for pattern, name in _KINDS if re.search(pattern, device_kind, re.IGNORECASE)), None)


def memory_of(device: Any) -> int | None:
    """Bytes of a jax device's memory that programs can use; of a CPU's, its part of the machine's. None if they are not known."""
    if device.platform == "cpu":
        import jax

        return _memory_here() // jax.local_device_count()
    known = of_kind(device.device_kind)
    return known.limit if known else (device.memory_stats() or {}).get("bytes_limit")


def _memory_here() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.lru_cache(maxsize=4)
def measured(device_kind: str, sharing: int) -> Hardware:
    """Describes local hardware of an unknown kind. Measures a float32 matmul and a sum on the first jax device, once.

    Args:
      sharing: number of devices that share this host's compute and memory, as simulated CPU devices do.
    """
    import jax
    import jax.numpy as jnp

    def fastest(function: Callable[..., Any], *arguments: Any) -> float:
        """Seconds of the fastest of a few calls."""
        call, seconds = jax.jit(function), []
        jax.block_until_ready(call(*arguments))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    square, large = jnp.ones((MATMUL_SIZE, MATMUL_SIZE)), jnp.ones(SUM_SIZE)
    flops, bandwidth = 2 * MATMUL_SIZE**3 / fastest(jnp.matmul, square, square), large.nbytes / fastest(jnp.sum, large)
    return Hardware(device_kind, device_kind, flops / sharing, bandwidth / sharing, _memory_here() // sharing, 0, sharing)
