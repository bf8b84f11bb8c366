"""Fine-tuning batches: what is masked, what is planned, what is packed."""

import hashlib
import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data.sft import SftRows, encode_examples, plan, plan_packed, sft_batch, split_max_length
from plasticity_jax.data.tasks import Example, build_task, format_prompt
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError

EXAMPLES = [
    Example(id=str(number), prompt=prompt, response=response, answer="x", source="generated", source_split="generated")
    for number, (prompt, response) in enumerate(
        [
            ("47+85=?", "7+5=12 carry 1. The answer is 132."),
            ("A naïve film, <|endoftext|> and all 🎬\nGood?", "The answer is positive."),
            ("?", "y"),
        ]
    )
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is the answer? The answer is positive. Human: Assistant: " * 20], 280)


def batch_of(rows, indices, *, bucket_length=200, batch_size=4):
    return sft_batch(rows, indices, bucket_length=bucket_length, batch_size=batch_size, pad_id=1)


def as_lists(rows):
    return [row.tolist() for row in rows.tokens], list(rows.response_starts)


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
        assert batch["tokens"][place, :n_inputs].tolist() == rows.tokens[index][:-1].tolist()
        assert batch["targets"][place, :n_inputs].tolist() == rows.tokens[index][1:].tolist()
        assert batch["positions"][place, :n_inputs].tolist() == list(range(n_inputs))
        assert (batch["segment_ids"][place, :n_inputs] == 1).all()
        for name, value in (("tokens", 1), ("targets", 1), ("segment_ids", 0), ("loss_mask", 0)):
            assert (batch[name][place, n_inputs:] == value).all()
    for name, value in (("tokens", 1), ("segment_ids", 0), ("loss_mask", 0)):
        assert (batch[name][2:] == value).all()
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_mask": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }


def test_a_row_at_the_limit_is_whole(tokenizer):
    whole = encode_examples(EXAMPLES, tokenizer, max_length=200)
    for too_long in ("cut", "cut-both", "drop"):
        again = encode_examples(EXAMPLES, tokenizer, max_length=max(whole.lengths), too_long=too_long)
        assert as_lists(again) == as_lists(whole) and (again.n_cut, again.n_dropped, again.n_empty) == (0, 0, 0)


def test_long_rows_lose_the_beginning_of_their_prompt_and_are_counted(tokenizer):
    whole = encode_examples(EXAMPLES, tokenizer, max_length=200)
    limit = whole.lengths[1] - 2
    cut = encode_examples(EXAMPLES, tokenizer, max_length=limit)
    assert cut.n_cut == sum(length > limit for length in whole.lengths) >= 1
    assert as_lists(cut)[0] == [row[-limit:].tolist() for row in whole.tokens]
    batch = batch_of(cut, [1], bucket_length=limit - 1)
    assert batch["loss_mask"][0].sum() == whole.lengths[1] - whole.response_starts[1]


def test_a_response_that_does_not_fit_loses_its_end(tokenizer):
    whole = encode_examples(EXAMPLES[:1], tokenizer, max_length=200)
    cut = encode_examples(EXAMPLES[:1], tokenizer, max_length=5)
    start = whole.response_starts[0]
    assert as_lists(cut) == ([whole.tokens[0][start - 1 : start + 4].tolist()], [1]) and cut.n_cut == 1


def test_both_sides_lose_their_ends_by_the_rule_of_llama_factory(tokenizer):
    whole = encode_examples(EXAMPLES, tokenizer, max_length=200)
    limit = min(whole.lengths[:2]) - 4
    cut = encode_examples(EXAMPLES, tokenizer, max_length=limit, too_long="cut-both")
    assert cut.n_cut == 2 and cut.n_dropped == 0
    for row, start, ours, our_start in zip(whole.tokens, whole.response_starts, cut.tokens, cut.response_starts, strict=True):
        n_prompt, n_response = infer_seqlen(start, len(row) - start, limit)
        assert ours.tolist() == [*row[:start][:n_prompt], *row[start:][:n_response]] and our_start == n_prompt


def infer_seqlen(source_len: int, target_len: int, cutoff_len: int) -> tuple[int, int]:
    """The rule in exact arithmetic, case by case as in the study's trainer."""
    if source_len + target_len <= cutoff_len:
        return source_len, target_len
    if target_len < cutoff_len / 2:
        return cutoff_len - target_len, target_len
    kept = cutoff_len - source_len if source_len < cutoff_len / 2 else cutoff_len * target_len // (source_len + target_len)
    return cutoff_len - kept, kept


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ((1800, 200), (1800, 200)),  # fits
        ((3000, 1000), (1048, 1000)),  # the response is below half, and whole
        ((1000, 3000), (1000, 1048)),  # the prompt is below half, and whole
        ((1024, 1025), (1024, 1024)),  # both are cut: 2048 * 1025 / 2049 = 1024.5
        ((3072, 1024), (1536, 512)),
        ((2048 * 2048, 1024), (2048, 0)),  # nothing is left of the response
    ],
)
def test_shares_of_a_row_of_2048_tokens(lengths, expected):
    assert split_max_length(*lengths, 2048) == expected


@given(n_prompt=st.integers(1, 6000), n_response=st.integers(1, 6000), max_length=st.integers(2, 2048))
def test_shares_are_those_of_the_exact_rule(n_prompt, n_response, max_length):
    ours, exact = split_max_length(n_prompt, n_response, max_length), infer_seqlen(n_prompt, n_response, max_length)
    # Where the proportion is a whole number, floating point may come out just below it, in the original too.
    assert ours == exact or (ours == (exact[0] + 1, exact[1] - 1) and max_length * n_response % (n_prompt + n_response) == 0)
    assert ours[0] >= 1 and sum(ours) == min(n_prompt + n_response, max_length)


def test_long_and_empty_rows_are_left_out_counted_and_named(tokenizer, caplog):
    whole = encode_examples(EXAMPLES, tokenizer, max_length=200)
    empty = [Example(id=text, prompt="p", response=text, answer="x", source="generated", source_split="generated") for text in ("", " \n")]
    with caplog.at_level(logging.INFO, logger="plasticity_jax"):
        rows = encode_examples([empty[0], *EXAMPLES, empty[1]], tokenizer, max_length=20, too_long="drop")
    assert as_lists(rows) == ([whole.tokens[2].tolist()], [whole.response_starts[2]])
    assert (rows.n_cut, rows.n_dropped, rows.n_empty) == (0, 2, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 5 rows of more than 20 tokens were left out (finetune.too_long='drop')",
        "2 of 5 rows without a response were left out",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="plasticity_jax"):
        encode_examples(EXAMPLES, tokenizer, max_length=20)
    assert [record.getMessage() for record in caplog.records] == ["2 of 3 rows of more than 20 tokens lost a part (finetune.too_long='cut')"]


def test_answers_that_a_completion_has_no_room_for_are_a_warning(tokenizer, caplog):
    """What follows the answer may be cut, and a response without its answer is not judged."""
    rows = [
        Example(id=answer, prompt="p", response=response, answer=answer, source="generated", source_split="generated")
        for answer, response in (("mathematics", "The answer is mathematics."), ("x", "The answer is mathematics."))
    ]
    limit = len(tokenizer.encode("The answer is mathematics"))
    for room, wanted in ((limit - 1, ["1 of 2 rows give their answer after"]), (limit, []), (None, [])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="plasticity_jax"):
            encode_examples(rows, tokenizer, max_length=200, answer_limit=room)
        assert [record.getMessage().partition(" max_new")[0] for record in caplog.records] == wanted


def test_a_row_of_whose_response_nothing_is_left_is_left_out(tokenizer):
    examples = [Example(id="0", prompt="p" * 2000, response="answer " * 3, answer="x", source="generated", source_split="generated")]
    rows = encode_examples(examples, tokenizer, max_length=8, too_long="cut-both")
    assert len(rows) == 0 and (rows.n_cut, rows.n_dropped) == (0, 1)


PLANS = given(
    lengths=st.lists(st.integers(2, 65), max_size=70),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    short_buckets=st.sets(st.integers(1, 63), max_size=4),
)


def split_epochs(batches, epochs, n_rows):
    """The batches of each epoch, after checking that every epoch takes every row exactly once."""
    per_epoch = len(batches) // epochs
    parts = [batches[epoch * per_epoch : (epoch + 1) * per_epoch] for epoch in range(epochs)]
    for part in parts:
        assert sorted(index for _, indices in part for index in indices.tolist()) == list(range(n_rows))
    return parts


@PLANS
def test_plan_takes_every_row_once_per_epoch_in_the_smallest_bucket(lengths, batch_size, epochs, seed, short_buckets):
    buckets = (*short_buckets, 64)
    batches = plan(lengths, buckets=buckets, batch_size=batch_size, epochs=epochs, seed=seed)
    for of_epoch in split_epochs(batches, epochs, len(lengths)):
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


def test_plan_of_rows_of_like_length_is_the_one_that_earlier_studies_used():
    """The order decides every later parameter, so it never changes: the digest was taken before other orders were added."""
    lengths = np.random.default_rng(0).integers(2, 66, 1000)
    batches = plan(lengths, buckets=(16, 32, 64), batch_size=16, epochs=3, seed=7)
    text = json.dumps([[length, indices.tolist()] for length, indices in batches])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ce2284a1afa3dbe2"


@PLANS
def test_plan_in_random_order_takes_every_row_once_per_epoch(lengths, batch_size, epochs, seed, short_buckets):
    buckets = (*short_buckets, 64)
    batches = plan(lengths, buckets=buckets, batch_size=batch_size, epochs=epochs, seed=seed, group_by_length=False)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(batches) == epochs * per_epoch
    for of_epoch in split_epochs(batches, epochs, len(lengths)):
        assert all(len(indices) == batch_size for _, indices in of_epoch[:-1])
    for bucket_length, indices in batches:
        assert bucket_length == min(bucket for bucket in buckets if bucket >= max(lengths[index] for index in indices) - 1)


def test_plan_in_random_order_mixes_lengths():
    batches = plan([10] * 100 + [30] * 100, buckets=(16, 32), batch_size=10, epochs=2, seed=0, group_by_length=False)
    assert all(0 < (indices < 100).sum() < 10 for _, indices in batches)
    assert [indices.tolist() for _, indices in batches[:20]] != [indices.tolist() for _, indices in batches[20:]]


@given(lengths=st.lists(st.integers(2, 65), max_size=70), batch_size=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_packing_loses_and_doubles_no_row_and_fits(lengths, batch_size, epochs, seed):
    batches = plan_packed(lengths, sequence_length=64, batch_size=batch_size, epochs=epochs, seed=seed)
    taken = [sequence.tolist() for _, sequences in batches for sequence in sequences]
    flat = [index for sequence in taken for index in sequence]
    for epoch in range(epochs):
        assert sorted(flat[epoch * len(lengths) : (epoch + 1) * len(lengths)]) == list(range(len(lengths)))
    assert all(length == 64 and 1 <= len(sequences) <= batch_size for length, sequences in batches)
    filled = [sum(lengths[index] - 1 for index in sequence) for sequence in taken]
    assert max(filled, default=0) <= 64
    if epochs == 1:  # a row opens a sequence only where no other has room, so two half-empty ones never lie side by side
        assert sum(2 * inputs <= 64 for inputs in filled) <= 1
    again = plan_packed(lengths, sequence_length=64, batch_size=batch_size, epochs=epochs, seed=seed)
    assert [sequence.tolist() for _, sequences in again for sequence in sequences] == taken


def test_packing_is_tight_mixes_and_differs_between_epochs_and_seeds():
    lengths = np.random.default_rng(0).integers(20, 120, 4000)
    of = lambda seed: [
        sequence.tolist() for _, sequences in plan_packed(lengths, sequence_length=256, batch_size=8, epochs=2, seed=seed) for sequence in sequences
    ]
    first = of(0)
    assert np.sum(lengths - 1) * 2 / (256 * len(first)) > 0.97
    half = len(first) // 2
    assert first[: half // 2] != first[half : half + half // 2] and first != of(1)


def test_a_row_beyond_a_packed_sequence_is_refused():
    with pytest.raises(UserError, match="a row of 34 tokens does not fit the longest bucket, 32 inputs"):
        plan_packed([33, 34], sequence_length=32, batch_size=4, epochs=1, seed=0)


@given(lengths=st.lists(st.integers(2, 33), min_size=1, max_size=20), seed=st.integers(0, 2**31))
def test_a_packed_batch_holds_every_row_whole(lengths, seed):
    """The rows read back from a packed batch, segment by segment, are the rows."""
    rng = np.random.default_rng(seed)
    rows = SftRows([rng.integers(2, 50, n).astype(np.int32) for n in lengths], [int(rng.integers(1, n)) for n in lengths])
    found = []
    for length, sequences in plan_packed(lengths, sequence_length=32, batch_size=3, epochs=1, seed=seed):
        batch = sft_batch(rows, sequences, bucket_length=length, batch_size=3, pad_id=1)
        assert all(array.shape == (3, 32) for array in batch.values())
        for place in range(3):
            members = sequences[place] if place < len(sequences) else []
            segments = batch["segment_ids"][place]
            assert np.unique(segments[segments > 0]).tolist() == list(range(1, len(members) + 1))
            assert (batch["loss_mask"][place][segments == 0] == 0).all()
            for segment, index in enumerate(members, 1):
                where = np.flatnonzero(segments == segment)
                assert where.tolist() == list(range(where[0], where[0] + lengths[index] - 1))
                assert [batch["tokens"][place, where[0]], *batch["targets"][place, where]] == rows.tokens[index].tolist()
                assert batch["tokens"][place, where].tolist() == rows.tokens[index][:-1].tolist()
                assert batch["positions"][place, where].tolist() == list(range(len(where)))
                response = [0] * (rows.response_starts[index] - 1) + [1] * (lengths[index] - rows.response_starts[index])
                assert batch["loss_mask"][place, where].tolist() == response
                found.append(int(index))
    assert sorted(found) == list(range(len(lengths)))


def test_addition_rows_are_short(tokenizer):
    # A tokenizer that learned no merge useful for sums: the worst case.
    rows = build_task("addition2", None, train_rows=200, test_rows=1, held_out_fraction=0.1, seed=0).train
    assert max(encode_examples(rows, tokenizer, max_length=200).lengths) <= 84


def test_rows_count():
    assert len(SftRows(tokens=[np.array([1, 2]), np.array([3, 4])], response_starts=[1, 1])) == 2
