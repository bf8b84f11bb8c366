"""Completions of many prompts: prefill once per prompt, decode all its completions together, stop when all have ended."""

import collections
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.errors import UserError
from plasticity_jax.model.cache import decode, read_prompts
from plasticity_jax.parallel import arrays
from plasticity_jax.parallel.batches import row_shards
from plasticity_jax.parallel.sharding import ROWS
from plasticity_jax.progress import Progress

STOP_STRINGS = ("Human", "Assistant")  # the paper's "Human:" and "Assistant:" begin with these two
VOCAB_BLOCK = 32  # entries per block of the two-level draw from the vocabulary
_BATCH_SPECS = (PartitionSpec(ROWS), PartitionSpec(ROWS), PartitionSpec(None, ROWS), PartitionSpec(ROWS))  # of tokens, valid, uniforms, filled
IN_FLIGHT = 2  # batches that the device works on at once; on a CPU they share its cores, elsewhere the second hides the host's part


def generate(model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, n_samples: int, temperature: float, seed: int,
             buckets: tuple[int, ...], batch_size: int, eos_id: int, pad_id: int, compute_dtype: Any, greedy_first: bool = False,
             what: str = "generate", mesh: Mesh | None = None) -> list[list[list[int]]]:
    """Completes every prompt, greedily or by sampling.

    A completion's random stream depends on `seed`, the prompt's tokens, the sample's number and the position in the completion, and batches have
    a fixed shape: the same prompt gives the same tokens whatever else is in the call.

    Args:
      model: a loaded model (with `.config` and `.params`), or the pair (config, params).
      prompts: token ids, at least one per prompt. A prompt longer than the last bucket loses its beginning (`count_cut` counts them).
      max_new_tokens: tokens per completion at most.
      n_samples: sampled completions per prompt; 0 gives the single greedy one.
      temperature: the logits are divided by it before sampling; greater than 0.
      seed: of the random streams.
      buckets: prompt lengths in tokens, ascending; a prompt is padded on the left to the first that holds it.
      batch_size: sequences decoded at once; short batches are filled up.
      eos_id: ends a completion.
      pad_id: fills what is empty; never read.
      compute_dtype: of the matrix products and the cache.
      greedy_first: with samples, puts the greedy completion before them, from the same prefill.
      what: name of the wait in the progress display.
      mesh: where the parameters are sharded (`sharding.inference_shardings`): prompts lie over data and fsdp. Of several processes, all call this
        with the same arguments and get the same tokens. None for one device.
    Returns:
      Per prompt, per completion, the token ids without the end-of-text token.
    Raises:
      ValueError: an empty prompt or a number out of range.
    """
    _check(prompts, max_new_tokens, n_samples, temperature, buckets, batch_size)
    config, params = model if isinstance(model, tuple) else (model.config, model.params)
    greedy = greedy_first or n_samples == 0
    n_completions = n_samples + greedy
    shards = 1 if mesh is None else row_shards(mesh)
    rows = max(1, batch_size // n_completions // shards) * shards
    completions: list[list[list[int]]] = [[] for _ in prompts]
    waiting: collections.deque[tuple[list[int], Array]] = collections.deque()
    with Progress(what, total=len(prompts) * n_completions, unit="completions") as progress:

        def collect() -> None:
            indices, out = waiting.popleft()
            for index, rows_of_prompt in zip(indices, arrays.to_host(out)):
                completions[index] = [_until(row.tolist(), eos_id) for row in rows_of_prompt]
            progress.update(len(indices) * n_completions)

        for bucket, indices in _batches(prompts, buckets, rows):
            held = [prompts[index] for index in indices]
            uniforms = _uniforms(held, rows, n_samples, greedy, max_new_tokens, seed)
            tokens, valid = _padded(held, bucket, rows, pad_id)
            batch = (tokens, valid, uniforms, np.arange(rows) < len(indices))
            if mesh is not None:
                batch = tuple(arrays.put(x, NamedSharding(mesh, spec)) for x, spec in zip(batch, _BATCH_SPECS, strict=True))
            waiting.append((indices, complete(config, max_new_tokens, n_samples, greedy, jnp.dtype(compute_dtype), params, *batch,
                                              np.float32(temperature), np.int32(eos_id), np.int32(pad_id))))
            if len(waiting) == IN_FLIGHT:
                collect()
        while waiting:
            collect()
    return completions


def continue_text(model: Any, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The continuation of a text, without template and stop strings, in float32.

    Args:
      model: a LoadedModel.
      temperature: 0 takes the likeliest token every time.
      seed: of the random stream; the same gives the same text.
    Raises:
      UserError: the model has no tokenizer, or the prompt no token.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer.json, so no text can be generated; put the model's tokenizer there.")
    tokens = model.tokenizer.encode(prompt)
    if not tokens:
        raise UserError("--prompt is empty; give at least one character to continue from.")
    [[completion]] = generate(
        model,
        [tokens],
        max_new_tokens=max_new_tokens,
        n_samples=1 if temperature > 0 else 0,
        temperature=temperature or 1.0,
        seed=seed,
        buckets=(len(tokens),),
        batch_size=1,
        eos_id=model.tokenizer.eos_id,
        pad_id=model.tokenizer.pad_id,
        compute_dtype=jnp.float32,
    )
    return model.tokenizer.decode(completion)


def count_cut(prompts: Sequence[Sequence[int]], buckets: tuple[int, ...]) -> int:
    """How many prompts are longer than the last bucket and so lose their beginning."""
    return sum(len(prompt) > buckets[-1] for prompt in prompts)


def cut_at_stop(text: str) -> str:
    """A completion's text up to the first stop string. Source: paper section 5.1."""
    return text[: min((position for stop in STOP_STRINGS if (position := text.find(stop)) >= 0), default=len(text))]


# ------------------------------------------------------------------------------------------------------------------------ on the device


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def complete(config: ModelConfig, max_new_tokens: int, n_samples: int, greedy: bool, compute_dtype: Any, params: Any,
             tokens_PxS: Int[Array, "p s"], valid_PxS: Bool[Array, "p s"], uniform_NxB: Float[Array, "n b"], filled_P: Bool[Array, " p"],
             temperature: Float[Array, ""], eos_id: Int[Array, ""], pad_id: Int[Array, ""]) -> Int[Array, "p r n"]:
    """One batch: R completions of up to N tokens for each of P prompts, the greedy one first; `pad_id` follows the end-of-text token.

    The parameters are arguments, so one compiled program serves every model of the same shape. Rows that are not `filled` end at once.
    """
    n_prompts, n_rows = tokens_PxS.shape[0], n_samples + greedy
    logits_PxV, prompt, cache = read_prompts(config, params, tokens_PxS, valid_PxS, rows_per_prompt=n_rows, slots=max_new_tokens,
                                             compute_dtype=compute_dtype)
    is_greedy_B = jnp.tile(jnp.arange(n_rows) < greedy, n_prompts)

    def choose(step, logits_BxV):
        greedy_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        if n_samples == 0:
            return greedy_B
        return jnp.where(is_greedy_B, greedy_B, draw(logits_BxV / temperature, uniform_NxB[step]))

    def unfinished(state):
        step, _, ended_B, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(ended_B)

    def advance(state):
        step, token_B, ended_B, out_NxB, cache = state
        logits_BxV, cache = decode(config, params, token_B, step - 1, prompt, cache, compute_dtype=compute_dtype)
        token_B = jnp.where(ended_B, pad_id, choose(step, logits_BxV))
        return step + 1, token_B, ended_B | (token_B == eos_id), out_NxB.at[step].set(token_B), cache

    token_B = choose(0, jnp.repeat(logits_PxV, n_rows, axis=0))
    out_NxB = jnp.full((max_new_tokens, n_prompts * n_rows), pad_id, jnp.int32).at[0].set(token_B)
    ended_B = (token_B == eos_id) | ~jnp.repeat(filled_P, n_rows)
    out_NxB = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token_B, ended_B, out_NxB, cache))[3]
    return out_NxB.T.reshape(n_prompts, n_rows, max_new_tokens)


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


# -------------------------------------------------------------------------------------------------------------------------- on the host


def _batches(prompts: Sequence[Sequence[int]], buckets: tuple[int, ...], rows: int) -> list[tuple[int, list[int]]]:
    """(bucket, indices of at most `rows` prompts) pairs that together hold every prompt once."""
    by_bucket: dict[int, list[int]] = {bucket: [] for bucket in buckets}
    for index, prompt in enumerate(prompts):
        by_bucket[next((bucket for bucket in buckets if len(prompt) <= bucket), buckets[-1])].append(index)
    return [(bucket, held[start : start + rows]) for bucket, held in by_bucket.items() for start in range(0, len(held), rows)]


def _padded(prompts: list[Sequence[int]], bucket: int, rows: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, bucket] padded on the left, and which of them are real."""
    tokens = np.full((rows, bucket), pad_id, np.int32)
    valid = np.zeros((rows, bucket), bool)
    for row, prompt in enumerate(prompts):
        kept = prompt[-bucket:]
        tokens[row, -len(kept) :] = kept
        valid[row, -len(kept) :] = True
    return tokens, valid


def _uniforms(prompts: list[Sequence[int]], rows: int, n_samples: int, greedy: bool, max_new_tokens: int, seed: int) -> np.ndarray:
    """[N, B] in [0, 1), float32: the n-th number of a sample's stream depends on seed, prompt, sample and n alone.

    Raw Philox words, whose sequence NumPy promises to keep. Drawn here because the same on the device costs seconds of compilation.
    """
    uniforms = np.zeros((rows, greedy + n_samples, max_new_tokens), np.float32)
    for row, prompt in enumerate(prompts):
        prefix = hashlib.sha256(np.asarray([seed, *prompt], "<i8").tobytes())
        for sample in range(n_samples):
            digest = prefix.copy()
            digest.update(sample.to_bytes(8, "little"))
            words = np.random.Philox(key=int.from_bytes(digest.digest()[:16], "little")).random_raw(max_new_tokens)
            uniforms[row, greedy + sample] = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return uniforms.reshape(-1, max_new_tokens).T


def _until(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, n_samples: int, temperature: float, buckets: tuple[int, ...],
           batch_size: int) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; a prompt needs at least one token to predict from.")
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("n_samples", n_samples, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value} is below {least}; set it to {least} or more.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0; use n_samples=0 for the greedy completion.")
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(f"buckets={buckets} must be prompt lengths in ascending order, such as (32, 64).")
