"""Generation with a key-value cache: read left-padded prompts once, then one token of every row at a time.

The R completions of a prompt share one copy of its keys and values, as the rows of one matmul. Only what they generate is stored per row, so a step
takes a fraction of the memory traffic of a cache per row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.attention import Rope, attend, attention_mask
from plasticity_jax.model.layers import at_least_float32, project
from plasticity_jax.model.transformer import Block, Decoder, Params, graphs, output_kernel, rope_of, unstack
from plasticity_jax.parallel.sharding import ROWS, constrain, gather


class Layout(NamedTuple):
    """Where decoding takes place. It changes speed, memory and rounding only.

    Attributes:
      mesh: where rows and parameters are sharded; None for one device.
      sharded: the parameters lie as in training, and the matrices of one layer at a time are gathered for every token. Otherwise they are whole on every
        device but for the tensor axis.
      scan_layers: run the layers as a loop. The caches of all layers are one array then, and otherwise one array per layer.
    """

    mesh: Mesh | None = None
    sharded: bool = False
    scan_layers: bool = False


class PromptCache(NamedTuple):
    """Rotated keys and values of P prompts, padded on the left to S tokens; K key-value heads of D features. Read-only.

    Attributes:
      k, v: [P, K, D, S] and [P, K, S, D] per layer, laid out as the right operands of the matmuls that read them: a tuple, or stacked along axis 0.
      valid_PxS: which slots hold a real token.
    """

    k: tuple[Float[Array, "p k d s"], ...] | Float[Array, "l p k d s"]
    v: tuple[Float[Array, "p k s d"], ...] | Float[Array, "l p k s d"]
    valid_PxS: Bool[Array, "p s"]


class RowCache(NamedTuple):
    """Keys and values of the tokens that B rows have generated, in N slots.

    Attributes:
      k, v: [B, K, N, D] per layer: a tuple, or stacked along axis 0.
      position_B: rotary position of the next token, which is the number of real tokens before it.
    """

    k: tuple[Float[Array, "b k n d"], ...] | Float[Array, "l b k n d"]
    v: tuple[Float[Array, "b k n d"], ...] | Float[Array, "l b k n d"]
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
    layout: Layout = Layout(),
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
    model = _Model(config, params, compute_dtype, layout)

    def run(x_PxSxD, layer: Params):
        q, k_PxSxKxD, v_PxSxKxD, add = model.attention_inputs(layer, x_PxSxD, rope)
        return add(attend(q, k_PxSxKxD, v_PxSxKxD, mask)[0]), (k_PxSxKxD.transpose(0, 2, 3, 1), v_PxSxKxD.transpose(0, 2, 1, 3))

    x_PxSxD = model.embed(tokens_PxS)
    shape = (tokens_PxS.shape[0] * rows_per_prompt, config.n_kv_heads, slots, config.head_dim)
    if layout.scan_layers:
        x_PxSxD, (keys, values) = jax.lax.scan(run, x_PxSxD, params["blocks"])
        empty = constrain(layout.mesh, jnp.zeros((config.n_layers, *shape), compute_dtype), None, ROWS)
    else:
        found = []
        for layer in unstack(config, params["blocks"]):
            x_PxSxD, of_layer = run(x_PxSxD, layer)
            found.append(of_layer)
        keys, values = (tuple(of_layers) for of_layers in zip(*found, strict=True))
        empty = tuple(constrain(layout.mesh, jnp.zeros(shape, compute_dtype), ROWS) for _ in range(config.n_layers))
    length_P = valid_PxS.sum(axis=1, dtype=jnp.int32)
    rows = RowCache(empty, empty, jnp.repeat(length_P, rows_per_prompt))
    return model.logits(x_PxSxD[:, -1]), PromptCache(keys, values, valid_PxS), rows


def decode(
    config: ModelConfig,
    params: Params,
    token_B: Int[Array, " b"],
    slot: Int[Array, ""],
    prompt: PromptCache,
    rows: RowCache,
    *,
    compute_dtype: DTypeLike,
    layout: Layout = Layout(),
) -> tuple[Float[Array, "b v"], RowCache]:
    """Reads one token of every row; rows p·R ... p·R + R − 1 belong to prompt p.

    Args:
      slot: number of tokens that the rows have generated and read before this one; may be traced.
    Returns:
      float32 logits of the next token, and the rows' cache with this token added.
    """
    rope = rope_of(config, rows.position_B[:, None])
    model = _Model(config, params, compute_dtype, layout)
    x_Bx1xD = model.embed(token_B[:, None])
    if layout.scan_layers:
        # The caches are carried, and written in place: as the loop's outputs they would be copied whole for every token.
        def run(carry, of_layer):
            x_Bx1xD, k_LxBxKxNxD, v_LxBxKxNxD = carry
            layer, k_PxKxDxS, v_PxKxSxD, index = of_layer
            q_Bx1xHxD, k_Bx1xKxD, v_Bx1xKxD, add = model.attention_inputs(layer, x_Bx1xD, rope)
            k_LxBxKxNxD = _written(k_LxBxKxNxD, k_Bx1xKxD.swapaxes(1, 2)[None], (index, 0, 0, slot, 0))
            v_LxBxKxNxD = _written(v_LxBxKxNxD, v_Bx1xKxD.swapaxes(1, 2)[None], (index, 0, 0, slot, 0))
            out_Bx1xHxD = _attend(q_Bx1xHxD, k_PxKxDxS, v_PxKxSxD, prompt.valid_PxS, k_LxBxKxNxD[index], v_LxBxKxNxD[index], slot)
            return (add(out_Bx1xHxD), k_LxBxKxNxD, v_LxBxKxNxD), None

        of_layers = (params["blocks"], prompt.k, prompt.v, jnp.arange(config.n_layers))
        (x_Bx1xD, keys, values), _ = jax.lax.scan(run, (x_Bx1xD, rows.k, rows.v), of_layers)
    else:
        found = []
        for index, layer in enumerate(unstack(config, params["blocks"])):
            q_Bx1xHxD, k_Bx1xKxD, v_Bx1xKxD, add = model.attention_inputs(layer, x_Bx1xD, rope)
            k_BxKxNxD = _written(rows.k[index], k_Bx1xKxD.swapaxes(1, 2), (0, 0, slot, 0))
            v_BxKxNxD = _written(rows.v[index], v_Bx1xKxD.swapaxes(1, 2), (0, 0, slot, 0))
            x_Bx1xD = add(_attend(q_Bx1xHxD, prompt.k[index], prompt.v[index], prompt.valid_PxS, k_BxKxNxD, v_BxKxNxD, slot))
            found.append((k_BxKxNxD, v_BxKxNxD))
        keys, values = (tuple(of_layers) for of_layers in zip(*found, strict=True))
    return model.logits(x_Bx1xD[:, 0]), RowCache(keys, values, rows.position_B + 1)


class _Model:
    """The parts of a decoder, bound to their parameters as they lie."""

    def __init__(self, config: ModelConfig, params: Params, dtype: DTypeLike, layout: Layout):
        decoder_graph, self._block_graph = graphs(config)
        self._config, self._params, self._dtype, self._layout = config, params, dtype, layout
        self._decoder: Decoder = nnx.merge(decoder_graph, params)

    def embed(self, tokens_BxT: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        mesh = self._layout.mesh
        if not self._layout.sharded:
            return self._decoder.embed(tokens_BxT, self._dtype)
        # Every device looks up its features of all tokens: the table, which is larger than they are, stays where it lies.
        x_BxTxD = self._decoder.embed(constrain(mesh, tokens_BxT, None, None), self._dtype)
        return constrain(mesh, constrain(mesh, x_BxTxD, None, None, "fsdp"), ROWS, None, None)

    def attention_inputs(self, layer: Params, x_BxTxD: Float[Array, "b t d"], rope: Rope):
        """Rotated queries and keys, values, and the function from attention's output to the layer's."""
        mesh = self._layout.mesh
        block: Block = nnx.merge(self._block_graph, gather(mesh, layer, self._dtype, prefix="blocks", of_layer=True))
        q, k, v = block.qkv(x_BxTxD, rope, self._dtype)
        return q, k, v, lambda out: constrain(mesh, block.add(x_BxTxD, out, self._dtype)[0], ROWS, None, None)

    def logits(self, x_BxD: Float[Array, "b d"]) -> Float[Array, "b v"]:
        name = "embed" if self._config.tie_embeddings else "head"
        kernel_DxV = output_kernel(self._config, gather(self._layout.mesh, {name: self._params[name]}, self._dtype))
        return project(self._decoder.final_norm(x_BxD), kernel_DxV, self._dtype, out_dtype=at_least_float32(self._dtype))


def _written(cache: Array, new: Array, start: tuple) -> Array:
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), start)


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
