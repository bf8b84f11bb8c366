"""Layers that act on each token separately: linear maps, the embedding, RMSNorm, the SwiGLU MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.model import cpu

Initializer = nnx.Initializer  # (key, shape, dtype) → array


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of norms, softmax and sums: float32 for narrower dtypes. float64 stays, so that the program can run as its own reference."""
    return jnp.promote_types(dtype, jnp.float32)


def project(
    x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"], dtype: DTypeLike, out_dtype: DTypeLike | None = None
) -> Float[Array, "*batch d_out"]:
    """The matmul x · kernel in `dtype`; with `out_dtype`, accumulated and returned in that dtype."""
    # Two-dimensional operands: contracting batch and time at once, as the weight gradient would, is slow on CPUs.
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    out = cpu.matmul(rows, kernel.astype(dtype), out_dtype or dtype)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Module):
    """A linear map without bias."""

    def __init__(self, d_in: int, d_out: int, init: Initializer, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))

    def __call__(self, x: Float[Array, "*batch d_in"], dtype: DTypeLike) -> Float[Array, "*batch d_out"]:
        return project(x, self.kernel[...], dtype)


class Embedding(nnx.Module):
    """A table of token vectors."""

    def __init__(self, vocab_size: int, d_model: int, init: Initializer, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, d_model), jnp.float32))

    def __call__(self, tokens_BxT: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding[...], tokens_BxT, axis=0, mode="clip").astype(dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in at least float32, returned in the input's dtype."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return cpu.rms_norm(x, self.scale[...], self.eps)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, init: Initializer, out_init: Initializer, rngs: nnx.Rngs):
        self.gate = Linear(config.d_model, config.d_ff, init, rngs)
        self.up = Linear(config.d_model, config.d_ff, init, rngs)
        self.down = Linear(config.d_ff, config.d_model, out_init, rngs)

    def __call__(self, x_BxTxD: Float[Array, "B T D"], dtype: DTypeLike) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
        """Returns the output and the input of the down projection."""
        act_BxTxF = jax.nn.silu(self.gate(x_BxTxD, dtype)) * self.up(x_BxTxD, dtype)
        return self.down(act_BxTxF, dtype), act_BxTxF
