"""From task rows to fine-tuning batches: loss on the response alone, rows of like length together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from plasticity_jax.data.tasks import Example, format_prompt
from plasticity_jax.errors import UserError

if TYPE_CHECKING:
    from plasticity_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class SftRows:
    """Encoded rows.

    Attributes:
      tokens: per row, prompt then response then end of text (unless cut).
      response_starts: per row, the position of the response's first token.
      n_cut: rows that were longer than allowed and lost a part.
    """

    tokens: list[list[int]]
    response_starts: list[int]
    n_cut: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; a row of n tokens gives n - 1 inputs."""
        return [len(row) for row in self.tokens]


def encode_examples(examples: Sequence[Example], tokenizer: "Tokenizer", *, max_length: int) -> SftRows:
    """Encodes rows in the study's template: no token at the beginning, end of text after the response.

    Prompt and response are tokenised apart, so that generation sees the very prompt tokens of training.

    Args:
      max_length: tokens a row may have, at least 2. Of longer ones the prompt loses its beginning, as in generation, where the question stands at
        its end; a response that does not fit beside one token of the prompt loses its end.
    Source: paper section 4.1.
    """
    prompts = tokenizer.encode_batch([format_prompt(example.prompt) for example in examples])
    responses = tokenizer.encode_batch([example.response for example in examples])
    tokens, response_starts, n_cut = [], [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        response = [*response, tokenizer.eos_id]
        n_cut += len(prompt) + len(response) > max_length
        response = response[: max_length - 1]
        prompt = prompt[-(max_length - len(response)) :]
        tokens.append([*prompt, *response])
        response_starts.append(len(prompt))
    return SftRows(tokens, response_starts, n_cut)


def plan(lengths: Sequence[int] | np.ndarray, *, buckets: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Which rows make up which batch, for the whole of a fine-tuning: a pure function of its arguments.

    Each epoch takes every row exactly once, in its own order. A row goes to the smallest bucket that holds it; the batches of all buckets
    come in mixed order, and the last one of a bucket may be short. Every epoch has the same number of batches.

    Args:
      lengths: tokens of each row.
      buckets: batch lengths, in model inputs; a row of n tokens needs n - 1.
      batch_size: rows of a full batch.
    Returns:
      (bucket length, indices of the rows) of each batch.
    Raises:
      UserError: a row is longer than the longest bucket.
    """
    edges = np.array(sorted(buckets))
    needed = np.asarray(lengths, dtype=np.int64) - 1
    if needed.size and needed.max() > edges[-1]:
        raise UserError(f"a row of {needed.max() + 1} tokens does not fit the longest bucket, {edges[-1]} inputs; "
                        f"add a bucket of {needed.max()} or cut rows to {edges[-1] + 1} tokens.")
    bucket_of_row = np.searchsorted(edges, needed)
    batches = []
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(needed))
        of_epoch = []
        for bucket, bucket_length in enumerate(edges.tolist()):
            members = order[bucket_of_row[order] == bucket]
            of_epoch += [(bucket_length, members[start : start + batch_size]) for start in range(0, len(members), batch_size)]
        batches += [of_epoch[position] for position in rng.permutation(len(of_epoch))]
    return batches


def sft_batch(rows: SftRows, indices: Sequence[int] | np.ndarray, *, bucket_length: int, batch_size: int, pad_id: int) -> Batch:
    """The arrays of one batch, [batch_size, bucket_length] each.

    `tokens`, `targets`, `segment_ids` (0 padding, 1 otherwise) and `positions` are int32; `loss_mask` is float32, 1 where the *target* belongs
    to the response, its end of text included. Places after a row's end, and rows beyond `indices`, are padding and count nowhere.
    """
    shape = (batch_size, bucket_length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    loss_mask, segment_ids = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for place, index in enumerate(indices):
        row = rows.tokens[index]
        n_inputs = len(row) - 1
        tokens[place, :n_inputs], targets[place, :n_inputs] = row[:-1], row[1:]
        segment_ids[place, :n_inputs] = 1
        # The input before the response's first token predicts that token.
        loss_mask[place, rows.response_starts[index] - 1 : n_inputs] = 1.0
    positions = np.broadcast_to(np.arange(bucket_length, dtype=np.int32), shape) * segment_ids
    return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask, "segment_ids": segment_ids, "positions": positions}
