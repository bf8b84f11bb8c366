"""What a result rests on besides its config: code, packages, time."""

import contextlib
import functools
import importlib.metadata
import subprocess
import time
from pathlib import Path
from typing import Any

from plasticity_jax.config import StudyConfig, execution_fields
from plasticity_jax.runs.run import Run

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "array-record",
    "tokenizers",
    "sentencepiece",
    "numpy",
)


def new_provenance(run: Run, config: StudyConfig) -> dict[str, Any]:
    """What a run rests on, as far as it is known when it starts: parents, execution fields, package versions, git state, time."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "parents": run.parents,
        "execution": execution_fields(config),
        "versions": versions,
        "git": _git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def _git_state() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; empty for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", str(here)))}
    except (OSError, subprocess.SubprocessError):
        return {}
