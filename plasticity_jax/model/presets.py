"""The paper's model shapes by name."""

from plasticity_jax.config import ModelConfig


def presets() -> dict[str, ModelConfig]:
    """Name → shape of the study's Llama-style models; vocabulary of the Llama-2 tokenizer, 4 key-value heads.

    Source: paper section 2.1. The 125M rung's 12 heads are inferred from its printed parameter count, 128.2M.
    """
    return {
        "llama-125m": ModelConfig(vocab_size=32000, d_model=768, n_layers=12, n_heads=12, n_kv_heads=4, d_ff=2176),
        "llama-0.5b": ModelConfig(vocab_size=32000, d_model=1536, n_layers=20, n_heads=32, n_kv_heads=4, d_ff=3216),
        "llama-1b": ModelConfig(vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, d_ff=4896),
        "llama-4b": ModelConfig(vocab_size=32000, d_model=4096, n_layers=28, n_heads=32, n_kv_heads=4, d_ff=7792),
    }
