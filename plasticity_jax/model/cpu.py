"""Matmuls, norms, softmax and causal attention in forms for which compilers for CPUs have fast code; other platforms keep the plain ones.

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
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_one_cpu = contextvars.ContextVar("one_cpu", default=False)


def one_cpu(mesh: Mesh | None) -> bool:
    """Whether a program takes these forms: one of a single CPU device. On several, the compiler copies arrays whose layout is fixed to every device.

    Args:
      mesh: the program's devices; None for one of jax's default platform.
    """
    return jax.default_backend() == "cpu" if mesh is None else mesh.size == 1 and _platform(mesh) == "cpu"


@contextlib.contextmanager
def forms(mesh: Mesh | None) -> Iterator[None]:
    """Uses these forms in what is traced within, or in a function that it decorates, if it is a program of `one_cpu`."""
    token = _one_cpu.set(one_cpu(mesh))
    try:
        yield
    finally:
        _one_cpu.reset(token)


def allowed() -> bool:
    """Whether the program that is traced uses these forms."""
    return _one_cpu.get()


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh, dtype: DTypeLike) -> dict[str, int] | None:
    """Options of `jax.jit` for a training step in this dtype on the mesh's devices."""
    # By default vectors have 256 bits. Full ones gain 3 to 6 percent in bfloat16, with its many conversions, and nothing in float32.
    return {"xla_cpu_prefer_vector_width": 512} if _narrow(dtype) and _platform(mesh) == "cpu" else None


def _narrow(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).itemsize < 4


# ---------------------------------------------------------------------------------------------------------------------------- matmuls


def matmul(x: Float[Array, "*batch R I"], w: Float[Array, "*batch I O"], out_dtype: DTypeLike) -> Float[Array, "*batch R O"]:
    """x · w of two arrays of one dtype, accumulated and returned in `out_dtype`."""
    return _matmul(jnp.dtype(out_dtype), x, w) if allowed() else jnp.matmul(x, w, preferred_element_type=out_dtype)


def _product(out_dtype, x, w):
    # A pending transpose would be folded into a batched product.
    return jnp.matmul(x, _written(w) if x.ndim > 2 else w, preferred_element_type=out_dtype)


_matmul = jax.custom_vjp(_product, nondiff_argnums=(0,))


def _forward(out_dtype, x, w):
    return _product(out_dtype, x, w), (x, w)


def _backward(out_dtype, operands, g):
    x, w = operands
    g, wide = g.astype(x.dtype), jnp.promote_types(x.dtype, jnp.float32)
    of_x = _by_transposed(g, w) if x.ndim == 2 else jnp.matmul(g, _written(w.swapaxes(-1, -2)), preferred_element_type=wide).astype(x.dtype)
    return of_x, _transposed_product(x, g, wide).astype(w.dtype)


def _by_transposed(g, w):
    """g · wᵀ of two matrices, in one operation, which in bfloat16 is faster than of a transpose."""
    return jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())))


def _transposed_product(x, g, wide):
    """xᵀ · g, in at least float32. A result that is higher than wide takes up to six times as long, so its transpose is computed."""
    if x.shape[-1] > g.shape[-1]:
        return _transposed_product(g, x, wide).swapaxes(-1, -2)
    # The barrier keeps a transpose that follows from turning the product around.
    return jax.lax.optimization_barrier(jnp.matmul(_written(x.swapaxes(-1, -2)), g, preferred_element_type=wide))


def _written(x: Array) -> Array:
    """`x` in the order of its axes; if narrow, in memory too."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if _narrow(x.dtype) else x


_matmul.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------------------------- norms and softmax


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
    # Both sums are products with one array. As sums, the compiler would write out what it broadcasts for them.
    x, scale = operands
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
    # From the probabilities alone. Autodiff keeps the exponentials, and the compiler writes out what divides them, as large as they are.
    return (probs * (g - jnp.sum(probs * g, axis=-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


# -------------------------------------------------------------------------------------------------------------------------------- loss


def logit_bytes(vocab_size: int) -> int:
    """Bytes of float32 logits that a part of the loss may have: those of 256 tokens, of which the products have a size that is still fast."""
    return 4 * vocab_size * 256


def summed_losses(
    x_BxTxD: Float[Array, "B T D"],
    kernel_DxV: Float[Array, "D V"],
    targets_BxT: Int[Array, "B T"],
    weights_BxT: Float[Array, "B T"],
    *,
    z_loss: float,
    chunks: int,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """What is minimized, in nats, and the two sums that it consists of, which have no gradient: the cross-entropies and the z-loss.

    The gradient is computed along with the loss, one part of the tokens after another: no logits leave the caches, and none are computed twice. Tokens of
    weight 0 come last, and parts that hold nothing else are left out.

    Args:
      x_BxTxD, kernel_DxV: of one dtype, normalized states and the output matrix.
      weights_BxT: of the targets; they have no gradient.
      z_loss: weight of the squared log of the softmax's normalizer.
      chunks: parts, a divisor of B·T.
    """
    total, *sums = _summed_losses(z_loss, chunks, x_BxTxD, kernel_DxV, targets_BxT, jax.lax.stop_gradient(weights_BxT))
    return total, *jax.lax.stop_gradient(sums)


def _losses_and_gradients(z_loss, chunks, x_BxTxD, kernel_DxV, targets_BxT, weights_BxT):
    wide, width = jnp.promote_types(x_BxTxD.dtype, jnp.float32), x_BxTxD.shape[-1]

    def add_part(of_kernel_DxV, part):
        x_NxD, targets_N, weights_N = part
        logits_NxV = jnp.matmul(x_NxD, kernel_DxV, preferred_element_type=wide)
        largest_N = jnp.max(logits_NxV, axis=-1)
        exponentials_NxV = jnp.exp(logits_NxV - largest_N[:, None])
        total_N = jnp.sum(exponentials_NxV, axis=-1)
        log_sum_N = largest_N + jnp.log(total_N)
        chosen_N = jnp.take_along_axis(logits_NxV, targets_N[:, None], axis=-1, mode="clip")[:, 0]
        of_log_sum_N = weights_N * (1 + 2 * z_loss * log_sum_N)
        is_target_NxV = jax.lax.broadcasted_iota(jnp.int32, logits_NxV.shape, 1) == targets_N[:, None]
        of_logits_NxV = exponentials_NxV * (of_log_sum_N / total_N)[:, None] - jnp.where(is_target_NxV, weights_N[:, None], 0.0)
        of_logits_NxV = jax.lax.optimization_barrier(of_logits_NxV.astype(x_NxD.dtype))  # both products read it
        of_kernel_DxV += _transposed_product(x_NxD, of_logits_NxV, wide)
        sums = jnp.sum(weights_N * (log_sum_N - chosen_N)), z_loss * jnp.sum(weights_N * jnp.square(log_sum_N))
        return of_kernel_DxV, (jnp.stack(sums), _by_transposed(of_logits_NxV, kernel_DxV))

    def add_unless_empty(of_kernel_DxV, part):
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(add_part, of_kernel_DxV, part)[1])
        return jax.lax.cond(jnp.any(part[2]), add_part, lambda of_kernel_DxV, _: (of_kernel_DxV, nothing), of_kernel_DxV, part)

    # Of a fine-tuning batch most tokens are prompts.
    counts_N = weights_BxT.reshape(-1) != 0
    place_N = jnp.where(counts_N, jnp.cumsum(counts_N), jnp.sum(counts_N) + jnp.cumsum(~counts_N)) - 1
    order_N = jnp.zeros_like(place_N).at[place_N].set(jnp.arange(place_N.size), unique_indices=True)
    parts = [array.reshape(-1, *array.shape[2:])[order_N] for array in (x_BxTxD, targets_BxT, weights_BxT)]
    parts = tuple(array.reshape(chunks, -1, *array.shape[1:]) for array in parts)
    of_kernel_DxV, (sums, of_x) = jax.lax.scan(add_unless_empty, jnp.zeros(kernel_DxV.shape, wide), parts)
    losses, of_z_loss = jnp.sum(sums, axis=0)
    of_x_BxTxD = of_x.reshape(-1, width)[place_N].reshape(x_BxTxD.shape)
    return (losses + of_z_loss, losses, of_z_loss), (of_x_BxTxD, of_kernel_DxV.astype(kernel_DxV.dtype))


_summed_losses = jax.custom_vjp(lambda *arguments: _losses_and_gradients(*arguments)[0], nondiff_argnums=(0, 1))


def _summed_losses_backward(z_loss, chunks, gradients, g):
    return *(of_one * g[0].astype(of_one.dtype) for of_one in gradients), None, None


_summed_losses.defvjp(_losses_and_gradients, _summed_losses_backward)


# --------------------------------------------------------------------------------------------------------------------------- attention


def query_blocks(length: int) -> list[slice]:
    """Blocks of a sequence's queries. Causal attention takes each with the keys up to its end alone: of four, three eighths of all scores are left out.

    Short blocks, or more of them, cost more in the products than they save.
    """
    n = min(4, max(2, length // 128)) if allowed() and length >= 128 else 1
    ends = [length * (i + 1) // n for i in range(n)]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def computed_once(array: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """The same array, not computed again inside of every operation that reads it."""
    # A product is never fused with what reads it. A barrier is taken out before that on jax 0.10.
    return jnp.matmul(array, jnp.eye(array.shape[-1], dtype=array.dtype)) if allowed() else array
