"""Sets compiler flags for each platform, with a reason for each, and the compilation cache. Does not import jax."""

import hashlib
import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("plasticity_jax")


@dataclass(frozen=True)
class Flag:
    """A compiler flag, and the reason for setting it."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Platform:
    """The flags of a platform.

    Attributes:
      variable: environment variable from which the runtime reads them.
      names: its names in JAX_PLATFORMS.
      packages: the platform may be available if any of these is installed.
    """

    variable: str
    names: tuple[str, ...]
    packages: tuple[str, ...]
    flags: tuple[Flag, ...]


# jax 0.10 to 0.12 accept every flag here. An unknown flag would abort the process.
PLATFORMS = (
    Platform(
        "XLA_FLAGS",
        ("cuda", "gpu"),
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "gather the next layer's weights during this layer's matmuls"),
            Flag(
                "xla_gpu_enable_pipelined_all_gather",
                "true",
                "in a loop over layers, start each gather one iteration before its use",
            ),
            Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "sum a layer's gradients while the next layer's are computed"),
            Flag("xla_gpu_enable_while_loop_double_buffering", "true", "avoid copies between iterations of the pipelined loop"),
        ),
    ),
    Platform(
        "LIBTPU_INIT_ARGS",
        ("tpu",),
        ("libtpu",),
        (
            Flag("xla_enable_async_all_gather", "true", "gather weights without blocking the preceding matmuls"),
            Flag("xla_tpu_enable_async_collective_fusion", "true", "run collectives inside fusions that compute at the same time"),
            Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "include all-gathers, which are most of the fsdp traffic"),
            Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "let one collective span several fusions"),
            Flag("xla_tpu_overlap_compute_collective_tc", "true", "keep the tensor core computing during communication"),
        ),
    ),
)

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_GOOGLE = "0x1ae0"  # as a vendor of PCI devices
ROOT = Path("/")


def leave_out_absent_tpu() -> None:
    """Keeps jax from looking for a TPU where libtpu is installed, as for `plasticity check`, but there is none: libtpu would print its errors.

    Call it before jax is imported. Where JAX_PLATFORMS is set, or a plugin for another accelerator is installed, it does nothing.
    """
    if not os.environ.get("JAX_PLATFORMS") and _only_libtpu() and not _tpu_is_here():
        os.environ["JAX_PLATFORMS"] = "cpu"


def prepare_backend(compile_cache: str | None) -> None:
    """Sets compiler flags and the compilation cache of this process. Call it before jax is imported. Keeps values that the user has set.

    Args:
      compile_cache: folder, "~" allowed; None disables the cache. A folder that is not writable gives a warning and disables it too.
    """
    for here in PLATFORMS:
        if _may_be_here(here):
            os.environ[here.variable] = with_flags(os.environ.get(here.variable, ""), here.flags)
    if _CACHE_VARIABLE not in os.environ and compile_cache is not None:
        _choose_cache(compile_cache)
    if _CACHE_VARIABLE in os.environ:
        _shorten_cache_warnings()


def with_flags(text: str, flags: tuple[Flag, ...]) -> str:
    """Appends flags to the text of an environment variable. Flags that are already set keep their values."""
    given = {word.lstrip("-").partition("=")[0] for word in text.split()}
    return " ".join([text, *(f"--{flag.name}={flag.value}" for flag in flags if flag.name not in given)]).strip()


def _may_be_here(here: Platform) -> bool:
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return any(name in asked.split(",") for name in here.names)
    return any(importlib.util.find_spec(package) is not None for package in here.packages)


def _only_libtpu() -> bool:
    """Whether a TPU is the only accelerator that jax could find with what is installed."""
    from importlib.metadata import entry_points

    if importlib.util.find_spec("libtpu") is None:
        return False
    return not entry_points(group="jax_plugins") and importlib.util.find_spec("jax_plugins") is None


def _tpu_is_here() -> bool:
    """Whether this machine may have a TPU: a device file of one, any PCI device of its maker, or the user says so."""
    if any(os.environ.get(name) for name in ("JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH")):
        return True
    if any(ROOT.glob("dev/accel*")) or any(ROOT.glob("dev/vfio/[0-9]*")):
        return True
    return any(path.read_text(encoding="ascii").strip() == _GOOGLE for path in ROOT.glob("sys/bus/pci/devices/*/vendor"))


def _choose_cache(compile_cache: str) -> None:
    folder = Path(compile_cache).expanduser() / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{os.getpid()}").touch()
        (folder / f".{os.getpid()}").unlink()
    except OSError as error:
        log.warning("launch.compile_cache=%s cannot be written to (%s): every start compiles again", compile_cache, error.strerror)
        return
    os.environ[_CACHE_VARIABLE] = str(folder)


def _machine() -> str:
    """Folder name for this processor type and compiler. jax's own cache key does not distinguish processors."""
    from importlib.metadata import version

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    described = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))} or set(lines))
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:8]
    return f"jaxlib-{version('jaxlib')}-{platform.machine()}-{digest}"


def _shorten_cache_warnings() -> None:
    if not isinstance(warnings.showwarning, _CacheWarningsInOneLine):  # an earlier command of this process has done it
        warnings.showwarning = _CacheWarningsInOneLine(warnings.showwarning)


class _CacheWarningsInOneLine:
    def __init__(self, show: Callable[..., None]):
        self._show = show

    def __call__(self, message, category, filename, lineno, file=None, line=None) -> None:
        if "persistent compilation cache" in str(message):
            log.warning(
                "a compiled program in %s cannot be used and is compiled again: %s",
                os.environ.get(_CACHE_VARIABLE),
                " ".join(str(message).split())[:200],
            )
        else:
            self._show(message, category, filename, lineno, file, line)
