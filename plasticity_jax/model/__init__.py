"""The network: a Llama- or OLMo-2-style decoder as one pure function of a parameter tree, its loss, its key-value cache, its checkpoints."""

from typing import TYPE_CHECKING

from plasticity_jax._lazy import attach

if TYPE_CHECKING:
    from plasticity_jax.model.cache import decode, read_prompts
    from plasticity_jax.model.checkpoint import Checkpoints
    from plasticity_jax.model.load import LoadedModel, load_model
    from plasticity_jax.model.loss import masked_sum, token_losses, vocabulary_losses
    from plasticity_jax.model.param_count import count_params
    from plasticity_jax.model.transformer import abstract_params, apply, hidden_states, init_params

__all__ = [
    "Checkpoints",
    "LoadedModel",
    "abstract_params",
    "apply",
    "count_params",
    "decode",
    "hidden_states",
    "init_params",
    "load_model",
    "masked_sum",
    "read_prompts",
    "token_losses",
    "vocabulary_losses",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "cache": ["decode", "read_prompts"],
        "checkpoint": ["Checkpoints"],
        "load": ["LoadedModel", "load_model"],
        "loss": ["masked_sum", "token_losses", "vocabulary_losses"],
        "param_count": ["count_params"],
        "transformer": ["abstract_params", "apply", "hidden_states", "init_params"],
    },
)
