"""The forms for CPUs: products, norms, softmax, losses, attention and gradients as NumPy's in float64, on CPUs only, where one device holds the arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from plasticity_jax.config import MeshConfig, ModelConfig
from plasticity_jax.model import apply, cpu, init_params
from plasticity_jax.model.attention import attend, attend_causally, attention_mask
from plasticity_jax.parallel.mesh import make_mesh

SHAPES = {
    "narrower": ((24, 16), (16, 8)),
    "wider": ((24, 8), (8, 16)),
    "heads": ((2, 3, 24, 16), (2, 3, 16, 8)),
    "wider heads": ((2, 3, 24, 8), (2, 3, 8, 16)),
}
FOUR_CPUS = Mesh(np.array(jax.devices()[:1] * 4), ("data",))


class Device:
    """A stand-in for a device that is not here."""

    def __init__(self, platform: str):
        self.platform, self.id, self.process_index = platform, 0, 0


def one_device(platform: str) -> Mesh:
    return Mesh(np.array([Device(platform)]), ("data",))


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


def losses_in_float64(x, kernel, targets, weights, z_loss):
    """What is minimized, and its gradients."""
    logits = x @ kernel
    log_sums = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    hot = np.eye(kernel.shape[1])[targets]
    of_logits = weights[..., None] * (np.exp(logits - log_sums[..., None]) * (1 + 2 * z_loss * log_sums[..., None]) - hot)
    losses, squares = (weights * (log_sums - chosen)).sum(), z_loss * (weights * log_sums**2).sum()
    return losses + squares, losses, squares, of_logits @ kernel.T, np.einsum("btd,btv->dv", x, of_logits)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("vocab_size", [7, 40], ids=["narrower", "wider"])
@pytest.mark.parametrize("z_loss, chunks", [(0.0, 1), (1e-2, 4)])
def test_losses_and_their_gradients_are_those_of_numpy_in_float64(dtype, tolerance, vocab_size, z_loss, chunks):
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((3, 8, 24), (24, vocab_size)))
    targets, weights = random.integers(0, vocab_size, (3, 8)), random.integers(0, 2, (3, 8)).astype(np.float32)

    def minimized(x, kernel):
        total, *sums = cpu.summed_losses(x, kernel, jnp.asarray(targets), jnp.asarray(weights), z_loss=z_loss, chunks=chunks)
        return 2 * total + sum(sums), (total, *sums)  # the sums have no gradient

    gradients, sums = jax.jit(jax.grad(minimized, argnums=(0, 1), has_aux=True))(x, kernel)
    assert [of.dtype for of in gradients] == [x.dtype, kernel.dtype]
    *exact, of_x, of_kernel = losses_in_float64(*(np.asarray(a, np.float64) for a in (x, kernel)), targets, weights, z_loss)
    np.testing.assert_allclose(np.asarray(sums), exact, rtol=1e-6)
    for ours, right in zip(gradients, (of_x, of_kernel), strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - 2 * right) < tolerance * np.linalg.norm(2 * right)


def test_parts_without_a_token_that_counts_are_not_computed():
    """Six of 24 tokens count, so that the other three of four parts may hold anything."""
    random = np.random.default_rng(0)
    weights = np.zeros((3, 8), np.float32)
    weights.reshape(-1)[random.permutation(24)[:6]] = random.uniform(1, 2, 6)
    x = np.where(weights[..., None] > 0, random.normal(size=(3, 8, 24)), np.nan).astype(np.float32)
    kernel, targets = random.normal(size=(24, 40)).astype(np.float32), random.integers(0, 40, (3, 8))

    def total(x, kernel):
        return cpu.summed_losses(x, kernel, jnp.asarray(targets), jnp.asarray(weights), z_loss=1e-2, chunks=4)[0]

    found, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(kernel))
    exact, _, _, *of = losses_in_float64(np.nan_to_num(x).astype(np.float64), kernel.astype(np.float64), targets, weights, 1e-2)
    assert found == pytest.approx(exact, rel=1e-6)
    for ours, right in zip(gradients, of, strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-5)


@pytest.mark.parametrize("length", [127, 128, 300, 700])
@pytest.mark.parametrize("segments", [False, True], ids=["causal", "segments"])
def test_attention_in_blocks_is_attention(length, segments):
    """Every block's output and all gradients are those of whole rows, up to rounding."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, g = (jax.random.normal(key, (2, length, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[2:4])
    mask = attention_mask(length, jnp.sort(jax.random.randint(keys[4], (2, length), 0, 5)) if segments else None)
    blocked = cpu.forms(None)(lambda q, k, v: attend_causally(q, k, v, mask))
    blocks = cpu.forms(None)(cpu.query_blocks)(length)
    assert (len(blocks) > 1) == (length >= 128) and [i for block in blocks for i in range(length)[block]] == list(range(length))
    found, expected = (jax.tree.leaves((f(q, k, v), jax.vjp(f, q, k, v)[1](g))) for f in (blocked, lambda *x: attend(*x, mask)[0]))
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_no_weight_gradient_is_computed_higher_than_wide(dtype, shapes):
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    g = jax.ShapeDtypeStruct((*shapes[0][:-1], shapes[1][-1]), dtype)
    # With a transpose of the result, which would turn the product around.
    program = jax.jit(lambda x, w, g: gradients(x, w, g, dtype)[1].swapaxes(-1, -2)).lower(x, w, g).compile().as_text()
    found = re.findall(r"= (?:f32|bf16)\[([\d,]+)\]\S* (?:dot\(|fusion\(.*kind=kCustom).*dot_general", program)
    assert found and all(int(size.split(",")[-2]) <= int(size.split(",")[-1]) for size in found)


def test_rotary_tables_are_computed_once():
    config = ModelConfig(d_model=16, n_layers=3, n_heads=2, n_kv_heads=2, d_ff=32, vocab_size=20)
    params, tokens = init_params(config, 0), jnp.zeros((2, 8), jnp.int32)
    program = jax.jit(jax.grad(lambda params: jnp.sum(apply(config, params, tokens)[0] ** 2))).lower(params).compile().as_text()
    assert program.count(" cosine(") == program.count(" sine(") == 1


def lowered(mesh=None, dtype=jnp.bfloat16) -> str:
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in SHAPES["heads"])
    g = jax.ShapeDtypeStruct((2, 3, 24, 8), dtype)

    def function(x, w, g):
        norm = jax.grad(lambda x: jnp.sum(cpu.rms_norm(x, jnp.ones(16), 1e-5)))(x.astype(float))
        return norm, cpu.computed_once(x), gradients(x, w, g, dtype, mesh)

    return jax.jit(cpu.forms(mesh)(function)).lower(x, w, g).as_text()


def test_several_devices_and_other_platforms_get_the_plain_ones():
    assert "LayoutConstraint" in lowered() and "optimization_barrier" in lowered() and cpu.one_cpu(make_mesh(MeshConfig()))
    for mesh in (FOUR_CPUS, one_device("tpu"), one_device("gpu")):
        assert not cpu.one_cpu(mesh)
        assert "LayoutConstraint" not in lowered(mesh) and "optimization_barrier" not in lowered(mesh)
        assert cpu.forms(mesh)(cpu.query_blocks)(1024) == [slice(0, 1024)]
    assert not cpu.allowed(), "nothing is left allowed"


def test_float32_writes_nothing_out():
    assert "LayoutConstraint" not in lowered(dtype=jnp.float32)


def test_members_of_one_program_get_them_too():
    x, w = (jnp.asarray(np.random.default_rng(1).normal(size=(4, *shape)), jnp.bfloat16) for shape in SHAPES["narrower"])
    g = jnp.ones((4, 24, 8), jnp.bfloat16)
    together = jax.jit(jax.vmap(lambda x, w, g: gradients(x, w, g, "bfloat16", make_mesh(MeshConfig()))))
    assert "LayoutConstraint" in together.lower(x, w, g).as_text()
    exact = np.einsum("mri,mro->mio", *(np.asarray(a, np.float64) for a in (x, g)))
    np.testing.assert_allclose(np.asarray(together(x, w, g)[1], np.float64), exact, rtol=2**-7, atol=2**-7)
