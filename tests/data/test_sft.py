"""Fine-tuning batches: what is masked, what is planned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity_jax.data.sft import SftRows, encode_examples, plan, sft_batch
from plasticity_jax.data.tasks import Example, build_task, format_prompt
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError

EXAMPLES = [
    Example(id=str(number), prompt=prompt, response=response, answer="x", source="generated", source_split="generated")
    for number, (prompt, response) in enumerate([
        ("47+85=?", "7+5=12 carry 1. The answer is 132."),
        ("A naïve film, <|endoftext|> and all 🎬\nGood?", "The answer is positive."),
        ("?", "y"),
    ])
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is the answer? The answer is positive. Human: Assistant: " * 20], 280)


def batch_of(rows, indices, *, bucket_length=200, batch_size=4):
    return sft_batch(rows, indices, bucket_length=bucket_length, batch_size=batch_size, pad_id=1)


def test_masked_targets_are_exactly_the_response_and_its_end(tokenizer):
    rows = encode_examples(EXAMPLES, tokenizer, max_length=200)
    batch = batch_of(rows, [0, 1, 2])
    assert rows.n_cut == 0
    for place, example in enumerate(EXAMPLES):
        masked = batch["targets"][place][batch["loss_mask"][place] == 1]
        assert masked[-1] == tokenizer.eos_id and tokenizer.eos_id not in masked[:-1]
        assert tokenizer.decode(masked[:-1]) == example.response
        unmasked = batch["tokens"][place][: np.argmax(batch["loss_mask"][place]) + 1]
        assert tokenizer.decode(unmasked) == format_prompt(example.prompt)


def test_inputs_are_the_row_shifted_by_one_and_the_rest_is_padding(tokenizer):
    rows = encode_examples(EXAMPLES, tokenizer, max_length=200)
    batch = batch_of(rows, [2, 0])
    for place, index in enumerate([2, 0]):
        n_inputs = len(rows.tokens[index]) - 1
        assert batch["tokens"][place, :n_inputs].tolist() == rows.tokens[index][:-1]
        assert batch["targets"][place, :n_inputs].tolist() == rows.tokens[index][1:]
        assert batch["positions"][place, :n_inputs].tolist() == list(range(n_inputs))
        assert (batch["segment_ids"][place, :n_inputs] == 1).all()
        for name, value in (("tokens", 1), ("targets", 1), ("segment_ids", 0), ("loss_mask", 0)):
            assert (batch[name][place, n_inputs:] == value).all()
    for name, value in (("tokens", 1), ("segment_ids", 0), ("loss_mask", 0)):
        assert (batch[name][2:] == value).all()
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "loss_mask": "float32", "segment_ids": "int32", "positions": "int32"}


def test_a_row_at_the_limit_is_whole(tokenizer):
    whole = encode_examples(EXAMPLES, tokenizer, max_length=200)
    assert encode_examples(EXAMPLES, tokenizer, max_length=max(whole.lengths)) == whole


def test_long_rows_lose_the_beginning_of_their_prompt_and_are_counted(tokenizer):
    whole = encode_examples(EXAMPLES, tokenizer, max_length=200)
    limit = whole.lengths[1] - 2
    cut = encode_examples(EXAMPLES, tokenizer, max_length=limit)
    assert cut.n_cut == sum(length > limit for length in whole.lengths) >= 1
    assert cut.tokens == [row[-limit:] for row in whole.tokens]
    batch = batch_of(cut, [1], bucket_length=limit - 1)
    assert batch["loss_mask"][0].sum() == whole.lengths[1] - whole.response_starts[1]


def test_a_response_that_does_not_fit_loses_its_end(tokenizer):
    whole = encode_examples(EXAMPLES[:1], tokenizer, max_length=200)
    cut = encode_examples(EXAMPLES[:1], tokenizer, max_length=5)
    start = whole.response_starts[0]
    assert cut.tokens == [whole.tokens[0][start - 1 : start + 4]] and cut.response_starts == [1] and cut.n_cut == 1


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 65), max_size=70), batch_size=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 2**31),
       short_buckets=st.sets(st.integers(1, 63), max_size=4))
def test_plan_takes_every_row_once_per_epoch_in_the_smallest_bucket(lengths, batch_size, epochs, seed, short_buckets):
    buckets = (*short_buckets, 64)
    batches = plan(lengths, buckets=buckets, batch_size=batch_size, epochs=epochs, seed=seed)
    per_epoch = len(batches) // epochs
    for epoch in range(epochs):
        of_epoch = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(index for _, indices in of_epoch for index in indices.tolist()) == list(range(len(lengths)))
        for bucket_length in buckets:
            short = [len(indices) for length, indices in of_epoch if length == bucket_length and len(indices) < batch_size]
            assert len(short) <= 1
    for bucket_length, indices in batches:
        assert 1 <= len(indices) <= batch_size
        for index in indices.tolist():
            assert bucket_length == min(bucket for bucket in buckets if bucket >= lengths[index] - 1)
    again = plan(lengths, buckets=buckets, batch_size=batch_size, epochs=epochs, seed=seed)
    assert [(length, indices.tolist()) for length, indices in batches] == [(length, indices.tolist()) for length, indices in again]


def test_plan_mixes_rows_and_buckets_and_differs_between_epochs_and_seeds():
    lengths = [10] * 100 + [30] * 100
    as_lists = lambda batches: [(length, indices.tolist()) for length, indices in batches]
    batches = as_lists(plan(lengths, buckets=(16, 32), batch_size=10, epochs=2, seed=0))
    other = as_lists(plan(lengths, buckets=(16, 32), batch_size=10, epochs=2, seed=1))
    bucket_order = [length for length, _ in batches[:20]]
    assert bucket_order not in (sorted(bucket_order), sorted(bucket_order, reverse=True))
    assert batches[:20] != batches[20:] and batches != other
    assert all(indices != sorted(indices) for _, indices in batches)


def test_a_row_beyond_the_longest_bucket_is_refused():
    plan([33], buckets=(16, 32), batch_size=4, epochs=1, seed=0)
    with pytest.raises(UserError, match="a row of 34 tokens does not fit the longest bucket, 32 inputs"):
        plan([33, 34], buckets=(16, 32), batch_size=4, epochs=1, seed=0)


def test_addition_rows_are_short(tokenizer):
    # A tokenizer that learned no merge useful for sums: the worst case.
    rows, _ = build_task("addition2", None, train_rows=200, test_rows=1, held_out_share=0.1, seed=0)
    assert max(encode_examples(rows, tokenizer, max_length=200).lengths) <= 84


def test_rows_count():
    assert len(SftRows(tokens=[[1, 2], [3, 4]], response_starts=[1, 1], n_cut=0)) == 2
