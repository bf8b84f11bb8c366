"""Log-likelihoods of continuations: how probable a model finds one text after another."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.batching import length_buckets, padded_batches, power_of_two_buckets
from plasticity_jax.model.forward import Batch, Forward
from plasticity_jax.model.layers import project
from plasticity_jax.parallel.sharding import ROWS, constrain

MIN_LENGTH = 32  # shortest bucket, in tokens; shorter batches are dominated by overhead


class Likelihood(NamedTuple):
    """How probable a model finds one continuation.

    Attributes:
      total: sum of the log-probabilities of its tokens, in nats.
      greedy: whether every token is the most likely one at its position.
      n_tokens: number of tokens in `total`.
      cut: whether the pair was too long and lost its beginning.
    """

    total: float
    greedy: bool
    n_tokens: int
    cut: bool


def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    forward: Forward,
    batch_size: int,
    max_length: int | None = None,
    what: str,
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context.

    A pair is padded on the right to a length that depends on this pair only, and batches have fixed shapes. So for the same `batch_size` a pair's
    result does not depend on the others, and at most two programs are compiled per length.

    Args:
      model: a loaded model (with `.config` and `.params`), or the pair (config, params).
      pairs: (context, continuation) as token ids, at least one token each.
      forward: how to run the model; the softmax is float32.
      batch_size: pairs per batch; short batches are filled up.
      max_length: maximum number of tokens that the model reads; the last token of a pair is predicted, not read. A longer pair loses tokens from its
        beginning: from the context first, then from the continuation, whose lost tokens do not count. None for no limit.
      what: label of the progress display.
    Returns:
      One for each pair, in order; on every process.
    Raises:
      ValueError: an empty context or continuation, or a number out of range.
    """
    _check(pairs, batch_size, max_length)
    config, params = model if isinstance(model, tuple) else (model.config, model.params)
    kept = [_last(context, continuation, max_length) for context, continuation in pairs]
    batches = _batches(kept, forward.batch_size(batch_size), max_length)
    results: dict[int, Likelihood] = {}
    for indices, out in forward.run(_score, (config,), params, batches, what=what, total=len(pairs), unit="continuations"):
        for index, log_probs, is_top in zip(indices, *out):
            tokens, n = kept[index]
            cut = len(tokens) < sum(map(len, pairs[index]))
            results[index] = Likelihood(float(np.sum(log_probs[:n], dtype=np.float64)), bool(is_top[:n].all()), n, cut)
    return [results[index] for index in range(len(pairs))]


def _score(forward: Forward, config: ModelConfig, params: Any, batch: Any) -> tuple[Float[Array, "b c"], Bool[Array, "b c"]]:
    """Log-probability of each target after the token at its place, and whether it is the most likely. Logits exist at the places only."""
    x_BxTxD, _ = forward.hidden_states(config, params, batch["tokens"])
    x_BxCxD = jnp.take_along_axis(x_BxTxD, batch["places"][..., None], axis=1)
    kernel_DxV, targets_BxC = forward.output_kernel(config, params), batch["targets"]
    chunks = math.gcd(forward.loss_chunks(config, *batch["tokens"].shape), targets_BxC.shape[1])

    def of_part(part):
        x_BxCxD, targets_BxC = part
        logits_BxCxV = project(x_BxCxD, kernel_DxV, jnp.dtype(forward.compute_dtype), out_dtype=jnp.float32)
        logits_BxCxV = constrain(forward.mesh, logits_BxCxV, ROWS, None, "tensor")
        chosen_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
        return chosen_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1), jnp.argmax(logits_BxCxV, axis=-1) == targets_BxC

    if chunks == 1:
        return of_part((x_BxCxD, targets_BxC))
    parts = tuple(jnp.stack(jnp.split(x, chunks, axis=1)) for x in (x_BxCxD, targets_BxC))
    log_probs, is_top = (jnp.concatenate(list(of_parts), axis=1) for of_parts in jax.lax.map(of_part, parts))
    return log_probs, is_top


def lower_likelihoods(forward: Forward, config: ModelConfig, params: Any, *, batch_size: int, max_length: int) -> Any:
    """The program of `log_likelihoods` for continuations as long as what the model reads, lowered for the mesh's devices."""
    shape = (forward.batch_size(batch_size), max_length)
    return forward.lower(_score, (config,), params, {"tokens": shape, "places": shape, "targets": shape})


# -------------------------------------------------------------------------------------------------------------------------- on the host


def _last(context: Sequence[int], continuation: Sequence[int], max_length: int | None) -> tuple[list[int], int]:
    """The tokens kept of a pair, and the number of tokens at their end that are scored."""
    tokens = [*context, *continuation]
    if max_length is not None:
        tokens = tokens[-(max_length + 1) :]  # the last token is predicted and not read
    return tokens, min(len(continuation), len(tokens) - 1)


def _batches(kept: Sequence[tuple[list[int], int]], rows: int, max_length: int | None) -> Iterator[tuple[list[int], Batch]]:
    """Indices of the pairs of a batch; its tokens [rows, length], and places and targets [rows, width]. The last token of a pair is not read."""
    for short in (False, True):  # whether the continuation fits the narrow width
        group = [index for index, (_, n) in enumerate(kept) if (n <= MIN_LENGTH) == short]
        inputs = [kept[index][0][:-1] for index in group]
        buckets = power_of_two_buckets(inputs, MIN_LENGTH) if max_length is None else length_buckets(max_length, (MIN_LENGTH,))
        for places_in_group, tokens, lengths in padded_batches(inputs, buckets=buckets, batch_size=rows):
            indices = [group[place] for place in places_in_group]
            width = min(tokens.shape[1], MIN_LENGTH) if short else tokens.shape[1]
            places, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
            for row, index in enumerate(indices):
                of_pair, n = kept[index]
                places[row, :n] = np.arange(lengths[row] - n, lengths[row])
                targets[row, :n] = of_pair[-n:]
            yield indices, {"tokens": tokens, "places": places, "targets": targets}


def _check(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, max_length: int | None) -> None:
    for index, pair in enumerate(pairs):
        for name, tokens in zip(("context", "continuation"), pair, strict=True):
            if len(tokens) == 0:
                raise ValueError(f"the {name} of pair {index} is empty; give it at least one token, such as the end-of-text token.")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1; set it to 1 or more.")
