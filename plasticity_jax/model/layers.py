"""The parts of a block that know nothing of time: linear maps, the embedding, RMSNorm, the SwiGLU MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from plasticity_jax.config import ModelConfig


class Linear(nnx.Module):
    """A linear map without bias, initialised from N(0, std)."""

    def __init__(self, d_in: int, d_out: int, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32))

    def __call__(self, x: Float[Array, "*batch d_in"], dtype: DTypeLike, out_dtype: DTypeLike | None = None) -> Float[Array, "*batch d_out"]:
        """The product in `dtype`; with `out_dtype`, accumulated and returned in that type."""
        kernel = self.kernel[...].astype(dtype)
        # Two-dimensional operands: contracting batch and time at once, as the weight gradient would, is slow on CPUs.
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        product = jnp.matmul(rows, kernel, preferred_element_type=out_dtype or dtype)
        return product.reshape(*x.shape[:-1], kernel.shape[-1])


class Embedding(nnx.Module):
    """A table of token vectors, initialised from N(0, std)."""

    def __init__(self, vocab_size: int, d_model: int, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, d_model), jnp.float32))

    def __call__(self, tokens_BxT: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding[...], tokens_BxT, axis=0, mode="clip").astype(dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in float32 whatever the input's type, returned in it."""

    def __init__(self, d_model: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((d_model,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale[...]).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, std: float, out_std: float, rngs: nnx.Rngs):
        self.gate = Linear(config.d_model, config.d_ff, std, rngs)
        self.up = Linear(config.d_model, config.d_ff, std, rngs)
        self.down = Linear(config.d_ff, config.d_model, out_std, rngs)

    def __call__(self, x_BxTxD: Float[Array, "B T D"], dtype: DTypeLike) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
        """Returns the output and the activation that enters the down projection."""
        act_BxTxF = jax.nn.silu(self.gate(x_BxTxD, dtype)) * self.up(x_BxTxD, dtype)
        return self.down(act_BxTxF, dtype), act_BxTxF
