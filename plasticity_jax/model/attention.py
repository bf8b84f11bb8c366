"""Grouped-query attention with rotary positions."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig, RopeScaling
from plasticity_jax.model import cpu
from plasticity_jax.model.layers import Initializer, Linear, RMSNorm, at_least_float32

# Cosines and sines; the batch axis is 1 if all rows share their positions.
Rope = tuple[Float[Array, "r T half"], Float[Array, "r T half"]]


def rope_tables(positions_BxT: Int[Array, "b T"], head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rope:
    """Cosines and sines of position · frequency in the default float dtype. Frequency i < head_dim/2 is theta^(-2i/head_dim), changed by `scaling`.

    Source: Su et al. 2021 (arXiv 2104.09864), in the half-split layout of Llama.
    """
    frequency_E = theta ** (-jnp.arange(0, head_dim, 2, dtype=float) / head_dim)
    if scaling is not None:
        turns_E = scaling.original_length * frequency_E / (2 * jnp.pi)
        kept_E = jnp.clip((turns_E - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
        frequency_E = frequency_E * (kept_E + (1.0 - kept_E) / scaling.factor)
    angle_BxTxE = positions_BxT[..., None].astype(frequency_E.dtype) * frequency_E
    return cpu.computed_once(jnp.cos(angle_BxTxE)), cpu.computed_once(jnp.sin(angle_BxTxE))


def apply_rope(x_BxTxHxD: Float[Array, "B T H D"], rope: Rope) -> Float[Array, "B T H D"]:
    """Rotates the pairs (i, i + head_dim/2) of every head, in at least float32; returns the input's dtype."""
    cos, sin = (table[..., None, :] for table in rope)
    first, second = jnp.split(x_BxTxHxD.astype(at_least_float32(x_BxTxHxD.dtype)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxHxD.dtype)


def attention_mask(length: int, segment_ids_BxT: Int[Array, "B T"] | None) -> Bool[Array, "m T T"]:
    """True where query i may attend to key j: j <= i, and both in the same segment if segments are given. Without segments the first axis is 1."""
    causal_1xTxT = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BxT is None:
        return causal_1xTxT
    return causal_1xTxT & (segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :])


def attend(
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxSxKxD: Float[Array, "B S K D"],
    v_BxSxKxD: Float[Array, "B S K D"],
    mask_BxTxS: Bool[Array, "m T S"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T S"]]:
    """Softmax attention with scale 1/sqrt(D); query head h reads key-value head h // (H/K). Scores and softmax in at least float32.

    Returns the output in q's dtype and the probabilities in the softmax's. A query with no visible key attends to all keys uniformly.
    """
    batch, queries, n_heads, head_dim = q_BxTxHxD.shape
    keys, n_kv_heads = k_BxSxKxD.shape[1:3]
    group = n_heads // n_kv_heads
    # The heads of a group are rows of one matmul, so keys and values are never repeated.
    q_BxKxGTxD = q_BxTxHxD.reshape(batch, queries, n_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q_BxKxGTxD = q_BxKxGTxD.reshape(batch, n_kv_heads, group * queries, head_dim)
    wide = at_least_float32(q_BxTxHxD.dtype)
    scores = cpu.matmul(q_BxKxGTxD, k_BxSxKxD.transpose(0, 2, 3, 1), wide)
    scores_BxKxGxTxS = scores.reshape(batch, n_kv_heads, group, queries, keys) * head_dim**-0.5
    scores_BxKxGxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxKxGxTxS, jnp.finfo(scores.dtype).min)
    probs_BxKxGxTxS = cpu.softmax(scores_BxKxGxTxS)
    rows_BxKxGTxS = probs_BxKxGxTxS.reshape(batch, n_kv_heads, group * queries, keys).astype(v_BxSxKxD.dtype)
    out = cpu.matmul(rows_BxKxGTxS, v_BxSxKxD.transpose(0, 2, 1, 3), v_BxSxKxD.dtype)
    out_BxTxKxGxD = out.reshape(batch, n_kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out_BxTxKxGxD.reshape(q_BxTxHxD.shape), probs_BxKxGxTxS.reshape(batch, n_heads, queries, keys)


def attend_causally(
    q_BxTxHxD: Float[Array, "B T H D"], k_BxTxKxD: Float[Array, "B T K D"], v_BxTxKxD: Float[Array, "B T K D"], mask_BxTxT: Bool[Array, "m T T"]
) -> Float[Array, "B T H D"]:
    """The output of `attend` under a causal mask."""
    blocks = [
        attend(q_BxTxHxD[:, block], k_BxTxKxD[:, : block.stop], v_BxTxKxD[:, : block.stop], mask_BxTxT[:, block, : block.stop])[0]
        for block in cpu.query_blocks(q_BxTxHxD.shape[1])
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


class Attention(nnx.Module):
    """The four projections of grouped-query attention, and the norms of queries and keys. `attend`, between them, has no parameters."""

    def __init__(self, config: ModelConfig, init: Initializer, out_init: Initializer, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        query_width, key_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q = Linear(config.d_model, query_width, init, rngs)
        self.k = Linear(config.d_model, key_width, init, rngs)
        self.v = Linear(config.d_model, key_width, init, rngs)
        self.o = Linear(query_width, config.d_model, out_init, rngs)
        self.q_norm = RMSNorm(query_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(key_width, config.norm_eps) if config.qk_norm else None

    def qkv(
        self, x_BxTxD: Float[Array, "B T D"], rope: Rope, dtype: DTypeLike
    ) -> tuple[Float[Array, "B T H Dh"], Float[Array, "B T K Dh"], Float[Array, "B T K Dh"]]:
        """Queries and keys, normalized with `qk_norm` and rotated, and values."""
        q, k, v = (linear(x_BxTxD, dtype) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (q, k, v))
        return apply_rope(q, rope), apply_rope(k, rope), v

    def merge(self, out_BxTxHxD: Float[Array, "B T H Dh"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """The output projection over all heads."""
        return self.o(out_BxTxHxD.reshape(*out_BxTxHxD.shape[:-2], -1), dtype)
