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
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
