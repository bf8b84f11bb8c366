"""Loading, running, examining and tuning a model give the same on one device, on eight, and on two processes; no device holds more than its share."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import environment, python
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


@pytest.mark.parametrize("tag", ["one", "eight", "two"])
def test_a_second_model_of_the_same_shapes_compiles_nothing(found, tag):
    first, again = found[tag]["compiled"]
    assert found[tag]["same again"] and first > 10 and again == 0


@pytest.mark.parametrize("tag", ["eight", "two"])
def test_no_device_holds_more_than_its_shard_of_the_model(found, tag):
    """The norms' gains, which are whole everywhere, are the rest."""
    norms = 4 * 3 * 16
    for name, whole in found["one"]["held"].items():
        assert found[tag]["held"][name] == (whole - norms) // 8 + norms


MEMORY = """
import json
import jax
from plasticity_jax.analysis.probes import lower_states
from plasticity_jax.analysis.spectra import lower_spectra
from plasticity_jax.config import MeshConfig, ModelConfig
from plasticity_jax.evaluate.likelihood import lower_likelihoods
from plasticity_jax.model.forward import Forward, lower_record_nats
from plasticity_jax.model.load import abstract_loaded
from plasticity_jax.model.scalar_head import lower_row_scores, scalar_shardings, without_output
from plasticity_jax.parallel import make_mesh

model = ModelConfig(vocab_size=256, d_model=256, n_layers=32, n_heads=8, n_kv_heads=8, d_ff=768)
mesh = make_mesh(MeshConfig(data=1, fsdp=8))
params = abstract_loaded(model, mesh, "float32")
forward = Forward("float32", scan_layers=True, mesh=mesh)
decoder = without_output(model)
head = jax.ShapeDtypeStruct((256,), "float32", sharding=scalar_shardings(mesh, decoder)["head"])
scalar = {"decoder": abstract_loaded(decoder, mesh, "float32"), "head": head}
programs = {
    "gap": lower_record_nats(forward, model, params, batch_size=8, seq_len=16, isolate=False, loss_chunks=1),
    "probe": lower_states(forward, model, params, 1024, 8192, "last"),
    "likelihood": lower_likelihoods(forward, model, params, batch_size=8, max_length=16),
    "reward": lower_row_scores(forward, decoder, scalar, batch_size=8, max_length=16),
    "spectra": lower_spectra(model, params, False, mesh),
}
whole = 4 * sum(x.size for x in jax.tree.leaves(params))
layer = 4 * sum(x.size for x in jax.tree.leaves(params["blocks"])) // 32
found = {name: program.compile().memory_analysis() for name, program in programs.items()}
print(json.dumps({"whole": whole, "layer": layer, **{name: [m.argument_size_in_bytes, m.temp_size_in_bytes] for name, m in found.items()}}))
"""


def test_no_program_holds_more_than_its_shards_and_a_layer():
    """On a CPU the loop over layers works on a copy of the shards, and a layer is gathered, copied and transposed; unrolled, all 32 layers would be there."""
    found = json.loads(python(MEMORY, devices=8).splitlines()[-1])
    whole, layer = found.pop("whole"), found.pop("layer")
    for name, (arguments, temporaries) in found.items():
        assert arguments <= 1.05 * whole / 8, name
        states = 4 * 33 * 1024 * 256 if name == "probe" else 0  # of the texts, after every layer
        assert temporaries <= whole / 8 + 3 * layer + 3 * states, (name, temporaries / layer)
