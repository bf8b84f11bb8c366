"""Twenty steps of the real training step are the same on every mesh and with every way of saving memory; so are checkpoints and generation."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import environment

SCRIPT = Path(__file__).parent / "on_meshes.py"
sys.path.insert(0, str(SCRIPT.parent))
from on_meshes import DECAYS, MEMBERS, RUNS  # noqa: E402

pytestmark = pytest.mark.slow

CLOSE = 1e-10  # of norms per tensor and of losses: float64 after twenty steps of Adam, with room for four digits of amplified rounding
REFERENCE = {name: "olmo2-one" if name.startswith("olmo2") else "one" for name in RUNS}
# The meshes of make test, which between them split every axis, scan, recompute, chunk, and accumulate; the others run nightly.
ALWAYS = ("one", "tensor4-data2", "fsdp4-tensor2-scan-full-chunks", "olmo2-one", "olmo2-tensor4-data2-scan", "vmapped", "member2-fsdp4")


def on_meshes(folder, names):
    done = subprocess.run([sys.executable, SCRIPT, folder, *names], env=environment(devices=8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def always(tmp_path_factory):
    return on_meshes(tmp_path_factory.mktemp("meshes"), ALWAYS)


@pytest.fixture(scope="module")
def nightly(tmp_path_factory):
    return on_meshes(tmp_path_factory.mktemp("every-mesh"), [*RUNS, *MEMBERS])


@pytest.fixture
def folder(request, name):
    return request.getfixturevalue("always" if name in ALWAYS else "nightly")


def cases(names):
    return [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.nightly]) for name in names]


def assert_close(actual, expected):
    assert set(actual) == set(expected)
    np.testing.assert_allclose(actual["losses"], expected["losses"], rtol=CLOSE)
    assert expected["losses"][-1] < expected["losses"][0]
    for name in set(expected) - {"losses"}:
        a, b = actual[name], expected[name]
        assert a.dtype == b.dtype == np.float64
        assert np.linalg.norm(a - b) <= CLOSE * np.linalg.norm(b), name


@pytest.mark.parametrize("name", cases(name for name in RUNS if REFERENCE[name] != name))
def test_training_is_the_same_on_every_mesh(folder, name):
    assert_close(np.load(folder / f"{name}.npz"), np.load(folder / f"{REFERENCE[name]}.npz"))


@pytest.mark.parametrize("name", cases(MEMBERS))
@pytest.mark.parametrize("decay", DECAYS)
def test_members_on_their_own_axis_are_the_same_as_alone(folder, name, decay):
    assert_close(np.load(folder / f"{name}.{decay}.npz"), np.load(folder / ("one.npz" if decay == DECAYS[0] else f"one.{decay}.npz")))


@pytest.mark.parametrize("name", cases(name for name in RUNS if RUNS[name][0] is RUNS["one"][0] and not RUNS[name][2] and name != "one"))
def test_completions_are_the_same_on_every_mesh(folder, name):
    tokens = np.load(folder / "one.tokens.npz")["tokens"]
    assert len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(np.load(folder / f"{name}.tokens.npz")["tokens"], tokens)


@pytest.mark.parametrize("name", ["one", pytest.param("fsdp8", marks=pytest.mark.nightly)])
def test_a_checkpoint_of_any_mesh_restores_on_any_other_bit_for_bit(folder, name):
    assert (folder / "unequal.txt").read_text() == ""
