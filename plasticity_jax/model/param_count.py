"""How many parameters a decoder has, from its config. Does not import jax."""

from plasticity_jax.config import ModelConfig


def count_params(config: ModelConfig) -> int:
    """The exact number of parameters, embeddings and norm gains included."""
    norms = 2 * config.d_model
    if config.qk_norm:
        norms += (config.n_heads + config.n_kv_heads) * config.head_dim
    input_embedding = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    return count_matmul_params(config) + input_embedding + config.n_layers * norms + config.d_model


def count_matmul_params(config: ModelConfig) -> int:
    """Parameters of the matrices that multiply activations: all but norm gains and an untied input embedding."""
    attention = 2 * config.d_model * (config.n_heads + config.n_kv_heads) * config.head_dim
    mlp = 3 * config.d_model * config.d_ff
    return config.n_layers * (attention + mlp) + config.vocab_size * config.d_model
