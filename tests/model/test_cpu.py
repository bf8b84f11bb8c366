"""The forms for CPUs: the same products, norms, softmax and gradients as NumPy's in float64, on CPUs only, and only where one device holds the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.config import MeshConfig
from plasticity_jax.model import cpu
from plasticity_jax.parallel.mesh import make_mesh

SHAPES = {"matrices": ((24, 16), (16, 8)), "heads": ((2, 3, 24, 16), (2, 3, 16, 8))}


def gradients(x, w, g, out_dtype, mesh=None):
    return cpu.forms(mesh)(lambda: jax.vjp(lambda x, w: cpu.matmul(x, w, out_dtype), x, w)[1](g))()


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "dtype, out_dtype, tolerance", [("float32", "float32", 1e-6), ("bfloat16", "bfloat16", 2**-8), ("bfloat16", "float32", 2**-7)]
)
def test_products_and_gradients_are_those_of_numpy_in_float64(shapes, dtype, out_dtype, tolerance):
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    g = jnp.asarray(random.normal(size=(*shapes[0][:-1], shapes[1][-1])), out_dtype)
    wide_x, wide_w, wide_g = (np.asarray(a, np.float64) for a in (x, w, g))
    of_x, of_w = gradients(x, w, g, out_dtype)
    assert (of_x.dtype, of_w.dtype) == (x.dtype, w.dtype)
    found = {
        "product": (cpu.forms(None)(cpu.matmul)(x, w, out_dtype), wide_x @ wide_w),
        "gradient of x": (of_x, wide_g @ wide_w.swapaxes(-1, -2)),
        "gradient of w": (of_w, wide_x.swapaxes(-1, -2) @ wide_g),
    }
    for what, (ours, exact) in found.items():
        error = np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
        assert error < tolerance, f"{what}: relative error {error}"


def norm_in_float64(x, scale, g, eps):
    inverse = (np.mean(x**2, axis=-1, keepdims=True) + eps) ** -0.5
    along = np.sum(g * scale * x, axis=-1, keepdims=True) * inverse**3 / x.shape[-1]
    return x * inverse * scale, g * scale * inverse - x * along, np.sum(g * x * inverse, axis=tuple(range(x.ndim - 1)))


def softmax_in_float64(x, g):
    probs = np.exp(x - x.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return probs, probs * g - probs * np.sum(probs * g, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("members", [False, True], ids=["one", "members"])
def test_norms_softmax_and_their_gradients_are_those_of_numpy_in_float64(dtype, tolerance, members):
    random = np.random.default_rng(0)
    x, g = (jnp.asarray(3 * random.normal(size=(2, 5, 7, 24)), dtype) for _ in range(2))
    scale = jnp.asarray(random.normal(size=(2, 24)), "float32")

    def of_norm(x, scale, g):
        out, pull = jax.vjp(lambda x, scale: cpu.rms_norm(x, scale, 1e-2), x, scale)
        return out, *pull(g)

    def of_softmax(x, g):
        out, pull = jax.vjp(cpu.softmax, x)
        return out, *pull(g)

    def over_members(function):
        return jax.vmap(function) if members else lambda *arrays: tuple(jnp.stack(out) for out in zip(*map(function, *arrays), strict=True))

    wide_x, wide_scale, wide_g = (np.asarray(a, np.float64) for a in (x, scale, g))
    exact = [np.stack(out) for out in zip(*(norm_in_float64(*of, 1e-2) for of in zip(wide_x, wide_scale, wide_g, strict=True)), strict=True)]
    found = [*cpu.forms(None)(over_members(of_norm))(x, scale, g), *cpu.forms(None)(over_members(of_softmax))(*(a.astype("float32") for a in (x, g)))]
    for what, ours, right in zip(
        ("norm", "of x", "of scale", "softmax", "of its x"), found, [*exact, *softmax_in_float64(wide_x, wide_g)], strict=True
    ):
        error = np.linalg.norm(np.asarray(ours, np.float64) - right) / np.linalg.norm(right)
        assert error < tolerance, f"{what}: relative error {error}"


def test_the_norm_of_several_devices_and_of_other_platforms_is_the_plain_one():
    def lowered_norm(platform, mesh):
        norm = cpu.forms(mesh)(jax.grad(lambda x: jnp.sum(cpu.rms_norm(x, jnp.ones(8), 1e-5))))
        return jax.jit(norm).trace(jnp.ones((4, 8))).lower(lowering_platforms=(platform,)).as_text()

    assert "optimization_barrier" in lowered_norm("cpu", None)
    for platform, mesh in (("tpu", None), ("cuda", None), ("cpu", jax.sharding.AbstractMesh((4,), ("data",)))):
        assert "optimization_barrier" not in lowered_norm(platform, mesh)


def lowered(platform: str, mesh=None, dtype=jnp.bfloat16) -> str:
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in SHAPES["heads"])
    g = jax.ShapeDtypeStruct((2, 3, 24, 8), dtype)
    function = jax.jit(lambda x, w, g: (cpu.forms(mesh)(cpu.computed_once)(x), gradients(x, w, g, dtype, mesh)))
    return function.trace(x, w, g).lower(lowering_platforms=(platform,)).as_text()


def test_only_a_cpu_gets_them():
    assert "LayoutConstraint" in lowered("cpu") and "optimization_barrier" in lowered("cpu")
    for platform in ("tpu", "cuda"):
        assert "LayoutConstraint" not in lowered(platform) and "optimization_barrier" not in lowered(platform)


def test_several_devices_and_float32_get_plain_products():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    assert "LayoutConstraint" not in lowered("cpu", mesh) and "optimization_barrier" not in lowered("cpu", mesh)
    assert "LayoutConstraint" not in lowered("cpu", dtype=jnp.float32)
    assert not cpu.allowed(), "nothing is left allowed"


def test_members_of_one_program_get_them_too():
    x, w = (jnp.asarray(np.random.default_rng(1).normal(size=(4, *shape)), jnp.bfloat16) for shape in SHAPES["matrices"])
    g = jnp.ones((4, 24, 8), jnp.bfloat16)
    together = jax.jit(jax.vmap(lambda x, w, g: gradients(x, w, g, "bfloat16", make_mesh(MeshConfig()))))
    assert "LayoutConstraint" in together.lower(x, w, g).as_text()
    exact = np.einsum("mri,mro->mio", *(np.asarray(a, np.float64) for a in (x, g)))
    np.testing.assert_allclose(np.asarray(together(x, w, g)[1], np.float64), exact, rtol=2**-7, atol=2**-7)
