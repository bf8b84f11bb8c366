"""The study's model shapes by name."""

from plasticity_jax.config.schema import ModelConfig


def _llama(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> ModelConfig:
    return ModelConfig(vocab_size=32000, d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=4, d_ff=d_ff)


def presets() -> dict[str, ModelConfig]:
    """Name → shape: the study's Llama-style sizes (vocabulary of Llama-2, 4 key-value heads), its small rungs, and OLMo-2 1B.

    Source: paper sections 2.1 and 2.2; the authors' configuration file, which has 32 query heads for every size. The 125m rung has 12 heads of 64
    features here instead of 32 of 24, which gives the 128.2M parameters stated for it.
    """
    return {
        "llama-125m": _llama(768, 12, 12, 2176),
        "llama-250m": _llama(1024, 16, 32, 2992),
        "llama-0.5b": _llama(1536, 20, 32, 3216),
        "llama-1b": _llama(2048, 22, 32, 4896),
        "llama-2b": _llama(2816, 26, 32, 6180),
        "llama-4b": _llama(4096, 28, 32, 7792),
        "olmo2-1b": ModelConfig(
            vocab_size=100352,
            d_model=2048,
            n_layers=16,
            n_heads=16,
            n_kv_heads=16,
            d_ff=8192,
            rope_theta=500000.0,
            norm_eps=1e-6,
            norm_position="post",
            qk_norm=True,
            init="truncated",
        ),
    }
