"""Matmuls, norms and softmax whose backward pass has a form that compilers for CPUs have fast code for; other platforms keep the plain one.

In bfloat16, XLA runs a product on a CPU's matrix units only if both operands are bfloat16 and the left one contracts its last axis in memory. Any other
is converted to float32, which takes 2 to 7 times as long. So transposed left operands are written out, and float32 gradients are rounded before they
are multiplied, as the operands of the forward pass are.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_one_device = contextvars.ContextVar("one_device", default=False)


@contextlib.contextmanager
def forms(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Allows these forms in what is traced within, or in a function that it decorates, for programs of one device.

    On several devices they would cost much: the compiler does not shard an array whose layout is fixed, but copies it to every device.
    """
    token = _one_device.set(mesh is None or mesh.size == 1)
    try:
        yield
    finally:
        _one_device.reset(token)


def allowed() -> bool:
    """Whether the program that is traced may use these forms."""
    return _one_device.get()


def narrow_products(dtype: DTypeLike) -> bool:
    """Whether matmuls of this dtype take the forms of narrow ones. In float32 they gain nothing."""
    return allowed() and jnp.dtype(dtype).itemsize < 4


def compiler_options(mesh: Mesh, dtype: DTypeLike) -> dict[str, int] | None:
    """Options of `jax.jit` for a training step in this dtype on the mesh's devices."""
    # By default vectors have 256 bits. Full ones gain 3 to 6 percent in bfloat16, with its many conversions, and nothing in float32.
    narrow = jnp.dtype(dtype).itemsize < 4
    return {"xla_cpu_prefer_vector_width": 512} if narrow and mesh.devices.flat[0].platform == "cpu" else None


def matmul(x: Float[Array, "*batch R I"], w: Float[Array, "*batch I O"], out_dtype: DTypeLike) -> Float[Array, "*batch R O"]:
    """x · w of two arrays of one dtype, accumulated and returned in `out_dtype`."""
    return _matmul(jnp.dtype(out_dtype), x, w) if narrow_products(x.dtype) else jnp.matmul(x, w, preferred_element_type=out_dtype)


def _product(out_dtype, x, w):
    # A pending transpose would be folded into a batched product.
    return jnp.matmul(x, w if x.ndim == 2 else _written(w), preferred_element_type=out_dtype)


_matmul = jax.custom_vjp(_product, nondiff_argnums=(0,))


def _forward(out_dtype, x, w):
    return _product(out_dtype, x, w), (x, w)


def _backward(out_dtype, operands, g):
    def plain(x, w, g):
        return jax.vjp(functools.partial(jnp.matmul, preferred_element_type=out_dtype), x, w)[1](g)

    return jax.lax.platform_dependent(*operands, g, cpu=_backward_on_cpu, default=plain)


def _backward_on_cpu(x, w, g):
    g, wide = g.astype(x.dtype), jnp.promote_types(x.dtype, jnp.float32)
    if x.ndim == 2:
        of_x = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())))
    else:
        of_x = jnp.matmul(g, _written(w.swapaxes(-1, -2)), preferred_element_type=wide).astype(x.dtype)
    of_w = jnp.matmul(_written(x.swapaxes(-1, -2)), g, preferred_element_type=wide)
    return of_x, of_w.astype(w.dtype)


def _written(x: Array) -> Array:
    """`x` in the order of its axes; on CPUs, in memory too."""
    return jax.lax.platform_dependent(x, cpu=lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), default=lambda x: x)


_matmul.defvjp(_forward, _backward)


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """x / rms(x) · scale, computed in at least float32, in the dtype of x."""
    return (_rms_norm if allowed() else _normalized)(x, scale, eps)


def _normalized(x, scale, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _inverse_rms(wide, eps) * scale).astype(x.dtype)


def _inverse_rms(wide, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


_rms_norm = jax.custom_vjp(_normalized, nondiff_argnums=(2,))


def _norm_backward(eps, operands, g):
    def plain(x, scale, g):
        return jax.vjp(functools.partial(_normalized, eps=eps), x, scale)[1](g)

    return jax.lax.platform_dependent(*operands, g, cpu=functools.partial(_norm_backward_on_cpu, eps), default=plain)


def _norm_backward_on_cpu(eps, x, scale, g):
    # Both sums are products with one array. As sums, the compiler would write out what it broadcasts for them.
    wide, g = (array.astype(jnp.promote_types(x.dtype, jnp.float32)) for array in (x, g))
    inverse_rms = _inverse_rms(wide, eps)
    both = jax.lax.optimization_barrier(wide * g)
    along = jnp.matmul(both, scale)[..., None] * inverse_rms**3 / x.shape[-1]
    of_scale = jnp.matmul(inverse_rms.reshape(1, -1), both.reshape(-1, x.shape[-1]))[0]
    return (g * scale * inverse_rms - wide * along).astype(x.dtype), of_scale.astype(scale.dtype)


_rms_norm.defvjp(lambda x, scale, eps: (_normalized(x, scale, eps), (x, scale)), _norm_backward)


def softmax(x: Float[Array, "*batch S"]) -> Float[Array, "*batch S"]:
    """The softmax of the last axis."""
    return _softmax(x) if allowed() else jax.nn.softmax(x, axis=-1)


_softmax = jax.custom_vjp(functools.partial(jax.nn.softmax, axis=-1))


def _softmax_forward(x):
    probs = jax.nn.softmax(x, axis=-1)
    return probs, probs


def _softmax_backward(probs, g):
    # From the probabilities alone. Autodiff keeps the exponentials, and on CPUs the compiler writes out what divides them, as large as they are. The
    # formula is autodiff's, so that other platforms need no other.
    return (probs * (g - jnp.sum(probs * g, axis=-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def computed_once(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays; on CPUs, not computed again inside of every operation that reads them."""
    if not allowed():
        return arrays
    return jax.lax.platform_dependent(*arrays, cpu=lambda *arrays: jax.lax.optimization_barrier(arrays), default=lambda *arrays: arrays)
