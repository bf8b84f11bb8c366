"""Where a run is made: what of this machine and process changes its rounding. Imports jax only when needed."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from plasticity_jax.config import StudyConfig
from plasticity_jax.runs.environment import LIBRARIES

# Vector and matrix units of CPUs, by which libraries choose their code.
_UNITS = re.compile(r"avx\w*|amx_\w+|fma|f16c|sse4_2|asimd\w*|sve\w*|bf16|i8mm")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE", "JAX_ENABLE_X64")


def environment(config: StudyConfig, devices_used: str, *, together: int) -> dict[str, Any]:
    """The environment of this process.

    Args:
      devices_used: by the stage, as its declaration says: "all", "first" or "none".
      together: runs that are carried out as one program.
    """
    libraries = {name: version for name in LIBRARIES if (version := _version(name))}
    found = {"python": platform.python_version(), "libraries": libraries, "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ}}
    if devices_used == "none":
        return found | {"cpu": cpu()}
    import jax

    from plasticity_jax.model.kernels import choose_kernel
    from plasticity_jax.parallel import lanes, processes
    from plasticity_jax.parallel.mesh import make_mesh

    devices = lanes.devices()
    kernel = choose_kernel(
        config.train.attention,
        platform=devices[0].platform,
        head_dim=config.model.head_dim,
        compute_dtype=config.train.compute_dtype,
        seq_len=config.train.seq_len,
    )
    found |= {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": processes.count(),
        "attention": kernel,
        "members_in_one_program": together,
        "matmul_precision": str(getattr(jax.config, "jax_default_matmul_precision", None)),
    }
    if devices_used == "all":
        found["mesh"] = dict(make_mesh(config.mesh).shape)
    return found | ({"cpu": cpu()} if devices[0].platform == "cpu" else {})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Model, vector units and number of cores of this machine's processor; what is not known is left out."""
    found: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    if model := re.search(r"^model name\s*:\s*(.*)$", about, re.MULTILINE):
        found["model"] = model[1].strip()
    if flags := re.search(r"^(?:flags|Features)\s*:\s*(.*)$", about, re.MULTILINE):
        found["units"] = " ".join(sorted(flag for flag in flags[1].split() if _UNITS.fullmatch(flag)))
    return found
