"""Model FLOPs of a decoder, from its config: those of its matrix products; recomputation does not count. Does not import jax."""

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.param_count import count_matmul_params


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of one training token, forward and backward: 6 N + 12 L H Dh T.

    N is `count_matmul_params`. Attention counts all T x T scores, including those that the causal mask hides.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    return 6 * count_matmul_params(model) + 12 * model.n_layers * model.n_heads * model.head_dim * seq_len


def forward_flops(model: ModelConfig, rows: int, seq_len: int, *, outputs: int | None = None) -> int:
    """Model FLOPs of reading `rows` rows of `seq_len` tokens: a third of training on them.

    Args:
      outputs: positions of a row that have logits; None for all of them.
    """
    without = 0 if outputs is None else 2 * (seq_len - outputs) * model.vocab_size * model.d_model
    return rows * (seq_len * flops_per_token(model, seq_len) // 3 - without)


def decode_flops(model: ModelConfig, rows: int, context: int) -> int:
    """Model FLOPs of one more token of `rows` rows, each of which attends to `context` tokens."""
    return rows * (2 * count_matmul_params(model) + 4 * model.n_layers * model.n_heads * model.head_dim * context)


def cached_values(model: ModelConfig) -> int:
    """Keys and values that one token leaves in the cache."""
    return 2 * model.n_layers * model.n_kv_heads * model.head_dim
