"""What is set before jax starts: compiler flags per platform, each with its reason, and where compiled programs are kept. Imports no jax."""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("plasticity_jax")


@dataclass(frozen=True)
class Flag:
    """One flag of the compiler, and why it is set."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Platform:
    """The flags of a platform.

    Attributes:
      variable: the environment variable that its runtime reads them from.
      names: what JAX_PLATFORMS calls it.
      packages: any of them, installed, means that the platform may be here.
    """

    variable: str
    names: tuple[str, ...]
    packages: tuple[str, ...]
    flags: tuple[Flag, ...]


# Every flag is one that jax 0.10 to 0.12 accept: an unknown one would end the process.
PLATFORMS = (
    Platform(
        "XLA_FLAGS",
        ("cuda", "gpu"),
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "gathers of the next layer's weights run during this layer's products"),
            Flag(
                "xla_gpu_enable_pipelined_all_gather",
                "true",
                "the same for a loop over layers: a gather is begun one turn of the loop before its use",
            ),
            Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "and gradients are still being summed while the next layer's are computed"),
            Flag("xla_gpu_enable_while_loop_double_buffering", "true", "so that the pipelined loop needs no copies between its turns"),
        ),
    ),
    Platform(
        "LIBTPU_INIT_ARGS",
        ("tpu",),
        ("libtpu",),
        (
            Flag("xla_enable_async_all_gather", "true", "gathers of weights do not hold up the products before them"),
            Flag("xla_tpu_enable_async_collective_fusion", "true", "collectives run inside the fusions that compute meanwhile"),
            Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "gathers among them: the greater part of what fsdp sends"),
            Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "one collective may stretch over several fusions"),
            Flag("xla_tpu_overlap_compute_collective_tc", "true", "the tensor core goes on computing while data travels"),
        ),
    ),
)

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def prepare_backend(compile_cache: str | None) -> None:
    """Sets flags and the folder of compiled programs for this process, before jax is imported. What the user has set himself stays.

    Args:
      compile_cache: folder, "~" allowed; None keeps no compiled programs. One that cannot be written to is said and left out.
    """
    for here in PLATFORMS:
        if _may_be_here(here):
            os.environ[here.variable] = with_flags(os.environ.get(here.variable, ""), here.flags)
    if _CACHE_VARIABLE not in os.environ and compile_cache is not None:
        _choose_cache(compile_cache)
    if _CACHE_VARIABLE in os.environ:
        _say_damage_in_one_line()


def with_flags(text: str, flags: tuple[Flag, ...]) -> str:
    """Flags as an environment variable holds them, after those that are there already, whose values stay."""
    given = {word.lstrip("-").partition("=")[0] for word in text.split()}
    return " ".join([text, *(f"--{flag.name}={flag.value}" for flag in flags if flag.name not in given)]).strip()


def _may_be_here(here: Platform) -> bool:
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return any(name in asked.split(",") for name in here.names)
    return any(importlib.util.find_spec(package) is not None for package in here.packages)


def _choose_cache(compile_cache: str) -> None:
    folder = Path(compile_cache).expanduser() / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{os.getpid()}").touch()
        (folder / f".{os.getpid()}").unlink()
    except OSError as error:
        log.warning("launch.compile_cache=%s cannot be written to (%s): every start compiles anew", compile_cache, error.strerror)
        return
    os.environ[_CACHE_VARIABLE] = str(folder)


def _machine() -> str:
    """Folder name for programs of this kind of processor and this compiler: jax's own key does not tell processors apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    described = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))} or set(lines))
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:8]
    return f"jaxlib-{importlib.metadata.version('jaxlib')}-{platform.machine()}-{digest}"


def _say_damage_in_one_line() -> None:
    show = warnings.showwarning

    def shown(message, category, filename, lineno, file=None, line=None):
        if "persistent compilation cache" in str(message):
            log.warning(
                "a compiled program in %s cannot be used and is compiled anew: %s",
                os.environ.get(_CACHE_VARIABLE),
                " ".join(str(message).split())[:200],
            )
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = shown
