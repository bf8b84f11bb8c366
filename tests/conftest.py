import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # tests compile what they test; those of the cache turn it on

import pytest


@pytest.fixture(scope="session")
def wheels_dir() -> Path:
    """The folder of the pinned wheels, which `make test` brings; $PLASTICITY_WHEELS names another."""
    from plasticity_jax.data.stage import wheels_dir as find  # here, so that shapes are checked from the first import on

    folder = find(os.environ.get("PLASTICITY_WHEELS", "data/wheels"))
    assert folder.is_dir(), f"{folder} is missing: run make wheels"
    return folder
