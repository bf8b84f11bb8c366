"""What changes the rounding of a run, and so its last digits: devices, libraries, flags, and how the work was divided. Imports jax only when needed."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plasticity_jax.config import StudyConfig

# Vector and matrix units of CPUs, by which libraries choose their code.
_UNITS = re.compile(r"avx\w*|amx_\w+|fma|f16c|sse4_2|asimd\w*|sve\w*|bf16|i8mm")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE", "JAX_ENABLE_X64")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tokenizers", "sentencepiece", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
# Execution fields that set a cadence, a place, or a limit: no number depends on them.
_NO_MATTER = re.compile(
    r"data\..*|launch\..*|report\..*|probe\.files|grid\.mode|finetune\.select|evaluate\.grade_workers|train\.(keep_.*|profile_steps)"
    r"|.*\.(log|eval|checkpoint)_every|train\.eval_tokens"
)


def environment(config: StudyConfig, devices_used: str, *, together: int) -> dict[str, Any]:
    """The environment of this process.

    Args:
      devices_used: by the stage, as its declaration says: "all", "first" or "none".
      together: runs that are carried out as one program.
    """
    libraries = {name: version for name in _LIBRARIES if (version := _version(name))}
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
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
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


def environments_of(provenance: dict[str, Any]) -> list[dict[str, str]]:
    """The environments in which a run was made, one after the other: what it is → which one, flat. One of before there were environments has fewer facts."""
    execution = {f"config {name}": value for name, value in _dict(provenance.get("execution")).items() if not _NO_MATTER.fullmatch(name)}
    recorded = provenance.get("environments")
    old = {name: provenance[name] for name in ("device_kind", "mesh") if name in provenance} | {
        "libraries": _of_libraries(provenance.get("versions"))
    }
    found = [one for one in recorded if isinstance(one, dict)] if isinstance(recorded, list) and recorded else [old]
    commit = {"code": _dict(provenance.get("git")).get("commit")}
    return [_flat(one | execution | commit) for one in found]


def _of_libraries(versions: Any) -> dict[str, Any]:
    return {name: version for name, version in _dict(versions).items() if name in _LIBRARIES}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {} if value is None else {f"{prefix}{name}": str(value)}
    return flat


def differing(provenances: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all environments of all runs, where it is known → what it is for each run, the values of a run's own joined by "then"."""
    of_runs = [environments_of(provenance) for provenance in provenances]
    names = list(dict.fromkeys(name for of_run in of_runs for one in of_run for name in one))
    found = {}
    for name in names:
        values = [list(dict.fromkeys(one[name] for one in of_run if name in one)) for of_run in of_runs]
        if len({value for of_run in values for value in of_run}) > 1:
            found[name] = [" then ".join(of_run) or "unknown" for of_run in values]
    return found
