"""What the network is: a Llama- or OLMo-2-style decoder as one pure function of a parameter tree, its loss, its key-value cache, its checkpoints."""

import importlib

_EXPORTS = {
    "init_params": "transformer",
    "abstract_params": "transformer",
    "count_params": "transformer",
    "apply": "transformer",
    "hidden_states": "transformer",
    "read_prompts": "cache",
    "decode": "cache",
    "masked_sum": "loss",
    "token_losses": "loss",
    "vocabulary_losses": "loss",
    "Checkpoints": "checkpoint",
    "LoadedModel": "load",
    "load_model": "load",
    "presets": "presets",
}

# The function shares its name with its module, so it cannot be lazy: importing the module would hide it.
from plasticity_jax.config.presets import presets  # noqa: E402, F401

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
