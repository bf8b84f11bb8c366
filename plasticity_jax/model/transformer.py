"""The decoder: its parameters, and the pure function that everything else transforms.

Parameters are a nested dict of float32 arrays in which the layers are stacked on axis 0 (L layers, D features, H query and K key-value
heads of Dh features, F hidden features, V tokens):

    embed/embedding [V, D]
    blocks/attn_norm/scale [L, D]    blocks/attn/{q [L, D, H·Dh], k, v [L, D, K·Dh], o [L, H·Dh, D]}/kernel
                                     blocks/attn/{q_norm [L, H·Dh], k_norm [L, K·Dh]}/scale, with `qk_norm`
    blocks/mlp_norm/scale [L, D]     blocks/mlp/{gate, up [L, D, F], down [L, F, D]}/kernel
    final_norm/scale [D]
    head/kernel [D, V], unless `tie_embeddings`
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.model import cpu
from plasticity_jax.model.attention import Attention, Rope, attend, attend_causally, attention_mask, rope_tables
from plasticity_jax.model.layers import MLP, Embedding, Initializer, Linear, RMSNorm, at_least_float32, project
from plasticity_jax.model.param_count import count_params as count_params
from plasticity_jax.parallel.sharding import GATHERED, ROWS, constrain, gather

CAPTURES = ("embed", "block_out", "final_norm", "mlp_act", "attn_probs")

# What the backward pass keeps of a block instead of recomputing it; without a policy it keeps everything.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the projections; attention's matmuls have batch dimensions
    "full": jax.checkpoint_policies.nothing_saveable,
}
_GATHER_AGAIN = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)

Params = dict[str, Any]


class Block(nnx.Module):
    """x + attention, then x + MLP; each normalizes its input ("pre") or its output ("post")."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init, out_init = _initializers(config)
        self.norm_position = config.norm_position
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, init, out_init, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config, init, out_init, rngs)

    def qkv(
        self, x_BxTxD: Float[Array, "B T D"], rope: Rope, dtype: DTypeLike
    ) -> tuple[Float[Array, "B T H Dh"], Float[Array, "B T K Dh"], Float[Array, "B T K Dh"]]:
        """Inputs of attention: rotated queries and keys, and values."""
        return self.attn.qkv(self._norm("pre", self.attn_norm, x_BxTxD), rope, dtype)

    def add(
        self, x_BxTxD: Float[Array, "B T D"], out_BxTxHxDh: Float[Array, "B T H Dh"], dtype: DTypeLike
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
        """The block's output, from its input and the output of attention, and the MLP's hidden activation."""
        x_BxTxD = x_BxTxD + self._norm("post", self.attn_norm, self.attn.merge(out_BxTxHxDh, dtype))
        y_BxTxD, act_BxTxF = self.mlp(self._norm("pre", self.mlp_norm, x_BxTxD), dtype)
        return x_BxTxD + self._norm("post", self.mlp_norm, y_BxTxD), act_BxTxF

    def _norm(self, position: str, norm: RMSNorm, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return norm(x) if position == self.norm_position else x


class Decoder(nnx.Module):
    """The whole network; `blocks` is one Block whose parameters carry a leading layer axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init, _ = _initializers(config)

        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.embed = Embedding(config.vocab_size, config.d_model, init, rngs)
        self.blocks = stacked_blocks(rngs)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, init, rngs)


def output_kernel(config: ModelConfig, params: Params) -> Float[Array, "D V"]:
    """The matrix that maps normalized states to logits."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


def logits_of(config: ModelConfig, params: Params, x: Float[Array, "*batch D"], dtype: DTypeLike) -> Float[Array, "*batch V"]:
    """float32 logits of normalized states; the matmul's inputs are in `dtype`."""
    return project(x, output_kernel(config, params), dtype, out_dtype=at_least_float32(dtype))


def _initializers(config: ModelConfig) -> tuple[Initializer, Initializer]:
    """Initializers of most matrices and the embedding, and of the matrices that write to the residual stream."""
    if config.init == "truncated":
        draw = nnx.initializers.truncated_normal(0.02, lower=-3.0, upper=3.0)
        return draw, draw
    return nnx.initializers.normal(math.sqrt(2 / (5 * config.d_model))), nnx.initializers.normal(1 / (config.n_layers * math.sqrt(config.d_model)))


def init_params(config: ModelConfig, seed: int) -> Params:
    """Initial parameters, float32; the same for the same (config, seed).

    With `init="scaled"`, matrices and the embedding are drawn from N(0, sqrt(2/(5 d_model))), and the attention output and MLP-down matrices from
    N(0, 1/(n_layers sqrt(d_model))); with "truncated", all from N(0, 0.02) truncated at three standard deviations. Norm gains are 1.
    Source: paper sections 2.1 (TinyLlama's scheme) and 2.2 (OLMo-2's).
    """
    return _compiled_init(config)(jnp.uint32(seed))


@functools.lru_cache(maxsize=32)
def _compiled_init(config: ModelConfig):
    # It runs once; on CPUs the compiler's optimizations take seconds and save milliseconds.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(_init, config), compiler_options=options)


def _init(config: ModelConfig, seed: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=jax.random.key(seed))), nnx.Param))


@functools.lru_cache(maxsize=32)
def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree with a `jax.ShapeDtypeStruct` for each array; allocates nothing."""
    return jax.eval_shape(functools.partial(_init, config), jax.ShapeDtypeStruct((), jnp.uint32))


@functools.lru_cache(maxsize=32)
def graphs(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Graph definitions of the decoder without its blocks' arrays, and of one block: `nnx.merge(graph, arrays)` gives the module."""
    decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=0)))
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0)))
    return nnx.graphdef(decoder), nnx.graphdef(block)


def unstack(config: ModelConfig, blocks: Params) -> list[Params]:
    """The parameters of each layer. Uses a split, whose gradient is one concatenation rather than a sum of padded arrays per layer."""
    parts = jax.tree.map(lambda x: [p[0] for p in jnp.split(x, config.n_layers)], blocks)
    return [jax.tree.map(lambda p: p[layer], parts, is_leaf=lambda p: isinstance(p, list)) for layer in range(config.n_layers)]


def rope_of(config: ModelConfig, positions_BxT: Int[Array, "b T"]) -> Rope:
    """The rotary tables at these positions."""
    return rope_tables(positions_BxT, config.head_dim, config.rope_theta, config.rope_scaling)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BxT: Int[Array | np.ndarray, "B T"],
    *,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    capture: Sequence[str] = (),
    compute_dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
    remat: str = "none",
    attention: str = "xla",
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """The final normalized states, of which the logits are a linear map.

    Args:
      config: the model's shape.
      params: the tree that `init_params` returns.
      tokens_BxT: token ids.
      segment_ids: if given, attention stays within equal ids (0 marks padding); None lets every token attend to all before it.
      positions: rotary positions; None counts from 0 in every row.
      capture: names of activations to return; see Returns. Others are not stored.
      compute_dtype: dtype of the matmuls and the residual stream; norms and softmax are at least float32.
      scan_layers: run the layers as a `lax.scan` (smaller program, slower on CPUs) instead of unrolled.
      remat: what the backward pass recomputes: "none", "dots" (all but the projections' outputs) or "full" (all but the blocks' inputs).
      attention: "xla", or a kernel of `kernels.choose_kernel`.
      mesh: where the arrays are sharded, in the layouts of `parallel.sharding`; None for one device.
    Returns:
      The states in `compute_dtype`, and a dict of the captured activations: `embed` [B, T, D], `block_out` [L, B, T, D] (residual stream after
      each block), `final_norm` [B, T, D], `mlp_act` [L, B, T, F] (silu(gate)·up), `attn_probs` [L, B, H, T, T] (float32).
    Raises:
      ValueError: an unknown capture name, or `attn_probs` with a kernel that never materializes them.
    """
    unknown = [name for name in capture if name not in CAPTURES]
    if unknown:
        raise ValueError(f"capture={unknown[0]!r} is unknown; known: {', '.join(CAPTURES)}.")
    if "attn_probs" in capture and attention != "xla":
        raise ValueError(f"capture='attn_probs' with attention={attention!r}: the kernel never materializes the probabilities; use attention='xla'.")
    tokens_BxT = jnp.asarray(tokens_BxT)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    decoder_graph, block_graph = graphs(config)
    decoder = nnx.merge(decoder_graph, params | gather(mesh, {"embed": params["embed"]}, compute_dtype, sums=True))
    rope = cpu.forms(mesh)(rope_of)(config, jnp.arange(tokens_BxT.shape[1])[None] if positions is None else jnp.asarray(positions))
    mask = attention_mask(tokens_BxT.shape[1], segment_ids) if attention == "xla" else None

    @cpu.forms(mesh)
    def run_block(x_BxTxD, layer: Params):
        block = nnx.merge(block_graph, gather(mesh, layer, compute_dtype, prefix="blocks", of_layer=True))
        q, k, v = block.qkv(x_BxTxD, rope, compute_dtype)
        if attention == "xla":
            assert mask is not None
            captured = "attn_probs" in capture
            out_BxTxHxDh, probs_BxHxTxT = attend(q, k, v, mask) if captured else (attend_causally(q, k, v, mask), None)
        else:
            from plasticity_jax.model.kernels import kernel_attention  # Pallas takes a second to import

            out_BxTxHxDh, probs_BxHxTxT = kernel_attention(attention, q, k, v, segment_ids_BxT=segment_ids, mesh=mesh), None
        x_BxTxD, act_BxTxF = block.add(x_BxTxD, out_BxTxHxDh, compute_dtype)
        x_BxTxD = constrain(mesh, x_BxTxD, ROWS, None, None)
        captures = {"block_out": x_BxTxD, "mlp_act": act_BxTxF, "attn_probs": probs_BxHxTxT}
        return x_BxTxD, {name: captures[name] for name in capture if name in captures}

    policy = REMAT_POLICIES.get(remat)
    if policy is None and mesh is not None and mesh.shape["fsdp"] > 1:
        policy = _GATHER_AGAIN  # keeping all layers' gathered matrices for the backward pass would put the whole model on every device
    if policy is not None:
        # A scan's body is compiled separately, so the compiler cannot merge the two computations anyway.
        run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=not scan_layers)
    x_BxTxD = constrain(mesh, decoder.embed(tokens_BxT, compute_dtype), ROWS, None, None)
    activations = {"embed": x_BxTxD}
    if scan_layers:
        x_BxTxD, of_layers = jax.lax.scan(run_block, x_BxTxD, params["blocks"])
    else:
        by_layer = []
        for layer in unstack(config, params["blocks"]):
            x_BxTxD, captures = run_block(x_BxTxD, layer)
            by_layer.append(captures)
        of_layers = jax.tree.map(lambda *layers: jnp.stack(layers), *by_layer)
    x_BxTxD = cpu.forms(mesh)(decoder.final_norm)(x_BxTxD)
    activations |= of_layers | {"final_norm": x_BxTxD}
    return x_BxTxD, {name: activations[name] for name in capture}


def apply(
    config: ModelConfig, params: Params, tokens_BxT: Int[Array | np.ndarray, "B T"], *, compute_dtype: DTypeLike = jnp.float32, **options: Any
) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
    """Logits of the next token at every position, float32, and the captured activations.

    Args:
      options: those of `hidden_states`.
    """
    x_BxTxD, activations = hidden_states(config, params, tokens_BxT, compute_dtype=compute_dtype, **options)
    return logits_of(config, params, x_BxTxD, compute_dtype), activations
