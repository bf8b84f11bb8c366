"""How the next token is chosen from logits: filters on the logits, and the draw."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import EvaluateConfig

VOCAB_BLOCK = 32  # entries per block of the two-level draw from the vocabulary
_ONE = 0x3F800000  # bits of the float32 1.0; bit patterns of non-negative floats are ordered as the floats are
_HALVINGS = 30  # bisections that narrow [0, _ONE] down to one bit pattern


@dataclass(frozen=True)
class Sampling:
    """Which completions each prompt gets.

    The settings apply in this order, as in vLLM and transformers: penalty, temperature, `top_k`, `top_p`. A greedy completion takes the highest logit
    after the penalty.

    Attributes:
      n_samples: sampled completions per prompt; 0 gives the single greedy one.
      temperature: divides the logits; greater than 0.
      top_k: sample from the k highest logits and ties with the lowest of them; 0 for all.
      top_p: sample from the fewest tokens whose probabilities sum to this, and ties with the least likely of them; 1 for all.
      repetition_penalty: for tokens in the prompt or the completion, positive logits are divided by it and others multiplied; 1 for none.
      seed: of the random streams.
      greedy_first: put the greedy completion before the samples; both share the prompt's cache.
    Raises:
      ValueError: a number out of range.
    """

    n_samples: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    greedy_first: bool = False

    @classmethod
    def of(cls, settings: EvaluateConfig, n_samples: int) -> "Sampling":
        """That of an evaluation: the greedy completion, then `n_samples` others."""
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        return cls(n_samples, greedy_first=True, **{name: getattr(settings, name) for name in names})

    def __post_init__(self):
        for name in ("n_samples", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0; set it to 0 or more.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0; use n_samples=0 for the greedy completion.")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be greater than 0; 1 is no penalty.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, which samples from all tokens.")

    @property
    def greedy(self) -> bool:
        """Whether the first completion of a prompt is the greedy one."""
        return self.greedy_first or self.n_samples == 0

    @property
    def n_completions(self) -> int:
        """Completions per prompt."""
        return self.n_samples + self.greedy


def tokens_seen(tokens_PxS: Int[Array, "p s"], valid_PxS: Bool[Array, "p s"], vocab_size: int) -> Bool[Array, "p v"]:
    """Which tokens of the vocabulary each prompt contains, without its padding."""
    rows_Px1 = jnp.arange(tokens_PxS.shape[0])[:, None]
    seen_PxV = jnp.zeros((tokens_PxS.shape[0], vocab_size), bool)
    return seen_PxV.at[rows_Px1, jnp.where(valid_PxS, tokens_PxS, vocab_size)].set(True, mode="drop")


def penalize(logits_BxV: Float[Array, "b v"], seen_BxV: Bool[Array, "b v"], penalty: Float[Array, ""]) -> Float[Array, "b v"]:
    """Divides positive logits of seen tokens by the penalty and multiplies their other logits. Source: Keskar et al. 2019 (arXiv 1909.05858)."""
    return jnp.where(seen_BxV, jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty), logits_BxV)


def keep_top_k(logits_BxV: Float[Array, "b v"], k: int) -> Float[Array, "b v"]:
    """Sets all but the k highest logits of a row to -inf; ties with the k-th stay."""
    lowest_Bx1 = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    return jnp.where(logits_BxV < lowest_Bx1, -jnp.inf, logits_BxV)


def keep_top_p(logits_BxV: Float[Array, "b v"], p: Float[Array, ""]) -> Float[Array, "b v"]:
    """Sets a token's logit to -inf if more likely tokens already have probability `p`; ties with the last token kept stay.

    Does not sort: bisects the bit patterns of the lowest probability kept, with one sum over the vocabulary per step.
    """
    weights_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))  # in [0, 1]
    bits_BxV = jax.lax.bitcast_convert_type(weights_BxV, jnp.int32)
    wanted_B = p * jnp.sum(weights_BxV, axis=-1)

    def halve(_, interval):
        low_B, high_B = interval
        middle_B = (low_B + high_B) // 2
        above_B = jnp.sum(jnp.where(bits_BxV > middle_B[:, None], weights_BxV, 0.0), axis=-1)
        enough_B = above_B >= wanted_B
        return jnp.where(enough_B, middle_B + 1, low_B), jnp.where(enough_B, high_B, middle_B)

    zeros_B = jnp.zeros_like(wanted_B, jnp.int32)
    _, lowest_B = jax.lax.fori_loop(0, _HALVINGS, halve, (zeros_B, zeros_B + _ONE))
    return jnp.where(bits_BxV < lowest_B[:, None], -jnp.inf, logits_BxV)


def draw(logits_BxV: Float[Array, "b v"], uniform_B: Float[Array, " b"]) -> Int[Array, " b"]:
    """One token per row from softmax(logits), by inverting the cumulative distribution at `uniform_B`, each in [0, 1).

    Draws a block of the vocabulary, then an entry in it. Needs one random number per row instead of one per entry (Gumbel), and no cumulative sum over
    the whole vocabulary.
    """
    n_rows, vocab = logits_BxV.shape
    weights_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    weights_BxKxE = jnp.pad(weights_BxV, ((0, 0), (0, -vocab % VOCAB_BLOCK))).reshape(n_rows, -1, VOCAB_BLOCK)
    blocks_BxK = jnp.sum(weights_BxKxE, axis=-1)
    target_B = uniform_B * jnp.sum(blocks_BxK, axis=-1)
    block_B, below_B = _first_above(blocks_BxK, target_B)
    entries_BxE = jnp.take_along_axis(weights_BxKxE, block_B[:, None, None], axis=1)[:, 0]
    entry_B, _ = _first_above(entries_BxE, target_B - below_B)
    return (block_B * VOCAB_BLOCK + entry_B).astype(jnp.int32)


def _first_above(weights_BxK: Float[Array, "b k"], target_B: Float[Array, " b"]) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """First index whose cumulative weight exceeds the target, and the cumulative weight before it."""
    cumulative_BxK = jnp.cumsum(weights_BxK, axis=-1)
    # If rounding leaves the target at or above the last sum, choose the last entry with a nonzero weight.
    last_B = weights_BxK.shape[-1] - 1 - jnp.argmax(weights_BxK[:, ::-1] > 0, axis=-1)
    index_B = jnp.minimum(jnp.sum(cumulative_BxK <= target_B[:, None], axis=-1), last_B)
    before_BxK = cumulative_BxK - weights_BxK
    return index_B, jnp.take_along_axis(before_BxK, index_B[:, None], axis=-1)[:, 0]
