"""From task rows to fine-tuning batches: loss on the response alone, rows of like length together, in random order, or several in one sequence."""

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

CHUNK_ROWS = 4096  # rows tokenized in one call: enough to share the work among the cores

log = logging.getLogger("plasticity_jax")


@dataclass(frozen=True, eq=False)
class SftRows:
    """Encoded rows.

    Attributes:
      tokens: per row, prompt then response then end of text (unless cut); int32.
      response_starts: per row, the position of the response's first token.
      n_cut: rows that were longer than allowed and lost a part.
      n_dropped: rows left out because they were longer than allowed.
      n_empty: rows left out because their response holds no text.
    """

    tokens: Sequence[Int[np.ndarray, "_"]]
    response_starts: Sequence[int]
    n_cut: int = 0
    n_dropped: int = 0
    n_empty: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; a row of n tokens gives n - 1 inputs."""
        return [len(row) for row in self.tokens]


def encode_examples(examples: Sequence[Example], tokenizer: "Tokenizer", *, max_length: int, too_long: str = "cut") -> SftRows:
    """Encodes rows in the study's template: no token at the beginning, end of text after the response.

    Prompt and response are tokenized apart, so that generation sees the very prompt tokens of training. Rows whose response holds no text are left
    out. What was cut or left out is logged, a line for each kind.

    Args:
      max_length: tokens a row may have, end of text included, at least 2: LLaMA-Factory's `cutoff_len`.
      too_long: what becomes of longer rows.
        "cut": the prompt loses its beginning, as in generation, where the question stands at its end; a response that does not fit beside one token
        of the prompt loses its end.
        "cut-both": prompt and response lose their ends, in the shares of `split_max_length`.
        "drop": they are left out, as are the rows of "cut-both" of whose response nothing would be left.
    Source: paper section 4.1.
    """
    tokens, response_starts, n_cut, n_dropped, n_empty = [], [], 0, 0, 0
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
                response = np.concatenate([response, end])
                if len(prompt) + len(response) > max_length:
                    prompt, response = _shorten(prompt, response, max_length, too_long)
                    if not len(response):
                        n_dropped += 1
                        continue
                    n_cut += 1
                tokens.append(np.concatenate([prompt, response]))
                response_starts.append(len(prompt))
            progress.update(len(chunk))
    for count, what in (
        (n_cut, f"of more than {max_length:,} tokens lost a part (finetune.too_long={too_long!r})"),
        (n_dropped, f"of more than {max_length:,} tokens were left out (finetune.too_long={too_long!r})"),
        (n_empty, "without a response were left out"),
    ):
        if count:
            log.info("%s of %s rows %s", f"{count:,}", f"{len(examples):,}", what)
    return SftRows(tokens, response_starts, n_cut, n_dropped, n_empty)


def _shorten(prompt: np.ndarray, response: np.ndarray, max_length: int, too_long: str) -> tuple[np.ndarray, np.ndarray]:
    """What is left of a row that is too long; without a response, the row is left out."""
    if too_long == "cut":
        response = response[: max_length - 1]
        return prompt[-(max_length - len(response)) :], response
    n_prompt, n_response = split_max_length(len(prompt), len(response), max_length) if too_long == "cut-both" else (0, 0)
    return prompt[:n_prompt], response[:n_response]


def split_max_length(n_prompt: int, n_response: int, max_length: int) -> tuple[int, int]:
    """How many tokens of prompt and of response stay in a row of `max_length`.

    A side that takes less than half of the row stays whole, the response first; two longer sides are cut in proportion. The response's share is
    rounded down, so beside a prompt more than `max_length` times as long nothing is left of it.

    Args:
      n_prompt, n_response: tokens, those of the template with the prompt and the end of text with the response.
    Returns:
      (tokens of the prompt, tokens of the response), at most `max_length` together.
    Source: `infer_seqlen` of LLaMA-Factory, which the study fine-tuned with.
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
    """Which rows make up which batch, for the whole of a fine-tuning: a pure function of its arguments.

    Each epoch takes every row exactly once, in its own order. Grouped by length, a row goes to the smallest bucket that holds it; the batches of
    all buckets come in mixed order, and the last one of a bucket may be short. Otherwise a batch is the next rows of the order, in the smallest
    bucket that holds its longest row, and only the epoch's last one may be short, as in the Hugging Face Trainer. Every epoch has the same number
    of batches.

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
    """Which rows lie in which sequence of which batch, for the whole of a fine-tuning: a pure function of its arguments.

    Each epoch takes every row exactly once, in its own random order, and puts it into the fullest of the sequences begun that still holds it (best
    fit); the sequences then come in random order, and the epoch's last batch may be short. Epochs may differ in their number of batches.

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
    rooms = 0  # bit r is set where by_room[r] is not empty: the smallest room that is large enough is found without a search
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


def sft_batch(rows: SftRows, sequences: Sequence[int | Indices] | np.ndarray, *, bucket_length: int, batch_size: int, pad_id: int) -> Batch:
    """The arrays of one batch, [batch_size, bucket_length] each.

    `tokens`, `targets`, `segment_ids` (0 padding, otherwise the row's number within its sequence, from 1) and `positions` (from 0 in every row) are
    int32; `loss_mask` is float32, 1 where the *target* belongs to the response, its end of text included. No input of a row has its target in the
    next one. Places after the last row, and sequences beyond those given, are padding and count nowhere.

    Args:
      sequences: for each sequence the index of its row, or the indices of its rows.
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
    return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask, "segment_ids": segment_ids, "positions": positions}
