import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.data import loader
from plasticity_jax.data.loader import TokenRecords, as_batch, batch_at, batches, order
from plasticity_jax.data.prepare import TOKENS, prepare_corpus
from plasticity_jax.errors import UserError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def records(tmp_path_factory, wheels_dir):
    directory = tmp_path_factory.mktemp("corpus")
    prepare_corpus(
        directory, sources=("bbc", "commons"), wheels_dir=wheels_dir, held_out_fraction=0.2, max_documents=40, vocab_size=300, seq_len=SEQ_LEN
    )
    return TokenRecords(directory / TOKENS, "train")


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**32), st.integers(1, 4))
def test_every_record_comes_once_per_epoch(n_records, batch_size, seed, epochs):
    steps = -(-n_records * epochs // batch_size)
    stream = np.concatenate([order(n_records, seed=seed, batch_size=batch_size, step=step) for step in range(steps)])
    for epoch in range(epochs):
        assert Counter(stream[epoch * n_records : (epoch + 1) * n_records].tolist()) == Counter(range(n_records))


@given(st.integers(1, 1000), st.integers(1, 64), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_order_is_a_function_of_seed_and_step(n_records, batch_size, seed, step):
    expected = order(n_records, seed=seed, batch_size=batch_size, step=step)
    order(n_records, seed=seed + 1 if seed < 2**64 - 1 else 0, batch_size=batch_size, step=step + 3)
    assert np.array_equal(order(n_records, seed=seed, batch_size=batch_size, step=step), expected)
    assert expected.shape == (batch_size,) and 0 <= expected.min() and expected.max() < n_records


@given(st.integers(1, 100), st.integers(0, 100))
def test_the_stream_does_not_depend_on_the_batch_size(n_records, step):
    wide = order(n_records, seed=3, batch_size=12, step=step)
    narrow = [order(n_records, seed=3, batch_size=4, step=3 * step + i) for i in range(3)]
    assert np.array_equal(wide, np.concatenate(narrow))


def test_epochs_and_seeds_are_shuffled_differently():
    first = order(1000, seed=0, batch_size=1000, step=0)
    assert not np.array_equal(first, np.arange(1000))
    assert not np.array_equal(first, order(1000, seed=0, batch_size=1000, step=1))
    assert not np.array_equal(first, order(1000, seed=1, batch_size=1000, step=0))


def philox4x64(counter, key):
    """Salmon et al. 2011, Philox4x64-10, by the book."""
    mask = 2**64 - 1
    x, k = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(high >> 64) ^ x[1] ^ k[0], high & mask, (low >> 64) ^ x[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


def test_the_order_is_that_of_the_published_generator():
    for seed, epoch in [(0, 0), (5, 3)]:
        keys = [key for counter in range(1, 4) for key in philox4x64(counter, (seed, epoch))][:10]
        expected = sorted(range(10), key=keys.__getitem__)
        assert order(10, seed=seed, batch_size=10, step=epoch).tolist() == expected


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 8) | st.integers(2**64 - 8, 2**64 - 1), min_size=1, max_size=200), st.integers(1, 64))
def test_records_are_sorted_as_numpy_sorts_their_keys(keys, size):
    keys = np.array(keys, np.uint64)  # small and large ones are equal in all bits that stay in the sort, or equal altogether
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_BLOCK", size)
        places = loader._sorted_places(lambda: (keys[i : i + size] for i in range(0, len(keys), size)), len(keys))
    assert places.tolist() == np.argsort(keys, kind="stable").tolist()


def test_one_shuffle_is_made_however_many_threads_read_ahead():
    loader._shuffle.cache_clear()
    threads = [threading.Thread(target=order, args=(200_000,), kwargs={"seed": 9, "batch_size": 4, "step": step}) for step in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loader._shuffle.cache_info().misses == 1


def test_shuffles_are_uniform():
    firsts = Counter(int(order(5, seed=seed, batch_size=1, step=0)[0]) for seed in range(2000))
    assert all(abs(firsts[index] - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for index in range(5))


def test_a_batch_is_the_records_shifted_by_one():
    records_BxT1 = np.arange(12).reshape(3, 4)
    batch = as_batch(records_BxT1)
    assert batch["tokens"].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert batch["targets"].tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    assert batch["positions"].tolist() == [[0, 1, 2]] * 3
    assert batch["segment_ids"].tolist() == [[1, 1, 1]] * 3 and batch["loss_mask"].tolist() == [[1.0, 1.0, 1.0]] * 3
    assert {name: str(value.dtype) for name, value in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "loss_mask": "float32",
    }


EOS = 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4))
def test_with_isolate_a_token_sees_exactly_its_own_document(records):
    batch = as_batch(np.asarray(records), isolate=EOS)
    for row, segments in zip(records, batch["segment_ids"]):
        for query in range(8):
            for key in range(query + 1):
                same_document = EOS not in row[key:query]  # an end of text between them, or at the key itself, parts them
                assert (segments[query] == segments[key]) == same_document
    assert batch["segment_ids"].min() == 1 and batch["segment_ids"].dtype == np.int32
    plain = as_batch(np.asarray(records))
    assert all(np.array_equal(batch[name], plain[name]) for name in ("tokens", "targets", "loss_mask", "positions"))


def test_the_first_token_of_a_document_counts_as_target_of_the_end_before_it():
    batch = as_batch(np.array([[5, EOS, 6, 7]]), isolate=EOS)
    assert batch["segment_ids"].tolist() == [[1, 1, 2]] and batch["targets"].tolist() == [[EOS, 6, 7]]
    assert batch["loss_mask"].tolist() == [[1.0, 1.0, 1.0]]


def test_batches_pass_isolate_on(records):
    eos_id = 0
    (found,) = batches(records, seed=1, batch_size=64, start_step=3, steps=1, isolate=eos_id)
    expected = as_batch(records.tokens(order(len(records), seed=1, batch_size=64, step=3)), isolate=eos_id)
    assert np.array_equal(found["segment_ids"], expected["segment_ids"]) and found["segment_ids"].max() > 1


def test_tokens_come_in_the_order_asked_for(records):
    every = records.tokens(range(len(records)))
    assert every.shape == (len(records), SEQ_LEN + 1) and every.dtype == np.int32
    indices = [5, 0, 5, len(records) - 1]
    assert np.array_equal(records.tokens(indices), every[indices])
    assert records.tokens([]).shape == (0, SEQ_LEN + 1)


def test_the_batch_at_a_step_holds_the_records_of_its_order(records):
    batch = batch_at(records, seed=4, batch_size=8, step=11)
    expected = records.tokens(range(len(records)))[order(len(records), seed=4, batch_size=8, step=11)]
    assert np.array_equal(batch["tokens"], expected[:, :-1]) and np.array_equal(batch["targets"], expected[:, 1:])


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("start_step", [0, 7])
def test_batches_equal_the_batch_at_every_step(records, prefetch, start_step):
    steps = 2 * len(records) // 16  # past the end of an epoch
    found = list(batches(records, seed=2, batch_size=16, start_step=start_step, steps=steps, prefetch=prefetch))
    assert len(found) == steps > len(records) // 16
    for step, batch in enumerate(found, start_step):
        expected = batch_at(records, seed=2, batch_size=16, step=step)
        assert batch.keys() == expected.keys()
        for name in expected:
            assert batch[name].dtype == expected[name].dtype and np.array_equal(batch[name], expected[name])


def test_unfinished_records_and_unknown_splits_are_refused(records, tmp_path, wheels_dir):
    with pytest.raises(UserError, match="tokens.json is missing"):
        TokenRecords(tmp_path, "train")
    prepare_corpus(tmp_path, sources=("commons",), wheels_dir=wheels_dir, held_out_fraction=0.5, max_documents=20, vocab_size=260, seq_len=8)
    with pytest.raises(UserError, match="split 'test' is unknown; .* has train and held_out"):
        TokenRecords(tmp_path / TOKENS, "test")


def test_no_records_give_no_batch():
    with pytest.raises(UserError, match="0 token records"):
        order(0, seed=0, batch_size=4, step=0)
