import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from plasticity_jax.data.stage import wheels_dir as find_wheels


@pytest.fixture(scope="session")
def wheels_dir() -> Path:
    """The folder of the pinned wheels, which `make test` brings; $PLASTICITY_WHEELS names another."""
    folder = Path(os.environ.get("PLASTICITY_WHEELS", "")) if os.environ.get("PLASTICITY_WHEELS") else find_wheels("data/wheels")
    assert folder.is_dir(), f"{folder} is missing: run make wheels"
    return folder
