"""Pads rows of tokens to a few fixed batch shapes, so that a program compiles once per shape."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

T = TypeVar("T")

SHORTEST_BUCKET = 64  # tokens
IN_FLIGHT = 2  # batches at once: while the host reads one, the device computes the next


class PaddedBatch(NamedTuple):
    """Rows of similar length.

    Attributes:
      indices: the rows' positions among all rows, one per real row; the real rows come first.
      tokens: int32 [B, T].
      lengths: int32 [B], tokens of each row; 0 for the empty rows that complete a short batch.
    """

    indices: list[int]
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]


def padded_batches(
    rows: Sequence[Sequence[int]],
    *,
    buckets: Sequence[int],
    batch_size: int = 0,
    tokens_per_batch: int = 0,
    multiple_of: int = 1,
    pad_id: int = 0,
    left: bool = False,
) -> Iterator[PaddedBatch]:
    """Yields batches that contain every row once, padded to the smallest bucket that fits. Shorter buckets come first.

    Args:
      rows: token ids, at least one and at most the last bucket's length each.
      buckets: lengths to pad to, in tokens, ascending.
      batch_size: rows per batch.
      tokens_per_batch: tokens per batch including padding, instead of `batch_size`. A batch has at least one row.
      multiple_of: the rows per batch are rounded up to a multiple of this.
      pad_id: the padding token.
      left: pad on the left.
    Raises:
      ValueError: a row is empty or too long.
    """
    lengths = [len(row) for row in rows]
    if rows and not 1 <= min(lengths) <= max(lengths) <= buckets[-1]:
        raise ValueError(f"rows have {min(lengths)} to {max(lengths)} tokens; each must have 1 to {buckets[-1]}.")
    bucket_of_row = np.searchsorted(buckets, lengths)
    for bucket, length in enumerate(buckets):
        in_bucket = np.flatnonzero(bucket_of_row == bucket).tolist()
        size = batch_size or max(1, tokens_per_batch // length)
        size = -(-size // multiple_of) * multiple_of
        for start in range(0, len(in_bucket), size):
            indices = in_bucket[start : start + size]
            yield PaddedBatch(indices, *pad_rows([rows[i] for i in indices], length=length, batch_size=size, pad_id=pad_id, left=left))


def pad_rows(
    rows: Sequence[Sequence[int]], *, length: int, batch_size: int, pad_id: int = 0, left: bool = False
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """int32 tokens [batch_size, length] and lengths [batch_size] of at most `batch_size` rows, followed by empty rows."""
    tokens, lengths = np.full((batch_size, length), pad_id, np.int32), np.zeros(batch_size, np.int32)
    for place, row in enumerate(rows):
        begin = length - len(row) if left else 0
        tokens[place, begin : begin + len(row)], lengths[place] = row, len(row)
    return tokens, lengths


def length_buckets(max_length: int, first: Sequence[int] = (SHORTEST_BUCKET,)) -> tuple[int, ...]:
    """Lengths to pad rows to, in tokens: `first`, then doublings of the last, none above `max_length`, which is the last bucket."""
    buckets = [length for length in first if length < max_length]
    while buckets and 2 * buckets[-1] < max_length:
        buckets.append(2 * buckets[-1])
    return (*buckets, max_length)


def power_of_two_buckets(rows: Sequence[Sequence[int]], shortest: int) -> tuple[int, ...]:
    """Powers of two from `shortest` on, the last of which holds the longest row. A row's bucket does not depend on the other rows."""
    longest = max(map(len, rows), default=1)
    return length_buckets(max(shortest, 1 << (longest - 1).bit_length()), (shortest,))


def keep_in_flight(results: Iterable[T], depth: int = IN_FLIGHT) -> Iterator[T]:
    """Yields the same results, each once `depth` have been dispatched, so that the device stays busy while the host reads one."""
    waiting: collections.deque[T] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == depth:
            yield waiting.popleft()
    yield from waiting
