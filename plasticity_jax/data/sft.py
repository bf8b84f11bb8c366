"""Turns task rows into fine-tuning batches, with loss on the response only. Rows are grouped by length, in random order, or packed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from plasticity_jax.data.tasks import Example, format_prompt
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress

if TYPE_CHECKING:
    from plasticity_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
Indices = Int[np.ndarray, "_"]  # of rows

CHUNK_ROWS = 4096  # rows tokenized per call: enough to use all cores

log = logging.getLogger("plasticity_jax")


@dataclass(frozen=True, eq=False)
class SftRows:
    """Encoded rows.

    Attributes:
      tokens: per row, int32: prompt, response and, unless cut off, end of text.
      response_starts: per row, the position of the response's first token.
      n_cut: rows that were truncated.
      n_dropped: rows dropped because they were too long.
      n_empty: rows dropped because their response was empty.
      n_late: rows whose answer comes after the first `answer_limit` tokens of their response.
    """

    tokens: Sequence[Int[np.ndarray, "_"]]
    response_starts: Sequence[int]
    n_cut: int = 0
    n_dropped: int = 0
    n_empty: int = 0
    n_late: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; a row of n tokens gives n - 1 inputs."""
        return [len(row) for row in self.tokens]


def encode_examples(
    examples: Sequence[Example], tokenizer: "Tokenizer", *, max_length: int, too_long: str = "cut", answer_limit: int | None = None
) -> SftRows:
    """Encodes rows in the study's template: no beginning of text, and an end of text after the response.

    Tokenizes prompt and response separately, so that generation sees the same prompt tokens as training. Drops rows with an empty response.
    Logs how many rows were truncated or dropped, and warns of answers that a completion has no room for.

    Args:
      max_length: maximum tokens of a row, end of text included, at least 2 (`cutoff_len` in LLaMA-Factory).
      too_long: what to do with longer rows.
        "cut": truncate the prompt at its beginning, as in generation, because the question is at its end. A response that does not fit beside
        one token of the prompt is truncated at its end.
        "cut-both": truncate both at their ends, as in `split_max_length`. Drop rows that would have no response left.
        "drop": drop them.
      answer_limit: most tokens of a completion when the task is evaluated; None: no limit.
    Source: paper section 4.1.
    """
    tokens, response_starts, n_cut, n_dropped, n_empty, n_late = [], [], 0, 0, 0, 0
    end = np.array([tokenizer.eos_id], np.int32)
    with Progress("tokenize rows", total=len(examples), unit="rows") as progress:
        for start in range(0, len(examples), CHUNK_ROWS):
            chunk = examples[start : start + CHUNK_ROWS]
            prompts = tokenizer.encode_arrays([format_prompt(example.prompt) for example in chunk])
            responses = tokenizer.encode_arrays([example.response for example in chunk])
            for example, prompt, response in zip(chunk, prompts, responses, strict=True):
                if not example.response.strip():
                    n_empty += 1
                    continue
                late = _answer_is_cut(example, response, tokenizer, answer_limit)
                response = np.concatenate([response, end])
                if len(prompt) + len(response) > max_length:
                    prompt, response = _shorten(prompt, response, max_length, too_long)
                    if not len(response):
                        n_dropped += 1
                        continue
                    n_cut += 1
                tokens.append(np.concatenate([prompt, response]))
                response_starts.append(len(prompt))
                n_late += late
            progress.update(len(chunk))
    for count, what in (
        (n_cut, f"of more than {max_length:,} tokens lost a part (finetune.too_long={too_long!r})"),
        (n_dropped, f"of more than {max_length:,} tokens were left out (finetune.too_long={too_long!r})"),
        (n_empty, "without a response were left out"),
    ):
        if count:
            log.info("%s of %s rows %s", f"{count:,}", f"{len(examples):,}", what)
    if n_late:
        said = "%s of %s rows give their answer after max_new_tokens = %d tokens, where evaluation cuts completions"
        log.warning(said, f"{n_late:,}", f"{len(examples):,}", answer_limit)
    return SftRows(tokens, response_starts, n_cut, n_dropped, n_empty, n_late)


def _answer_is_cut(example: Example, response: Indices, tokenizer: "Tokenizer", limit: int | None) -> bool:
    """Whether a response has its answer, and its first `limit` tokens do not."""
    if limit is None or len(response) <= limit or example.answer not in example.response:
        return False
    return example.answer not in tokenizer.decode(response[:limit].tolist())


def _shorten(prompt: np.ndarray, response: np.ndarray, max_length: int, too_long: str) -> tuple[np.ndarray, np.ndarray]:
    """Truncates a row. An empty response means that the row is dropped."""
    if too_long == "cut":
        response = response[: max_length - 1]
        return prompt[-(max_length - len(response)) :], response
    n_prompt, n_response = split_max_length(len(prompt), len(response), max_length) if too_long == "cut-both" else (0, 0)
    return prompt[:n_prompt], response[:n_response]


def split_max_length(n_prompt: int, n_response: int, max_length: int) -> tuple[int, int]:
    """Divides `max_length` tokens between prompt and response.

    A side that takes less than half of the row stays whole, the response first. Two longer sides are cut in proportion. The response's part is
    rounded down, so nothing is left of it beside a prompt more than `max_length` times as long.

    Args:
      n_prompt, n_response: tokens, with the template in the prompt and the end of text in the response.
    Returns:
      (tokens of the prompt, tokens of the response), at most `max_length` together.
    Source: `infer_seqlen` of LLaMA-Factory, with which the study fine-tuned.
    """
    if 2 * n_response < max_length:
        most = max_length
    elif 2 * n_prompt < max_length:
        most = max_length - n_prompt
    else:
        most = int(max_length * (n_response / (n_prompt + n_response)))
    n_response = min(n_response, most)
    return min(n_prompt, max_length - n_response), n_response


def plan(
    lengths: Sequence[int] | np.ndarray, *, buckets: Sequence[int], batch_size: int, epochs: int, seed: int, group_by_length: bool = True
) -> list[tuple[int, Indices]]:
    """Plans the batches of a whole fine-tuning run. A pure function of its arguments.

    Each epoch takes every row exactly once, in its own order, and has the same number of batches. Grouped by length, a row goes to the smallest
    bucket that fits; the batches of all buckets are shuffled, and the last one of a bucket may be short. Otherwise a batch takes the next rows in
    the smallest bucket that fits its longest row, and only the epoch's last batch may be short, as in the Hugging Face Trainer.

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
    needed = _inputs(lengths, int(edges[-1]))
    bucket_of_row = np.searchsorted(edges, needed)
    batches = []
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(needed))
        if not group_by_length:
            parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            batches += [(int(edges[bucket_of_row[part].max()]), part) for part in parts]
            continue
        of_epoch = []
        for bucket, bucket_length in enumerate(edges.tolist()):
            members = order[bucket_of_row[order] == bucket]
            of_epoch += [(bucket_length, members[start : start + batch_size]) for start in range(0, len(members), batch_size)]
        batches += [of_epoch[position] for position in rng.permutation(len(of_epoch))]
    return batches


def plan_packed(
    lengths: Sequence[int] | np.ndarray, *, sequence_length: int, batch_size: int, epochs: int, seed: int
) -> list[tuple[int, list[Indices]]]:
    """Plans the packed batches of a whole fine-tuning run. A pure function of its arguments.

    Each epoch takes every row exactly once, in its own random order, and puts it into the fullest open sequence that fits it (best fit). It then
    shuffles the sequences. The epoch's last batch may be short. Epochs may differ in their number of batches.

    Args:
      lengths: tokens of each row.
      sequence_length: model inputs of a sequence; a row of n tokens needs n - 1.
      batch_size: sequences of a full batch.
    Returns:
      (sequence length, per sequence the indices of its rows) of each batch.
    Raises:
      UserError: a row is longer than a sequence.
    """
    needed = _inputs(lengths, sequence_length).tolist()
    batches = []
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        sequences = _best_fit(needed, rng.permutation(len(needed)).tolist(), sequence_length)
        mixed = [np.array(sequences[position]) for position in rng.permutation(len(sequences))]
        batches += [(sequence_length, mixed[start : start + batch_size]) for start in range(0, len(mixed), batch_size)]
    return batches


def _best_fit(needed: list[int], order: list[int], sequence_length: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]  # sequences that have exactly this much room left
    rooms = 0  # bit r is set if by_room[r] is not empty, which finds the smallest sufficient room without a search
    for row in order:
        large_enough = rooms >> needed[row] << needed[row]
        if large_enough:
            room = (large_enough & -large_enough).bit_length() - 1
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            sequences[sequence].append(row)
        else:
            room, sequence = sequence_length, len(sequences)
            sequences.append([row])
        by_room[room - needed[row]].append(sequence)
        rooms |= 1 << (room - needed[row])
    return sequences


def _inputs(lengths: Sequence[int] | np.ndarray, longest: int) -> np.ndarray:
    needed = np.asarray(lengths, dtype=np.int64) - 1
    if needed.size and needed.max() > longest:
        raise UserError(
            f"a row of {needed.max() + 1} tokens does not fit the longest bucket, {longest} inputs; "
            f"add a bucket of {needed.max()} or cut rows to {longest + 1} tokens."
        )
    return needed


def sft_batch(
    rows: SftRows, sequences: Sequence[int | Indices] | np.ndarray, *, bucket_length: int, batch_size: int, pad_id: int, loss_parts: int = 1
) -> Batch:
    """The arrays of one batch, [batch_size, bucket_length] each.

    `tokens`, `targets`, `segment_ids` (0 padding, otherwise the row's number within its sequence, from 1) and `positions` (from 0 in every row) are
    int32; `loss_mask` is float32, 1 where the *target* belongs to the response, its end of text included. Targets never cross from
    one row to the next. Everything after the last row is padding, with zero loss.

    Args:
      sequences: for each sequence the index of its row, or the indices of its rows.
      loss_parts: equal parts of the batch, in order. The loss is the mean of their means: a target's mask is scaled so that every part that has targets
        weighs alike, and their sum stays the number of targets. As in the Hugging Face Trainer up to transformers 4.46.1, where a part is a device's.
    """
    shape = (batch_size, bucket_length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    loss_mask, segment_ids, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for place, indices in enumerate(sequences):
        start = 0
        for segment, index in enumerate(np.atleast_1d(indices), 1):
            row = rows.tokens[index]
            end = start + len(row) - 1
            tokens[place, start:end], targets[place, start:end] = row[:-1], row[1:]
            segment_ids[place, start:end] = segment
            positions[place, start:end] = np.arange(end - start)
            # The input before the response's first token predicts that token.
            loss_mask[place, start + rows.response_starts[index] - 1 : end] = 1.0
            start = end
    if loss_parts > 1:
        counts = loss_mask.reshape(loss_parts, -1).sum(axis=1)
        weights = counts.sum() / np.count_nonzero(counts) / np.maximum(counts, 1)
        loss_mask *= np.repeat(weights.astype(np.float32), batch_size // loss_parts)[:, None]
    return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask, "segment_ids": segment_ids, "positions": positions}
