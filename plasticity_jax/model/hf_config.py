"""config.json of a Hugging Face folder: reads what transformers 4 and 5 write, and writes what both read."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax.config import ModelConfig, RopeScaling
from plasticity_jax.errors import UserError
from plasticity_jax.model.hf_names import FAMILIES, Family
from plasticity_jax.runs.storage import AnyPath

log = logging.getLogger("plasticity_jax")

# Settings of how a model is used, not of its network. They are copied from a source to its exports.
CARRIED = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")

# Settings that change the network, with the values that the decoder supports.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}

# Settings that define the network, and settings that do not affect it.
_READ = {"architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
         "layer_types", *_FIXED, *CARRIED}  # fmt: skip
_SAYS_NOTHING = {
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "pretraining_tp",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
}

# The forward passes of the architectures here do not read it; only the cache of transformers' generate forgets what is older.
_WINDOW = "sliding_window"

_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}


@dataclass(frozen=True)
class Description:
    """The contents of a config.json.

    Attributes:
      model: the network.
      family: its architecture.
      carried: its settings among CARRIED, unchanged.
    """

    model: ModelConfig
    family: Family
    carried: dict[str, Any]


def read_description(folder: AnyPath, families: Sequence[Family] = FAMILIES) -> Description:
    """Reads the config.json of a folder.

    Args:
      families: accepted architectures.
    Raises:
      UserError: it is missing or not a JSON object, the architecture is unknown, a number is missing or invalid, or a setting changes the network in a
        way that the decoder does not support.
    """
    path = folder / "config.json"
    tree = read_object(path)
    family = _family(path, tree, families)
    for name, accepted in _FIXED.items():
        if name in tree and tree[name] not in accepted:
            raise UserError(f"{path}: {name}={tree[name]!r} changes the network, and only {accepted[0]!r} is supported; give another model.")
    kinds = tree.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise UserError(f"{path}: layer_types={str(kinds)[:100]} changes the network, and only 'full_attention' is supported; give another model.")
    window, longest = tree.get(_WINDOW), tree.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(longest, int) and window < longest:
        log.warning("%s: %s=%d is ignored, as in the forward pass of %s: every token sees all before it", path, _WINDOW, window, family.architecture)
    unknown = sorted(set(tree) - _READ - _SAYS_NOTHING)
    if unknown:
        log.info("%s: ignored, as in %s: %s", path, family.architecture, ", ".join(unknown))
    heads, width = _number(path, tree, "num_attention_heads", int), _number(path, tree, "hidden_size", int)
    d_head = _number(path, tree, "head_dim", int, None)
    theta, scaling = _rope(path, tree)
    model = ModelConfig(
        vocab_size=_number(path, tree, "vocab_size", int),
        d_model=width,
        n_layers=_number(path, tree, "num_hidden_layers", int),
        n_heads=heads,
        n_kv_heads=_number(path, tree, "num_key_value_heads", int, heads),
        d_ff=_number(path, tree, "intermediate_size", int),
        d_head=None if d_head is None or d_head * heads == width else d_head,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(path, tree, "rms_norm_eps", float, family.norm_eps),
        norm_position=family.norm_position,
        qk_norm=family.qk_norm,
        tie_embeddings=_flag(path, tree, "tie_word_embeddings"),
        init="truncated" if family.norm_position == "post" else "scaled",
    )
    if model.d_head is None and width % heads:
        raise UserError(
            f"{path}: hidden_size={width} is not divisible by num_attention_heads={heads}, and head_dim is not given; add head_dim to it."
        )
    if heads % model.n_kv_heads:
        raise UserError(f"{path}: num_attention_heads={heads} is not divisible by num_key_value_heads={model.n_kv_heads}; download the file again.")
    if model.head_dim % 2:
        raise UserError(f"{path}: the head size {model.head_dim} is odd, and rotary positions need an even one; give another model.")
    return Description(model, family, {name: tree[name] for name in CARRIED if name in tree})


def read_object(path: AnyPath) -> dict[str, Any]:
    """A JSON object from a third-party file. Raises UserError if the file is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{path} is missing; give the folder that save_pretrained wrote, with its {path.name}.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the file again.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__} where a JSON object is expected; download the file again.")
    return tree


def _family(path: AnyPath, tree: dict[str, Any], families: Sequence[Family]) -> Family:
    named = tree.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    for family in families:
        if family.architecture in named or (not named and tree.get("model_type") == family.model_type):
            return family
    found = named[0] if named else tree.get("model_type")
    raise UserError(f"{path}: the architecture {found!r} is unknown; give a model of one of {', '.join(f.architecture for f in families)}.")


_REQUIRED = object()


def _number(path: AnyPath, tree: dict[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = tree.get(name)
    if value is None:
        if default is _REQUIRED:
            raise UserError(f"{path} has no {name}, which is required; download the file again, or add it.")
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{path}: {name}={value!r} must be a positive {'whole ' if kind is int else ''}number; download the file again.")
    return kind(value)


def _flag(path: AnyPath, tree: dict[str, Any], name: str) -> bool:
    value = tree.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name}={value!r} must be true or false; download the file again.")
    return value


def _rope(path: AnyPath, tree: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base and the scaling. transformers 5 writes both to rope_parameters, 4 writes rope_theta and rope_scaling."""
    theta = _number(path, tree, "rope_theta", float, None)
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = tree.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{path}: {key}={rope!r} must be an object or null; download the file again.")
        own = _number(path, rope, "rope_theta", float, None)
        if own is not None and theta not in (None, own):
            raise UserError(f"{path}: {key} has rope_theta={own:g} and the file {theta:g}; remove the wrong one.")
        theta = own or theta
        found.append(_scaling(path, key, rope))
    if len(set(found)) > 1:
        raise UserError(f"{path}: rope_parameters and rope_scaling differ; remove the wrong one.")
    return 10000.0 if theta is None else theta, found[0] if found else None


def _scaling(path: AnyPath, key: str, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta") and value is not None}
    if settings.pop("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{path}: {key}.partial_rotary_factor={rope['partial_rotary_factor']!r} changes the network, and only 1 is supported; give another model."
        )
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: {key}.rope_type={kind!r} is not supported, only default and llama3; give another model.")
    if kind == "default":
        if settings:
            unread = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            log.info("%s: %s: ignored, as in transformers, because rope_type is default: %s", path, key, unread[:200])
        return None
    for name in settings:
        if name not in _ROPE_SCALING:
            raise UserError(f"{path}: {key}.{name}={settings[name]!r} is unknown for rope_type={kind!r}; remove it if it has no effect.")
    values = {
        field: _number(path, {f"{key}.{name}": settings.get(name)}, f"{key}.{name}", int if field == "original_length" else float)
        for name, field in _ROPE_SCALING.items()
    }
    scaling = RopeScaling(**values)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(f"{path}: {key}.low_freq_factor={scaling.low_freq_factor} must be below high_freq_factor={scaling.high_freq_factor}.")
    return scaling


def describe(model: ModelConfig, family: Family, dtype: str, carried: dict[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read as the same network.

    Args:
      dtype: of most tensors, by its name in torch.
      carried: values for all of CARRIED.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": "llama3"} | {name: getattr(model.rope_scaling, field) for name, field in _ROPE_SCALING.items()}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
        # transformers 4 does not know rope_parameters and reads these two.
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else rope,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if family.model_type == "llama" else {}),
        "use_cache": True,
        "dtype": dtype,
        **carried,
    }
