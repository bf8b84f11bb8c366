import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.errors import UserError
from plasticity_jax.model import Checkpoints
from plasticity_jax.model.checkpoint import drop_optimizer

# Every bit pattern counts: negative zero, subnormals, infinities and a NaN with a payload must come back as they were.
PARAMS = {
    "a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32),
    "b": {"c": jnp.asarray(np.array([0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC01234], np.uint32).view(np.float32))},
}
OPTIMIZER = ({"mu": PARAMS}, jnp.int32(7))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_bit_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bitwise(tmp_path, asynchronous, capfd):
    with Checkpoints(tmp_path / "checkpoints", asynchronous=asynchronous) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, PARAMS, OPTIMIZER)
        checkpoints.wait()
        assert checkpoints.latest() == 3
        params, optimizer = checkpoints.restore(3, abstract(PARAMS), abstract(OPTIMIZER))
        assert_bit_equal(checkpoints.restore_params(3, abstract(PARAMS)), PARAMS)
    assert_bit_equal(params, PARAMS)
    assert_bit_equal(optimizer, OPTIMIZER)
    assert capfd.readouterr().err == ""


def test_the_latest_steps_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 9):
            checkpoints.save(step, PARAMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 9
        assert_bit_equal(checkpoints.restore_params(9, abstract(PARAMS)), PARAMS)


def test_chosen_steps_are_kept_beside_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep_steps=(5, 7)) as checkpoints:
        for step in (1, 5, 9, 12):
            checkpoints.save(step, PARAMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "5"]
    with Checkpoints(tmp_path, keep_steps=(5, 7)) as checkpoints:
        checkpoints.save(14, PARAMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["14", "5"]


def test_parameters_are_read_without_the_optimizer_that_was_dropped(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, PARAMS, OPTIMIZER)
    drop_optimizer(tmp_path)
    assert not (tmp_path / "3" / "optimizer").exists()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 3
        assert_bit_equal(checkpoints.restore_params(3, abstract(PARAMS)), PARAMS)
        np.testing.assert_array_equal(checkpoints.restore_array(3, abstract(PARAMS), 0), PARAMS["a"])
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.restore(3, abstract(PARAMS), abstract(OPTIMIZER))


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    params = {"a": jnp.arange(1 << 20, dtype=jnp.float32)}
    change = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 1, p), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params)
        params = change(params)
        checkpoints.wait()
        saved = checkpoints.restore_params(1, abstract(params))
    np.testing.assert_array_equal(saved["a"], np.arange(1 << 20, dtype=np.float32))


def test_restored_arrays_carry_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, PARAMS)
        checkpoints.wait()
        asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), PARAMS)
        restored = checkpoints.restore_params(0, asked)
    assert all(x.sharding == sharding for x in jax.tree.leaves(restored))


def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
    code = f"""
        import os, signal, sys
        import numpy as np
        from plasticity_jax.model import Checkpoints

        checkpoints = Checkpoints({str(tmp_path)!r})
        checkpoints.save(1, {{"a": np.full((4,), 1, np.float32)}})
        checkpoints.wait()
        checkpoints.save(2, {{"a": np.random.default_rng(0).normal(size=20_000_000).astype(np.float32)}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120)
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) > 1, "the second save had not begun"
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        restored = checkpoints.restore_params(1, {"a": jax.ShapeDtypeStruct((4,), np.float32)})
        np.testing.assert_array_equal(restored["a"], 1)
        checkpoints.save(2, {"a": np.full((4,), 2, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_another_shape_is_refused_in_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, PARAMS)
        checkpoints.wait()
        with pytest.raises(UserError, match="cannot be read") as caught:
            checkpoints.restore_params(0, {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32), "b": abstract(PARAMS["b"])})
    assert "\n" not in str(caught.value)
