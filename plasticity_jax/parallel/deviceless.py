"""Compile-only devices: turns a topology such as "v5e:4x4" into jax devices for ahead-of-time compilation."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from plasticity_jax.errors import UserError, reason
from plasticity_jax.parallel.hardware import Hardware, measured, named

TPUS, GPUS = ("v4", "v5e", "v5p", "v6e"), ("a100", "a100-40", "h100", "h200")
GPUS_PER_NODE = 8
EXAMPLES = "v5e:4x4, v6e:4x4, v4:2x2x4, v5p:4x4x4, h100:8, h100:32, a100:8, cpu:8"


@dataclass(frozen=True)
class Target:
    """The devices that a program is compiled for.

    Attributes:
      topology: as given, such as "v5e:4x4".
    """

    topology: str
    hardware: Hardware
    devices: Sequence[Any]


def target(topology: str) -> Target:
    """Returns the devices of a topology. TPU dimensions count chips, one device each. More than eight GPUs form nodes of eight.

    Args:
      topology: "<kind>:<shape>"; "cpu:N" simulates N devices on this machine.
    Raises:
      UserError: the kind is unknown, the kind does not have this shape, or the extra with its compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in (*TPUS, *GPUS, "cpu"):
        raise UserError(f"--topology={topology}: {kind!r} is unknown; known: {', '.join((*TPUS, *GPUS, 'cpu'))}, as in {EXAMPLES}.")
    dimensions = 1 if kind not in TPUS else 2 if kind in ("v5e", "v6e") else 3
    if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * dimensions), shape):
        rule = "a number of devices" if dimensions == 1 else f"{dimensions} numbers of chips, joined by x"
        raise UserError(f"--topology={topology}: the shape of {kind} is {rule}, as in {EXAMPLES}.")
    if kind == "cpu":
        return _cpu(topology, int(shape))
    sizes, hardware = tuple(int(size) for size in shape.split("x")), named(kind)
    assert hardware is not None
    return Target(topology, hardware, _tpu(topology, kind, sizes) if kind in TPUS else _gpu(topology, hardware, sizes[0]))


def _cpu(topology: str, number: int) -> Target:
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # jax is already initialized, and its number of devices is fixed
        pass
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UserError(
            f"--topology={topology}: this process simulates {len(devices)} devices; set XLA_FLAGS=--xla_force_host_platform_device_count={number}."
        )
    return Target(topology, measured("cpu", number), devices[:number])


def _tpu(topology: str, kind: str, sizes: tuple[int, ...]) -> Sequence[Any]:
    from jax.experimental import topologies

    # libtpu lets one process at a time load it, because a chip serves only one; here no chip is used.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # otherwise each chip appears as two devices, one per core
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(f"--topology={topology} needs the TPU compiler; pip install 'plasticity_jax[tpu]'.") from error
        raise UserError(f"--topology={topology}: {reason(error)}; give a shape that {kind} comes in, as in {EXAMPLES}.") from error


def _gpu(topology: str, hardware: Hardware, number: int) -> Sequence[Any]:
    from jax.experimental import topologies

    if number > GPUS_PER_NODE and number % GPUS_PER_NODE:
        raise UserError(f"--topology={topology}: above {GPUS_PER_NODE}, GPUs come in whole nodes; give a multiple of {GPUS_PER_NODE}.")
    nodes = max(number // GPUS_PER_NODE, 1)
    try:
        return topologies.get_topology_desc(platform="cuda", topology=f"1x{nodes}x{number // nodes}", target_config=_target_config(hardware)).devices
    except NotImplementedError as error:
        raise UserError(f"--topology={topology} needs the GPU compiler; pip install 'plasticity_jax[cuda]'.") from error


# Per card: streaming multiprocessors (SMs), FP32 lanes per SM, shared memory per SM and its maximum per block, L2 bytes, clock in GHz, compute
# capability. Sources: NVIDIA's A100 and H100 white papers, CUDA's table of compute capabilities.
_CARDS = {
    "a100": (108, 64, 167936, 166912, 40 * 2**20, 1.41, (8, 0)),
    "a100-40": (108, 64, 167936, 166912, 40 * 2**20, 1.41, (8, 0)),
    "h100": (132, 128, 233472, 232448, 50 * 2**20, 1.98, (9, 0)),
    "h200": (132, 128, 233472, 232448, 50 * 2**20, 1.98, (9, 0)),
}


def _target_config(hardware: Hardware) -> str:
    """XLA's description of a card (`GpuTargetConfigProto` as text)."""
    cores, lanes, shared, shared_optin, cache, clock, (major, minor) = _CARDS[hardware.name]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_optin}
  core_count: {cores}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(hardware.bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {hardware.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{hardware.kind}"
"""
