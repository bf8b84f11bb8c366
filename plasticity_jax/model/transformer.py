"""The decoder: its parameters, and the one pure function that everything else transforms.

Parameters are a nested dict of float32 arrays in which the layers are stacked on axis 0 (L layers, D features, H query and K key-value
heads of Dh features, F hidden features, V tokens):

    embed/embedding [V, D]
    blocks/attn_norm/scale [L, D]    blocks/attn/{q [L, D, H·Dh], k, v [L, D, K·Dh], o [L, H·Dh, D]}/kernel
    blocks/mlp_norm/scale [L, D]     blocks/mlp/{gate, up [L, D, F], down [L, F, D]}/kernel
    final_norm/scale [D]
    head/kernel [D, V]
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.attention import Attention, Rope, attend, attention_mask, rope_tables
from plasticity_jax.model.layers import MLP, Embedding, Linear, RMSNorm

CAPTURES = ("embed", "block_out", "final_norm", "mlp_act", "attn_probs")

Params = dict[str, Any]


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        std, out_std = _init_stds(config)
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, std, out_std, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config, std, out_std, rngs)

    def __call__(
        self,
        x_BxTxD: Float[Array, "B T D"],
        rope: Rope,
        mask_BxTxT: Bool[Array, "m T T"],
        dtype: DTypeLike,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns the block's output and its captures by name."""
        q, k, v = self.attn.qkv(self.attn_norm(x_BxTxD), rope, dtype)
        out_BxTxHxDh, probs_BxHxTxT = attend(q, k, v, mask_BxTxT)
        x_BxTxD = x_BxTxD + self.attn.merge(out_BxTxHxDh, dtype)
        y_BxTxD, act_BxTxF = self.mlp(self.mlp_norm(x_BxTxD), dtype)
        x_BxTxD = x_BxTxD + y_BxTxD
        return x_BxTxD, {"block_out": x_BxTxD, "mlp_act": act_BxTxF, "attn_probs": probs_BxHxTxT}


class Decoder(nnx.Module):
    """The whole network; `blocks` is one Block whose parameters carry a leading layer axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        std, _ = _init_stds(config)

        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.embed = Embedding(config.vocab_size, config.d_model, std, rngs)
        self.blocks = stacked_blocks(rngs)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, std, rngs)


def _init_stds(config: ModelConfig) -> tuple[float, float]:
    """Standard deviations: of every matrix, and of those that write into the residual stream (paper section 2.1)."""
    return math.sqrt(2 / (5 * config.d_model)), 1 / (config.n_layers * math.sqrt(config.d_model))


def init_params(config: ModelConfig, seed: int) -> Params:
    """Initial parameters, float32; the same for the same (config, seed).

    Matrices and the embedding are drawn from N(0, sqrt(2/(5 d_model))), the attention output and MLP-down matrices from
    N(0, 1/(n_layers sqrt(d_model))), norm gains are 1. Source: paper section 2.1 (TinyLlama's scheme).
    """
    return _compiled_init(config)(jnp.uint32(seed))


@functools.lru_cache(maxsize=32)
def _compiled_init(config: ModelConfig):
    # It runs once; on CPUs the compiler's optimisations take seconds and save milliseconds.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(_init, config), compiler_options=options)


def _init(config: ModelConfig, seed: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=jax.random.key(seed))), nnx.Param))


@functools.lru_cache(maxsize=32)
def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree with a `jax.ShapeDtypeStruct` in the place of each array; allocates nothing."""
    return jax.eval_shape(functools.partial(_init, config), jax.ShapeDtypeStruct((), jnp.uint32))


def count_params(config: ModelConfig) -> int:
    """The exact number of parameters, embeddings included, from shapes alone."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


@functools.lru_cache(maxsize=32)
def graphs(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Graph definitions of the decoder without its blocks' arrays, and of one block: `nnx.merge(graph, arrays)` gives the module."""
    decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=0)))
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0)))
    return nnx.graphdef(decoder), nnx.graphdef(block)


def unstack(config: ModelConfig, blocks: Params) -> list[Params]:
    """The parameters of each layer. By a split, whose gradient is one concatenation and not a sum of padded arrays per layer."""
    parts = jax.tree.map(lambda x: [p[0] for p in jnp.split(x, config.n_layers)], blocks)
    return [jax.tree.map(lambda p: p[layer], parts, is_leaf=lambda p: isinstance(p, list)) for layer in range(config.n_layers)]


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BxT: Int[Array | np.ndarray, "B T"],
    *,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    capture: Sequence[str] = (),
    compute_dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
    """Logits of the next token at every position.

    Args:
      config: the network's shape.
      params: the tree that `init_params` returns.
      tokens_BxT: token ids.
      segment_ids: when given, attention stays within equal ids (0 marks padding); None lets every token read all before it.
      positions: rotary positions; None counts from 0 in every row.
      capture: names of activations to return; see Returns. What is not named is not computed.
      compute_dtype: type of the products and of the residual stream; norms, softmax and logits are float32.
      scan_layers: run the layers as a `lax.scan` (smaller program, slower on CPUs) instead of one after the other.
    Returns:
      float32 logits, and a dict of the captured activations: `embed` [B, T, D], `block_out` [L, B, T, D] (residual stream after each
      block), `final_norm` [B, T, D], `mlp_act` [L, B, T, F] (silu(gate)·up), `attn_probs` [L, B, H, T, T] (float32).
    Raises:
      ValueError: an unknown capture name.
    """
    unknown = [name for name in capture if name not in CAPTURES]
    if unknown:
        raise ValueError(f"capture={unknown[0]!r} is unknown; known: {', '.join(CAPTURES)}.")
    tokens_BxT = jnp.asarray(tokens_BxT)
    length = tokens_BxT.shape[1]
    decoder_graph, block_graph = graphs(config)
    decoder = nnx.merge(decoder_graph, params)
    if positions is None:
        positions = jnp.arange(length)[None]
    rope = rope_tables(jnp.asarray(positions), config.head_dim, config.rope_theta)
    mask = attention_mask(length, None if segment_ids is None else jnp.asarray(segment_ids))

    def run_block(x_BxTxD, layer: Params):
        x_BxTxD, captures = nnx.merge(block_graph, layer)(x_BxTxD, rope, mask, compute_dtype)
        return x_BxTxD, {name: captures[name] for name in capture if name in captures}

    x_BxTxD = decoder.embed(tokens_BxT, compute_dtype)
    activations = {"embed": x_BxTxD}
    if scan_layers:
        x_BxTxD, of_layers = jax.lax.scan(run_block, x_BxTxD, params["blocks"])
    else:
        by_layer = []
        for layer in unstack(config, params["blocks"]):
            x_BxTxD, captures = run_block(x_BxTxD, layer)
            by_layer.append(captures)
        of_layers = jax.tree.map(lambda *layers: jnp.stack(layers), *by_layer)
    x_BxTxD = decoder.final_norm(x_BxTxD)
    activations |= of_layers | {"final_norm": x_BxTxD}
    logits_BxTxV = decoder.head(x_BxTxD, compute_dtype, out_dtype=jnp.float32)
    return logits_BxTxV, {name: activations[name] for name in capture}
