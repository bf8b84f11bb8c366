import textwrap

import jax
import pytest
from jax.sharding import AxisType
from running import TINY, end, python, start

from plasticity_jax.config import MeshConfig, ModelConfig
from plasticity_jax.errors import UserError
from plasticity_jax.model import abstract_params
from plasticity_jax.parallel import make_mesh, param_shardings


def test_one_device_makes_a_mesh_of_four_automatic_axes():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=3), "the product of the sizes, 3, must equal the number of devices, 1"),
        (MeshConfig(fsdp=2), "the product of the sizes, 2, must divide the number of devices, 1"),
        (MeshConfig(data=-1, fsdp=-1), "only one may be -1"),
        (MeshConfig(tensor=0), "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        make_mesh(config, jax.devices()[:1])
    assert "\n" not in str(caught.value) and "mesh." in str(caught.value)


def on_eight_devices(code):
    return python(textwrap.dedent(code), devices=8)


def test_eight_devices_agree_with_one_and_hold_a_part_each():
    """Loss and gradient over data, fsdp and tensor together, against the same on one device."""
    on_eight_devices(
        """
        import jax, jax.numpy as jnp, numpy as np
        from plasticity_jax.config import MeshConfig, ModelConfig
        from plasticity_jax.errors import UserError
        from plasticity_jax.model import abstract_params, apply, init_params, masked_sum, token_losses
        from plasticity_jax.parallel import batch_sharding, make_mesh, param_shardings

        assert len(jax.devices()) == 8
        config = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
        params = init_params(config, 0)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (8, 13)))

        def loss(params, tokens):
            logits, _ = apply(config, params, tokens[:, :-1])
            total, count = masked_sum(token_losses(logits, tokens[:, 1:])[0], jnp.ones((8, 12)))
            return total / count

        expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(params, tokens)
        mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
        assert dict(mesh.shape) == {"member": 1, "data": 2, "fsdp": 2, "tensor": 2}
        shardings = param_shardings(mesh, abstract_params(config))
        placed = jax.device_put(params, shardings)
        assert placed["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 8, 12)
        step = jax.jit(jax.value_and_grad(loss), in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(None, shardings))
        actual, gradient = step(placed, jax.device_put(tokens, batch_sharding(mesh)))
        assert abs(actual - expected) <= 1e-5 * expected
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
            assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)

        members = make_mesh(MeshConfig(member=2, data=4))
        stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), abstract_params(config))
        assert {s.spec[0] for s in jax.tree.leaves(param_shardings(members, stacked, members=True))} == {"member"}

        try:
            param_shardings(make_mesh(MeshConfig(tensor=8)), abstract_params(ModelConfig(vocab_size=60, d_model=16, n_heads=4, n_kv_heads=2)))
            raise SystemExit("accepted")
        except UserError as error:
            assert "mesh.tensor=8 does not divide" in str(error), error
        """
    )


def test_every_parameter_has_a_sharding():
    shardings = param_shardings(make_mesh(MeshConfig(), jax.devices()[:1]), abstract_params(ModelConfig()))
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract_params(ModelConfig()))


def test_a_member_axis_that_does_not_divide_the_members_is_refused_before_anything_is_written(tmp_path):
    argv = ["study", "--config", TINY, "--workdir", tmp_path / "w", "--config.mesh.member=4", "--config.grid.mode=vmapped"]
    status, lines = end(start(*argv, devices=4))
    assert status == 2
    assert "mesh.member=4 does not divide the 2 members that are trained together; set mesh.member to a divisor of 2" in lines[-1]
    assert not (tmp_path / "w" / "tiny").exists()


def test_a_mesh_that_does_not_divide_the_parameters_is_refused_before_anything_is_written(tmp_path):
    argv = ["study", "--config", TINY, "--workdir", tmp_path / "w", "--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.model.d_model=36"]
    status, lines = end(start(*argv, "--config.model.n_heads=2", "--config.model.n_kv_heads=2", devices=8))
    assert status == 2
    assert "mesh.fsdp=8 does not divide axis" in lines[-1] and lines[-1].endswith("set mesh.fsdp to a divisor of 36, such as 4.")
    assert not (tmp_path / "w" / "tiny").exists()
