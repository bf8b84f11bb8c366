"""Generation with a key-value cache: read left-padded prompts once, then one token of every row at a time.

The R completions of a prompt share one copy of its keys and values, as the rows of one matmul. Only what they generate is stored per row, so a step
takes a fraction of the memory traffic of a cache per row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.attention import attend, attention_mask
from plasticity_jax.model.transformer import Block, Decoder, Params, graphs, logits_of, rope_of, unstack


class PromptCache(NamedTuple):
    """Rotated keys and values of P prompts, padded on the left to S tokens; K key-value heads of D features. Read-only.

    Attributes:
      k, v: one array [P, K, D, S] and [P, K, S, D] per layer, laid out as the right operands of the matmuls that read them.
      valid_PxS: which slots hold a real token.
    """

    k: tuple[Float[Array, "p k d s"], ...]
    v: tuple[Float[Array, "p k s d"], ...]
    valid_PxS: Bool[Array, "p s"]


class RowCache(NamedTuple):
    """Keys and values of the tokens that B rows have generated, in N slots.

    Attributes:
      k, v: one array [B, K, N, D] per layer.
      position_B: rotary position of the next token, which is the number of real tokens before it.
    """

    k: tuple[Float[Array, "b k n d"], ...]
    v: tuple[Float[Array, "b k n d"], ...]
    position_B: Int[Array, " b"]


def read_prompts(
    config: ModelConfig,
    params: Params,
    tokens_PxS: Int[Array, "p s"],
    valid_PxS: Bool[Array, "p s"],
    *,
    rows_per_prompt: int,
    slots: int,
    compute_dtype: DTypeLike,
) -> tuple[Float[Array, "p v"], PromptCache, RowCache]:
    """Reads left-padded prompts.

    Args:
      valid_PxS: False on the padding, which comes first in a row and is never attended to.
      rows_per_prompt: completions per prompt.
      slots: maximum number of tokens per completion.
    Returns:
      float32 logits of the token after each prompt, the prompts' cache, and empty caches for the rows.
    """
    positions_PxS = jnp.maximum(jnp.cumsum(valid_PxS, axis=1) - 1, 0)
    rope = rope_of(config, positions_PxS)
    mask = attention_mask(tokens_PxS.shape[1], valid_PxS.astype(jnp.int32))
    decoder, blocks = _modules(config, params)
    x_PxSxD = decoder.embed(tokens_PxS, compute_dtype)
    keys, values = [], []
    for block in blocks:
        q, k_PxSxKxD, v_PxSxKxD = block.qkv(x_PxSxD, rope, compute_dtype)
        keys.append(k_PxSxKxD.transpose(0, 2, 3, 1))
        values.append(v_PxSxKxD.transpose(0, 2, 1, 3))
        x_PxSxD, _ = block.add(x_PxSxD, attend(q, k_PxSxKxD, v_PxSxKxD, mask)[0], compute_dtype)
    logits_PxV = logits_of(config, params, decoder.final_norm(x_PxSxD[:, -1]), compute_dtype)
    shape = (tokens_PxS.shape[0] * rows_per_prompt, config.n_kv_heads, slots, config.head_dim)
    empty = tuple(jnp.zeros(shape, compute_dtype) for _ in range(config.n_layers))
    length_P = valid_PxS.sum(axis=1, dtype=jnp.int32)
    return logits_PxV, PromptCache(tuple(keys), tuple(values), valid_PxS), RowCache(empty, empty, jnp.repeat(length_P, rows_per_prompt))


def decode(
    config: ModelConfig,
    params: Params,
    token_B: Int[Array, " b"],
    slot: Int[Array, ""],
    prompt: PromptCache,
    rows: RowCache,
    *,
    compute_dtype: DTypeLike,
) -> tuple[Float[Array, "b v"], RowCache]:
    """Reads one token of every row; rows p·R ... p·R + R − 1 belong to prompt p.

    Args:
      slot: number of tokens that the rows have generated and read before this one; may be traced.
    Returns:
      float32 logits of the next token, and the rows' cache with this token added.
    """
    rope = rope_of(config, rows.position_B[:, None])
    decoder, blocks = _modules(config, params)
    x_Bx1xD = decoder.embed(token_B[:, None], compute_dtype)
    keys, values = [], []
    for index, block in enumerate(blocks):
        q_Bx1xHxD, k_Bx1xKxD, v_Bx1xKxD = block.qkv(x_Bx1xD, rope, compute_dtype)
        keys.append(jax.lax.dynamic_update_slice(rows.k[index], k_Bx1xKxD.swapaxes(1, 2).astype(rows.k[index].dtype), (0, 0, slot, 0)))
        values.append(jax.lax.dynamic_update_slice(rows.v[index], v_Bx1xKxD.swapaxes(1, 2).astype(rows.v[index].dtype), (0, 0, slot, 0)))
        out_Bx1xHxD = _attend(q_Bx1xHxD, prompt.k[index], prompt.v[index], prompt.valid_PxS, keys[-1], values[-1], slot)
        x_Bx1xD, _ = block.add(x_Bx1xD, out_Bx1xHxD, compute_dtype)
    logits_BxV = logits_of(config, params, decoder.final_norm(x_Bx1xD[:, 0]), compute_dtype)
    return logits_BxV, RowCache(tuple(keys), tuple(values), rows.position_B + 1)


def _modules(config: ModelConfig, params: Params) -> tuple[Decoder, list[Block]]:
    """The decoder and each of its blocks, bound to their parameters."""
    decoder_graph, block_graph = graphs(config)
    return nnx.merge(decoder_graph, params), [nnx.merge(block_graph, layer) for layer in unstack(config, params["blocks"])]


def _attend(
    q_Bx1xHxD: Float[Array, "b 1 h d"],
    k_PxKxDxS: Float[Array, "p k d s"],
    v_PxKxSxD: Float[Array, "p k s d"],
    valid_PxS: Bool[Array, "p s"],
    k_BxKxNxD: Float[Array, "b k n d"],
    v_BxKxNxD: Float[Array, "b k n d"],
    slot: Int[Array, ""],
) -> Float[Array, "b 1 h d"]:
    """Attention of one query per row over its prompt and its own slots up to `slot`; one softmax over both, in float32."""
    n_prompts, n_kv_heads, head_dim, length = k_PxKxDxS.shape
    n_rows, _, slots, _ = k_BxKxNxD.shape
    per_prompt, group = n_rows // n_prompts, q_Bx1xHxD.shape[2] // n_kv_heads
    lowest = jnp.finfo(jnp.float32).min
    q_BxKxGxD = q_Bx1xHxD.reshape(n_rows, n_kv_heads, group, head_dim)
    q_PxKxCxD = _by_prompt(q_BxKxGxD, n_prompts)  # C = R·G: all queries of a prompt that read the same key-value head
    to_prompt_PxKxCxS = jnp.matmul(q_PxKxCxD, k_PxKxDxS, preferred_element_type=jnp.float32) * head_dim**-0.5
    to_prompt_PxKxCxS = jnp.where(valid_PxS[:, None, None], to_prompt_PxKxCxS, lowest)
    to_own_BxKxGxN = jnp.einsum("bkgd,bknd->bkgn", q_BxKxGxD, k_BxKxNxD, preferred_element_type=jnp.float32) * head_dim**-0.5
    to_own_BxKxGxN = jnp.where(jnp.arange(slots) <= slot, to_own_BxKxGxN, lowest)
    scores = jnp.concatenate([to_prompt_PxKxCxS, _by_prompt(to_own_BxKxGxN, n_prompts)], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_PxKxSxD.dtype)
    from_prompt_BxKxGxD = _by_row(probs[..., :length] @ v_PxKxSxD, per_prompt)
    from_own_BxKxGxD = jnp.einsum("bkgn,bknd->bkgd", _by_row(probs[..., length:], per_prompt), v_BxKxNxD)
    return (from_prompt_BxKxGxD + from_own_BxKxGxD).reshape(q_Bx1xHxD.shape)


def _by_prompt(x_BxKxGxE: Float[Array, "b k g e"], n_prompts: int) -> Float[Array, "p k c e"]:
    """Lays the rows of a prompt side by side under each key-value head."""
    n_rows, n_kv_heads, group, features = x_BxKxGxE.shape
    x_PxRxKxGxE = x_BxKxGxE.reshape(n_prompts, -1, n_kv_heads, group, features)
    return x_PxRxKxGxE.swapaxes(1, 2).reshape(n_prompts, n_kv_heads, -1, features)


def _by_row(x_PxKxCxE: Float[Array, "p k c e"], per_prompt: int) -> Float[Array, "b k g e"]:
    """The inverse of `_by_prompt`."""
    n_prompts, n_kv_heads, columns, features = x_PxKxCxE.shape
    x_PxKxRxGxE = x_PxKxCxE.reshape(n_prompts, n_kv_heads, per_prompt, columns // per_prompt, features)
    return x_PxKxRxGxE.swapaxes(1, 2).reshape(n_prompts * per_prompt, n_kv_heads, -1, features)
