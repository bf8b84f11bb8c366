"""Twenty float32 steps of the real training step give the same on every mesh and with every way of saving memory; so do checkpoints and generation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from on_meshes import DECAYS, MEMBERS, RUNS  # noqa: E402

CLOSE = 1e-5  # of norms per tensor and of losses; architecture, section 3
REFERENCE = {name: "olmo2-one" if name.startswith("olmo2") else "one" for name in RUNS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "on_meshes.py"), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def assert_close(actual, expected):
    assert set(actual) == set(expected)
    np.testing.assert_allclose(actual["losses"], expected["losses"], rtol=CLOSE)
    assert expected["losses"][-1] < expected["losses"][0]
    for name in set(expected) - {"losses"}:
        a, b = actual[name].astype(np.float64), expected[name].astype(np.float64)
        assert np.linalg.norm(a - b) <= CLOSE * np.linalg.norm(b), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if REFERENCE[name] != name])
def test_training_is_the_same_on_every_mesh(folder, name):
    assert_close(np.load(folder / f"{name}.npz"), np.load(folder / f"{REFERENCE[name]}.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("decay", DECAYS)
def test_members_on_their_own_axis_are_the_same_as_alone(folder, name, decay):
    assert_close(np.load(folder / f"{name}.{decay}.npz"), np.load(folder / ("one.npz" if decay == DECAYS[0] else f"one.{decay}.npz")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name][0] is RUNS["one"][0] and not RUNS[name][2] and name != "one"])
def test_completions_are_the_same_on_every_mesh(folder, name):
    tokens = np.load(folder / "one.tokens.npz")["tokens"]
    assert len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(np.load(folder / f"{name}.tokens.npz")["tokens"], tokens)


@pytest.mark.slow
def test_a_checkpoint_of_any_mesh_restores_on_any_other_bit_for_bit(folder):
    assert (folder / "unequal.txt").read_text() == ""
