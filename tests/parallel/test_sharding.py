"""The golden table of where every parameter lies: `python tests/parallel/test_sharding.py` writes it anew."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from plasticity_jax.config.presets import presets
from plasticity_jax.model import abstract_params
from plasticity_jax.parallel.mesh import AXES
from plasticity_jax.parallel.sharding import format_sharding_table, inference_shardings, param_shardings, sharding_table

GOLDEN = Path(__file__).parents[1] / "golden" / "shardings"
MESHES = ((1, 1, 8, 1), (1, 8, 1, 1), (1, 2, 1, 4), (1, 1, 16, 4), (2, 1, 32, 1))


def mesh_of(sizes):
    return AbstractMesh(sizes, AXES)


def golden(name):
    blocks = []
    for sizes in MESHES:
        lines = format_sharding_table(sharding_table(mesh_of(sizes), abstract_params(presets()[name])))
        blocks.append("\n".join([", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes)), *lines]))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("name", presets())
def test_every_preset_lies_on_every_mesh_as_recorded(name):
    assert golden(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("sizes", MESHES)
def test_devices_of_a_member_hold_each_matrix_once(sizes):
    """Shards times shape per device is the shape, times the copies along axes that do not split it."""
    mesh = mesh_of(sizes)
    for path, row in sharding_table(mesh, abstract_params(presets()["llama-1b"])).items():
        split = np.prod([mesh.shape[axis] for axis in row["spec"] if axis])
        assert np.prod(row["per_device"]) * split == np.prod(row["shape"]), path
        assert path.endswith("scale") or {"fsdp", "tensor"} <= set(row["spec"])


def test_inference_lies_whole_over_fsdp_and_split_over_tensor():
    mesh, abstract = mesh_of((1, 1, 4, 2)), abstract_params(presets()["llama-125m"])
    for stored, read in zip(jax.tree.leaves(param_shardings(mesh, abstract)), jax.tree.leaves(inference_shardings(mesh, abstract)), strict=True):
        assert "fsdp" not in read.spec and ("tensor" in stored.spec) == ("tensor" in read.spec)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for preset in presets():
        (GOLDEN / f"{preset}.txt").write_text(golden(preset), encoding="utf-8")
