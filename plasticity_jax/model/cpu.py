"""Matmuls whose backward pass has a form that compilers for CPUs have fast code for; other platforms keep the plain one.

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

_allowed = contextvars.ContextVar("allowed", default=False)


@contextlib.contextmanager
def forms(mesh: Mesh | AbstractMesh | None, dtype: DTypeLike) -> Iterator[None]:
    """Allows these forms in what is traced within, or in a function that it decorates: for matmuls in a dtype narrower than float32 on one device.

    In float32 they gain nothing. On several devices they would cost much: the compiler does not shard an array whose layout is fixed, but copies it to
    every device.
    """
    token = _allowed.set((mesh is None or mesh.size == 1) and jnp.dtype(dtype).itemsize < 4)
    try:
        yield
    finally:
        _allowed.reset(token)


def allowed() -> bool:
    """Whether the program that is traced may use these forms."""
    return _allowed.get()


def matmul(x: Float[Array, "*batch R I"], w: Float[Array, "*batch I O"], out_dtype: DTypeLike) -> Float[Array, "*batch R O"]:
    """x · w of two arrays of one dtype, accumulated and returned in `out_dtype`."""
    return _matmul(jnp.dtype(out_dtype), x, w) if allowed() else jnp.matmul(x, w, preferred_element_type=out_dtype)


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


def computed_once(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays; on CPUs, not computed again inside of every operation that reads them."""
    if not allowed():
        return arrays
    return jax.lax.platform_dependent(*arrays, cpu=lambda *arrays: jax.lax.optimization_barrier(arrays), default=lambda *arrays: arrays)
