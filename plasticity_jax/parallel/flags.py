"""What is set before a backend starts: compiler flags that hide communication behind computation, and the store of compiled programs."""

import hashlib
import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import MutableMapping
from pathlib import Path

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import reason

log = logging.getLogger("plasticity_jax")

# platform → (environment variable that its compiler reads, flags with the reason for each)
FLAGS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "tpu": (
        "LIBTPU_INIT_ARGS",
        (
            ("--xla_tpu_enable_async_collective_fusion=true", "gathers and scatters of weights run beside products"),
            ("--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true", "the same for FSDP's gathers, which are most of the traffic"),
            ("--xla_tpu_enable_async_collective_fusion_multiple_steps=true", "a gather may span several products, so the next layer's begins early"),
            ("--xla_tpu_overlap_compute_collective_tc=true", "lets the tensor core compute while a collective is under way"),
        ),
    ),
    "gpu": (
        "XLA_FLAGS",
        (
            ("--xla_gpu_enable_latency_hiding_scheduler=true", "orders the program so that collectives start as early as their operands exist"),
            ("--xla_gpu_enable_pipelined_all_gather=true", "in a loop over layers the next layer's weights are gathered during this one"),
            ("--xla_gpu_enable_pipelined_reduce_scatter=true", "in a loop over layers the last layer's gradients are scattered during this one"),
            ("--xla_gpu_enable_while_loop_double_buffering=true", "without two buffers a pipelined gather would be copied"),
        ),
    ),
    "cpu": ("XLA_FLAGS", ()),  # its collectives are copies within one memory
}

_MIN_COMPILE_SECONDS = 1.0  # what compiles faster is not worth a file
_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}


def guess_platform(environment: MutableMapping[str, str] = os.environ) -> str:
    """"tpu", "gpu" or "cpu": what JAX_PLATFORMS names first, or the plugin that is installed. Starts nothing."""
    named = environment.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if named:
        return {"cuda": "gpu", "rocm": "gpu"}.get(named, named)
    for name, modules in _PLUGINS.items():
        if any(importlib.util.find_spec(module) for module in modules):
            return name
    return "cpu"


def set_flags(name: str, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Adds the flags of a platform to the variable that its compiler reads; one that the user has set there, to any value, stays as it is.

    Returns:
      The flags added.
    """
    if name not in FLAGS:
        return []
    variable, flags = FLAGS[name]
    present = environment.get(variable, "").split()
    set_already = {flag.partition("=")[0] for flag in present}
    added = [flag for flag, _ in flags if flag.partition("=")[0] not in set_already]
    if added:
        environment[variable] = " ".join([*present, *added])
    return added


def prepare_backend(config: StudyConfig) -> None:
    """Sets the platform's flags and opens the store of compiled programs. Before any device is used."""
    name = guess_platform()
    set_flags(name)
    if config.launch.compile_cache is not None:
        _use_compile_cache(Path(config.launch.compile_cache).expanduser() / _machine(name))


def _machine(name: str) -> str:
    """Folder of the programs that may run here. A CPU's program uses the instructions of the machine that compiled it, and jax's key names none."""
    from jaxlib.version import __version__

    if name != "cpu":
        return f"{name}-jaxlib{__version__}"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        features = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    digest = hashlib.sha256(f"{platform.machine()} {platform.processor()} {features}".encode()).hexdigest()[:12]
    return f"cpu-jaxlib{__version__}-{digest}"


def _use_compile_cache(folder: Path) -> None:
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        log.warning("launch.compile_cache: %s cannot be used (%s); going on without stored programs", folder, reason(error))
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    _log_cache_warnings()


def _log_cache_warnings() -> None:
    """jax warns of an entry that it cannot read or write, and compiles; here that is one line like all others."""
    shown = warnings.showwarning
    if getattr(shown, "of_compile_cache", False):
        return

    def show(message, category, filename, lineno, file=None, line=None):
        if "persistent compilation cache" in str(message):
            log.warning("launch.compile_cache: a stored program could not be used, so it is compiled again (%s)", reason(message))
        else:
            shown(message, category, filename, lineno, file, line)

    show.of_compile_cache = True
    warnings.showwarning = show
