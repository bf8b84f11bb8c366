"""Which Hugging Face tensor is which parameter: one table per family, for both directions."""

import math
from dataclasses import dataclass
from typing import Literal

import jax

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.parallel.rules import param_paths

# Parameter path, tensor name ({layer} stands for the layer's number), whether the tensor is the transposed parameter.
_COMMON = (
    ("embed/embedding", "model.embed_tokens.weight", False),
    ("blocks/attn/q/kernel", "model.layers.{layer}.self_attn.q_proj.weight", True),
    ("blocks/attn/k/kernel", "model.layers.{layer}.self_attn.k_proj.weight", True),
    ("blocks/attn/v/kernel", "model.layers.{layer}.self_attn.v_proj.weight", True),
    ("blocks/attn/o/kernel", "model.layers.{layer}.self_attn.o_proj.weight", True),
    ("blocks/mlp/gate/kernel", "model.layers.{layer}.mlp.gate_proj.weight", True),
    ("blocks/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", True),
    ("blocks/mlp/down/kernel", "model.layers.{layer}.mlp.down_proj.weight", True),
    ("final_norm/scale", "model.norm.weight", False),
    ("head/kernel", "lm_head.weight", True),
)
_LLAMA = (
    *_COMMON,
    ("blocks/attn_norm/scale", "model.layers.{layer}.input_layernorm.weight", False),
    ("blocks/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", False),
)
_OLMO2 = (
    *_COMMON,
    ("blocks/attn/q_norm/scale", "model.layers.{layer}.self_attn.q_norm.weight", False),
    ("blocks/attn/k_norm/scale", "model.layers.{layer}.self_attn.k_norm.weight", False),
    ("blocks/attn_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", False),
    ("blocks/mlp_norm/scale", "model.layers.{layer}.post_feedforward_layernorm.weight", False),
)

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that the decoder implements.

    Attributes:
      architecture, model_type: its names in config.json.
      norm_position, qk_norm: its fields of ModelConfig.
      norm_eps: the default if config.json does not give it.
      names: rows (parameter path, tensor name, transposed).
    """

    architecture: str
    model_type: str
    norm_position: Literal["pre", "post"]
    qk_norm: bool
    norm_eps: float
    names: tuple[tuple[str, str, bool], ...]


FAMILIES = (
    Family("LlamaForCausalLM", "llama", "pre", False, 1e-6, _LLAMA),
    Family("Olmo2ForCausalLM", "olmo2", "post", True, 1e-5, _OLMO2),
)


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor and its place in the parameters.

    Attributes:
      name, shape: of the tensor.
      path: of the parameter.
      layer: index on the parameter's first axis; None if the tensor is the whole parameter.
      transposed: the tensor is [out, in] and the parameter [in, out].
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    transposed: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def family_of(config: ModelConfig) -> Family | None:
    """The family of a network; None if Hugging Face has none with this combination of norms."""
    found = [f for f in FAMILIES if (f.norm_position, f.qk_norm) == (config.norm_position, config.qk_norm)]
    return found[0] if found else None


def parts(config: ModelConfig, family: Family) -> list[Part]:
    """Every tensor of a network, parameter by parameter in the order of the tree's leaves, layer by layer."""
    table = {path: (name, transposed) for path, name, transposed in family.names}
    found = []
    params = abstract_params(config)
    for path, leaf in zip(param_paths(params), jax.tree.leaves(params), strict=True):
        name, transposed = table[path]
        stacked = path.startswith("blocks/")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transposed else shape
        layers = range(config.n_layers) if stacked else [None]
        found += [Part(name.format(layer=layer), shape, path, layer, transposed) for layer in layers]
    return found
