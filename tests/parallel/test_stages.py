"""Loading, running, examining and tuning a model give the same on one device, on eight, and on two processes; no device holds more than its share."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import environment
from test_processes import free_port

SCRIPT = Path(__file__).parent / "stages_on_meshes.py"
sys.path.insert(0, str(SCRIPT.parents[1] / "train"))

pytestmark = pytest.mark.slow


def started(devices, *argv):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, argv)], env=environment(devices), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Tag → what the script found."""
    from test_verifier import separable, write_samples
    from worlds import CONFIG, World

    from plasticity_jax.model.hf_export import export_model

    world = World(tmp_path_factory.mktemp("world"), CONFIG)
    world.pretrain({"base": 0.1}, CONFIG)
    write_samples(world.root / "told", separable)
    export_model(world.root / "base", world.root / "hf", "float32")
    coordinator = f"127.0.0.1:{free_port()}"
    for of_tag in (
        [(1, "one", 1)],
        [(8, "eight", 8)],
        [(4, "two", 8, coordinator, 0), (4, "two", 8, coordinator, 1)],
    ):
        children = [started(devices, world.root, *argv) for devices, *argv in of_tag]
        ended = [child.communicate()[1] for child in children]
        assert not any(child.returncode for child in children), "\n".join(ended)
    return {tag: json.loads((world.root / f"{tag}.json").read_text()) for tag in ("one", "eight", "two")}


@pytest.mark.parametrize("tag", ["eight", "two"])
def test_a_mesh_changes_rounding_only(found, tag):
    one, other = found["one"], found[tag]
    assert other["hash"] == one["hash"] and one["hash"]["hf"] == one["hash"]["float32"] != one["hash"]["bfloat16"]
    for name, tolerance in (("float32", 1e-6), ("hf", 1e-6), ("bfloat16", 2e-3)):
        np.testing.assert_allclose(other["nats"][name], one["nats"][name], rtol=tolerance)
    assert np.abs(np.subtract(one["nats"]["bfloat16"], one["nats"]["float32"])).max() > 1e-6
    for name in ("states", "logits", "rewards"):
        np.testing.assert_allclose(other[name], one[name], atol=2e-4 if name == "rewards" else 1e-5, rtol=1e-4)
    for name, values in one["spectra"].items():
        np.testing.assert_allclose(other["spectra"][name], values, rtol=1e-4, atol=1e-6)
    for name, value in one["norms"].items():
        assert other["norms"][name] == pytest.approx(value, rel=1e-6)
    for name, value in (one["finetuned"] | one["verifier"]).items():
        actual = (other["finetuned"] | other["verifier"])[name]
        if name != "seconds":
            assert actual == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
    assert one["verifier"]["auc"] > 0.9 and one["finetuned"]["relative_update"] > 0.01


@pytest.mark.parametrize("tag", ["eight", "two"])
def test_no_device_holds_more_than_its_shard_of_the_model(found, tag):
    """The norms' gains, which are whole everywhere, are the rest."""
    norms = 4 * 3 * 16
    for name, whole in found["one"]["held"].items():
        assert found[tag]["held"][name] == (whole - norms) // 8 + norms
