"""What every test process has in common. docs/testing.md says why."""

import importlib.metadata
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _flags(given: str) -> str:
    """XLA's flags for tests: what a program computes is under test, so as little time as possible goes into making it fast. What the caller sets stays."""
    ours = {"--xla_backend_optimization_level": "0"}
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions do not have it, and end the process at an unknown flag
        ours["--xla_cpu_use_fusion_emitters"] = "false"
    if "--xla_backend_optimization_level" in given:
        return given
    return " ".join([given, *(f"{name}={value}" for name, value in ours.items())]).strip()


# Before jax is imported, for this process, its workers, and the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = _flags(os.environ.get("XLA_FLAGS", ""))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts background jobs; programs under test must take an interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest

from plasticity_jax.parallel.flags import prepare_backend

# Compiled programs are shared by all processes of a run, and kept for the next one.
prepare_backend(str(ROOT / ".jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "jax" in sys.modules:  # a plugin of pytest has imported it, and it reads its variables once
    config = sys.modules["jax"].config
    config.update("jax_platforms", os.environ["JAX_PLATFORMS"] or None)
    config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]))
    config.update("jax_persistent_cache_min_entry_size_bytes", int(os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"]))

hypothesis.settings.register_profile("default", deadline=None, max_examples=100)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=2000)  # make fuzz
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def wheels_dir() -> Path:
    """The folder of the pinned wheels, which `make test` brings; $PLASTICITY_WHEELS names another."""
    from plasticity_jax.data.wheels import wheels_dir as find  # here, so that shapes are checked from the first import on

    folder = find(os.environ.get("PLASTICITY_WHEELS", "data/wheels"))
    assert folder.is_dir(), f"{folder} is missing: run make wheels"
    return folder


def pytest_xdist_auto_num_workers(config):
    """Two workers; none where one file is asked for, which then begins sooner."""
    return 0 if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file() else 2


# Files that take longest, so that they begin first and no worker is left alone with one of them. Everything else follows in the order of its path.
LONGEST = (
    "parallel/test_processes.py",
    "launch/test_slurm.py",
    "test_study.py",
    "parallel/test_invariance.py",
    "parity/test_generation.py",
    "evaluate/test_generate.py",
    "train/test_finetune.py",
    "model/test_transformer.py",
    "train/test_step.py",
)


# Marker → programs that its tests run, and how they get here.
NEEDS = {
    "browser": (("chromium",), "apt-get install chromium fonts-dejavu-core"),
    "slurm": (("slurmctld", "munged", "sbatch"), "apt-get install slurm-wlm munge, and run as root"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for marker, (programs, way) in NEEDS.items():
        missing = [program for program in programs if shutil.which(program) is None]
        if missing and item.get_closest_marker(marker):
            pytest.fail(f"{', '.join(missing)} is missing, which tests marked {marker} run: {way} (.ci/run does so)", pytrace=False)


def pytest_collection_modifyitems(items):
    rank = {str(ROOT / "tests" / name): i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))
