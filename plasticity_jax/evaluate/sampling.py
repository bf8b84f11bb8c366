"""How the next token is chosen from logits: what the settings do to the logits, and the draw from what is left."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

VOCAB_BLOCK = 32  # entries per block of the two-level draw from the vocabulary
_ONE = 0x3F800000  # bits of the float32 1.0; those of non-negative numbers have the numbers' order
_HALVINGS = 30  # until an interval of that many bit patterns holds one


@dataclass(frozen=True)
class Sampling:
    """Which completions each prompt gets.

    The settings work in this order, as in vLLM and transformers: the penalty, the temperature, `top_k`, `top_p`. A greedy completion takes the
    highest logit after the penalty.

    Attributes:
      n_samples: sampled completions per prompt; 0 gives the single greedy one.
      temperature: the logits are divided by it; greater than 0.
      top_k: samples come from the k highest logits and what ties with the last of them; 0 for all.
      top_p: samples come from the fewest tokens whose probabilities add up to this, and what ties with the last of them; 1 for all.
      repetition_penalty: of every token in the prompt or the completion, a positive logit is divided by it, another multiplied; 1 for none.
      seed: of the random streams.
      greedy_first: with samples, puts the greedy completion before them, from the same reading of the prompt.
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
    """Which tokens of the vocabulary each prompt holds, padding aside."""
    rows_Px1 = jnp.arange(tokens_PxS.shape[0])[:, None]
    seen_PxV = jnp.zeros((tokens_PxS.shape[0], vocab_size), bool)
    return seen_PxV.at[rows_Px1, jnp.where(valid_PxS, tokens_PxS, vocab_size)].set(True, mode="drop")


def penalise(logits_BxV: Float[Array, "b v"], seen_BxV: Bool[Array, "b v"], penalty: Float[Array, ""]) -> Float[Array, "b v"]:
    """Positive logits of tokens seen divided by the penalty, other logits of theirs multiplied. Source: Keskar et al. 2019 (arXiv 1909.05858)."""
    return jnp.where(seen_BxV, jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty), logits_BxV)


def keep_top_k(logits_BxV: Float[Array, "b v"], k: int) -> Float[Array, "b v"]:
    """-inf for all but the k highest logits of a row; what equals the k-th stays too."""
    lowest_Bx1 = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    return jnp.where(logits_BxV < lowest_Bx1, -jnp.inf, logits_BxV)


def keep_top_p(logits_BxV: Float[Array, "b v"], p: Float[Array, ""]) -> Float[Array, "b v"]:
    """-inf for every token for which the likelier ones already have the probability `p`; what equals the last that stays, stays too.

    Without a sort: the lowest probability that stays is found by halving the interval of its bit patterns, one sum over the vocabulary each.
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

    Two levels, first a block of the vocabulary and then an entry in it: one random number per row instead of one per entry (Gumbel), and no
    cumulative sum over the whole vocabulary.
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
    # Rounding may leave the target at or above the last sum: then the last entry of any weight is meant, not one without.
    last_B = weights_BxK.shape[-1] - 1 - jnp.argmax(weights_BxK[:, ::-1] > 0, axis=-1)
    index_B = jnp.minimum(jnp.sum(cumulative_BxK <= target_B[:, None], axis=-1), last_B)
    before_BxK = cumulative_BxK - weights_BxK
    return index_B, jnp.take_along_axis(before_BxK, index_B[:, None], axis=-1)[:, 0]
