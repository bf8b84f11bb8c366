"""What every test process has in common. docs/testing.md says why."""

import os
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _flags(flags: str) -> str:
    """XLA's flags for tests: programs are compiled with LLVM's optimization level 0, unless the caller names a level."""
    level = "--xla_backend_optimization_level"
    return flags if level in flags else f"{flags} {level}=0".strip()


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

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def wheels_dir() -> Path:
    """The folder of the pinned wheels, which `make test` brings; $PLASTICITY_WHEELS names another."""
    from plasticity_jax.data.stage import wheels_dir as find  # here, so that shapes are checked from the first import on

    folder = find(os.environ.get("PLASTICITY_WHEELS", "data/wheels"))
    assert folder.is_dir(), f"{folder} is missing: run make wheels"
    return folder


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


def pytest_collection_modifyitems(items):
    rank = {str(ROOT / "tests" / name): i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))
