"""Generation with a key-value cache: prompts of several lengths, left-padded, then one token of every row at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.attention import attend, attention_mask, rope_tables
from plasticity_jax.model.transformer import Params, graphs, unstack


class Cache(NamedTuple):
    """Rotated keys and values of every layer, K key-value heads of Dh features, S slots.

    Because prompts are left-padded, all rows write the same slot at the same time.

    Attributes:
      k_LxBxSxKxD, v_LxBxSxKxD: keys and values.
      valid_BxS: slots that hold a real token.
      length_B: number of real tokens so far, which is the rotary position of the next.
    """

    k_LxBxSxKxD: Float[Array, "L B S K Dh"]
    v_LxBxSxKxD: Float[Array, "L B S K Dh"]
    valid_BxS: Bool[Array, "B S"]
    length_B: Int[Array, "B"]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """An empty cache for `batch` rows of `length` slots (padded prompt and new tokens together)."""
    shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), bool), jnp.zeros(batch, jnp.int32))


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Every row `times` times in a row (row b becomes rows b·times ... b·times + times − 1), to draw several samples of one prompt."""
    k, v = (jnp.repeat(x, times, axis=1) for x in (cache.k_LxBxSxKxD, cache.v_LxBxSxKxD))
    return Cache(k, v, jnp.repeat(cache.valid_BxS, times, axis=0), jnp.repeat(cache.length_B, times, axis=0))


def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BxP: Int[Array, "B P"],
    valid_BxP: Bool[Array, "B P"],
    cache: Cache,
    *,
    compute_dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads left-padded prompts into slots 0 ... P−1 of an empty cache.

    Args:
      valid_BxP: False on the padding, which comes first in a row and is never attended to.
    Returns:
      float32 logits of the token after the prompt, and the filled cache.
    """
    prompt_length = tokens_BxP.shape[1]
    positions_BxP = jnp.maximum(jnp.cumsum(valid_BxP, axis=1) - 1, 0)
    rope = rope_tables(positions_BxP, config.head_dim, config.rope_theta)
    mask = attention_mask(prompt_length, valid_BxP.astype(jnp.int32))
    decoder_graph, block_graph = graphs(config)
    decoder = nnx.merge(decoder_graph, params)
    x_BxPxD = decoder.embed(tokens_BxP, compute_dtype)
    keys, values = [], []
    for layer in unstack(config, params["blocks"]):
        block = nnx.merge(block_graph, layer)
        q, k, v = block.attn.qkv(block.attn_norm(x_BxPxD), rope, compute_dtype)
        keys.append(k)
        values.append(v)
        x_BxPxD = x_BxPxD + block.attn.merge(attend(q, k, v, mask)[0], compute_dtype)
        x_BxPxD = x_BxPxD + block.mlp(block.mlp_norm(x_BxPxD), compute_dtype)[0]
    logits_BxV = decoder.head(decoder.final_norm(x_BxPxD[:, -1]), compute_dtype, out_dtype=jnp.float32)
    return logits_BxV, Cache(
        cache.k_LxBxSxKxD.at[:, :, :prompt_length].set(jnp.stack(keys).astype(cache.k_LxBxSxKxD.dtype)),
        cache.v_LxBxSxKxD.at[:, :, :prompt_length].set(jnp.stack(values).astype(cache.v_LxBxSxKxD.dtype)),
        cache.valid_BxS.at[:, :prompt_length].set(valid_BxP),
        valid_BxP.sum(axis=1, dtype=jnp.int32),
    )


def decode_step(
    config: ModelConfig,
    params: Params,
    token_B: Int[Array, "B"],
    slot: Int[Array, ""] | int,
    cache: Cache,
    *,
    compute_dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one token of every row.

    Args:
      slot: where it is written, the same for all rows: P for the first token after prompts padded to P, then P + 1, ... May be traced.
    Returns:
      float32 logits of the token after it, and the cache that holds it.
    """
    rope = rope_tables(cache.length_B[:, None], config.head_dim, config.rope_theta)
    valid_BxS = cache.valid_BxS.at[:, slot].set(True)
    decoder_graph, block_graph = graphs(config)
    decoder = nnx.merge(decoder_graph, params)
    x_Bx1xD = decoder.embed(token_B[:, None], compute_dtype)
    keys, values = cache.k_LxBxSxKxD, cache.v_LxBxSxKxD
    for index, layer in enumerate(unstack(config, params["blocks"])):
        block = nnx.merge(block_graph, layer)
        q, k, v = block.attn.qkv(block.attn_norm(x_Bx1xD), rope, compute_dtype)
        keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), (index, 0, slot, 0, 0))
        values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), (index, 0, slot, 0, 0))
        out, _ = attend(q, keys[index], values[index], valid_BxS[:, None])
        x_Bx1xD = x_Bx1xD + block.attn.merge(out, compute_dtype)
        x_Bx1xD = x_Bx1xD + block.mlp(block.mlp_norm(x_Bx1xD), compute_dtype)[0]
    logits_BxV = decoder.head(decoder.final_norm(x_Bx1xD[:, 0]), compute_dtype, out_dtype=jnp.float32)
    return logits_BxV, Cache(keys, values, valid_BxS, cache.length_B + 1)
