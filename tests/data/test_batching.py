"""Padded batches hold every row once, in few shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data.batching import keep_in_flight, length_buckets, padded_batches, power_of_two_buckets

ROWS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=40), max_size=30)


@given(ROWS, st.integers(1, 7), st.booleans())
def test_every_row_is_there_once_whole_and_padded_on_the_side_asked_for(rows, batch_size, left):
    seen = []
    for indices, tokens, lengths in padded_batches(rows, buckets=(4, 16, 40), batch_size=batch_size, pad_id=-1, left=left):
        assert tokens.shape in {(batch_size, 4), (batch_size, 16), (batch_size, 40)} and tokens.dtype == lengths.dtype == np.int32
        assert lengths[len(indices) :].sum() == 0 and (tokens[len(indices) :] == -1).all()
        for row, length, index in zip(tokens.tolist(), lengths, indices):
            padding = [-1] * (len(row) - length)
            assert row == (padding + rows[index] if left else rows[index] + padding)
            assert len(row) == next(bucket for bucket in (4, 16, 40) if len(rows[index]) <= bucket)
        seen += indices
    assert sorted(seen) == list(range(len(rows)))


def test_batches_of_a_number_of_tokens():
    rows = [[1]] * 9 + [[1] * 100]
    shapes = [batch.tokens.shape for batch in padded_batches(rows, buckets=(8, 128), tokens_per_batch=32)]
    assert shapes == [(4, 8)] * 3 + [(1, 128)]


def test_empty_and_long_rows_are_refused():
    for rows in ([[1], []], [[1], [1] * 9]):
        with pytest.raises(ValueError, match="each must have 1 to 8"):
            list(padded_batches(rows, buckets=(4, 8), batch_size=2))
    assert list(padded_batches([], buckets=(4, 8), batch_size=2)) == []


def test_buckets_double():
    assert length_buckets(2048) == (64, 128, 256, 512, 1024, 2048) and length_buckets(300) == (64, 128, 256, 300)
    assert length_buckets(40) == (40,) and length_buckets(200, (16, 24)) == (16, 24, 48, 96, 192, 200) and length_buckets(24, (16, 24)) == (16, 24)
    assert power_of_two_buckets([[1] * 33, [1]], 16) == (16, 32, 64) and power_of_two_buckets([[1] * 32], 16) == (16, 32)
    assert power_of_two_buckets([[1]], 16) == power_of_two_buckets([], 16) == (16,)


def test_results_come_in_order_after_the_next_is_dispatched():
    log = []

    def dispatched():
        for i in range(4):
            log.append(f"dispatch {i}")
            yield i

    for i in keep_in_flight(dispatched(), 2):
        log.append(f"read {i}")
    assert log == ["dispatch 0", "dispatch 1", "read 0", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3"]
