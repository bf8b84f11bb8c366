"""Raw token files against plain NumPy slices of the same arrays; splits by document; mistakes in one line."""

import json

import numpy as np
import pytest

from plasticity_jax.config import DataConfig, ModelConfig, StudyConfig
from plasticity_jax.data.fingerprints import corpus_fields
from plasticity_jax.data.loader import TokenRecords, batch_at
from plasticity_jax.data.token_files import find_token_files, prepare_tokens
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError

SEQ_LEN, EOS = 7, 0


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the red tree sees a dog"] * 20, 272)


def write_mix(folder, lengths=(500, 333, 90), dtype="uint16", seed=0, top=270):
    """Files of random documents that end with EOS, as OLMo-core's guide writes them."""
    rng, arrays = np.random.default_rng(seed), []
    for i, n in enumerate(lengths):
        ids = rng.integers(2, top, n)
        ids[rng.random(n) < 0.1] = EOS
        ids[-1] = EOS
        path = folder / f"source{i % 2}" / f"part-{i:02d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        mapped = np.memmap(path, mode="w+", dtype=dtype, shape=(n,))
        mapped[:] = ids
        mapped.flush()
        arrays.append((path, ids))
    return [ids for _, ids in sorted(arrays, key=lambda each: str(each[0]))]


def prepare(out, places, tokenizer, *, dtype="uint16", max_tokens=None, fraction=0.2):
    how = dict(dtype=dtype, eos_id=EOS, tokenizer=tokenizer, seq_len=SEQ_LEN, held_out_fraction=fraction, max_tokens=max_tokens)
    return prepare_tokens(out, find_token_files(places, dtype), **how)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_records_are_slices_of_the_files_and_no_document_is_in_both_splits(tmp_path, tokenizer, dtype):
    arrays = write_mix(tmp_path / "mix", dtype=dtype)
    summary = prepare(tmp_path / "corpus", str(tmp_path / "mix"), tokenizer, dtype=dtype)
    expected = {"train": [], "held_out": []}
    for ids in arrays:
        start = next(i + 1 for i in range(int(len(ids) * 0.8), len(ids)) if ids[i] == EOS)
        for split, part in (("train", ids[:start]), ("held_out", ids[start:])):
            expected[split] += [part[i : i + SEQ_LEN + 1] for i in range(0, len(part) - SEQ_LEN, SEQ_LEN + 1)]
    for split, rows in expected.items():
        records = TokenRecords(tmp_path / "corpus" / "tokens", split)
        assert len(records) == len(rows) == summary["tokens"]["splits"][split]["tokens"]["records"]
        assert np.array_equal(records.tokens(np.arange(len(rows))), np.stack(rows)) and set(records.domain_of.tolist()) == {0}
        shuffled = [len(rows) - 1, 0, 3, 3]
        assert np.array_equal(records.tokens(shuffled), np.stack([rows[i] for i in shuffled]))
        joined = np.concatenate(rows)
        assert summary["tokens"]["splits"][split]["tokens"]["bytes"] == sum(int(tokenizer.token_bytes[i]) for i in joined)
        assert (np.diff(records.document_of) >= 0).all()
    assert batch_at(TokenRecords(tmp_path / "corpus" / "tokens", "train"), seed=0, batch_size=4, step=0)["tokens"].shape == (4, SEQ_LEN)
    assert not list((tmp_path / "corpus").rglob("*.array_record"))  # nothing is copied


def test_a_record_knows_the_document_that_it_starts_in(tmp_path, tokenizer):
    arrays = write_mix(tmp_path / "mix", lengths=(300,))
    prepare(tmp_path / "corpus", str(tmp_path / "mix"), tokenizer)
    found = TokenRecords(tmp_path / "corpus" / "tokens", "train").document_of
    assert found.tolist() == [int((arrays[0][: i * (SEQ_LEN + 1)] == EOS).sum()) for i in range(len(found))]


def test_max_tokens_takes_the_first_records_and_reads_no_further_file(tmp_path, tokenizer):
    arrays = write_mix(tmp_path / "mix")
    summary = prepare(tmp_path / "corpus", str(tmp_path / "mix"), tokenizer, max_tokens=20 * SEQ_LEN)
    assert [file["train"] for file in summary["tokens"]["files"]] == [20]
    records = TokenRecords(tmp_path / "corpus" / "tokens", "train")
    assert np.array_equal(records.tokens(range(20)).ravel(), arrays[0][: 20 * (SEQ_LEN + 1)])


def test_the_hash_follows_names_sizes_and_dtype_and_not_the_place(tmp_path):
    def fields(folder, **changes):
        return corpus_fields(DataConfig(**{"token_files": str(folder), "token_dtype": "uint16", "tokenizer": "dolma2"} | changes))

    for name, lengths in (("a", (500, 90)), ("b", (500, 90)), ("c", (502, 90))):
        write_mix(tmp_path / name / "mix", lengths=lengths)
    assert fields(tmp_path / "a") == fields(tmp_path / "b") != fields(tmp_path / "c")
    assert fields(tmp_path / "a") != fields(tmp_path / "a", token_eos_id=3) and fields("nowhere")["token_files"] == {"place": "nowhere"}


def test_globs_and_lists_keep_their_order(tmp_path):
    write_mix(tmp_path)
    found = find_token_files(f"{tmp_path}/source1/*.npy, {tmp_path}/source0/part-0[0-9].npy", "uint16")
    assert [(file.name, file.tokens) for file in found] == [("source1/part-01.npy", 333), ("source0/part-00.npy", 500), ("source0/part-02.npy", 90)]


def test_mistakes_are_one_line_with_a_way_out(tmp_path, tokenizer):
    write_mix(tmp_path / "mix", lengths=(80, 90))
    (tmp_path / "odd.npy").write_bytes(b"12345")
    np.save(tmp_path / "header.npy", np.arange(9, dtype=np.uint32))
    np.full(64, 281, np.uint16).tofile(tmp_path / "beyond.npy")
    np.zeros(4, np.uint16).tofile(tmp_path / "short.npy")
    for places, words in (
        (str(tmp_path / "none"), "names no file"),
        ("gs://bucket/mix", "on a store"),
        (str(tmp_path / "odd.npy"), "5 bytes, which are no uint16 ids"),
        (str(tmp_path / "header.npy"), "has a NumPy header"),
        (f"{tmp_path}/short.npy,{tmp_path}/short.npy", "twice"),
        (str(tmp_path / "beyond.npy"), "id 281 (first at place 0) is beyond the 280 entries of data.tokenizer"),
        (str(tmp_path / "short.npy"), "leave no train record"),
    ):
        with pytest.raises(UserError) as error:
            prepare(tmp_path / "corpus", places, tokenizer)
        assert words.replace("280", str(tokenizer.vocab_size)) in str(error.value) and "\n" not in str(error.value), error.value
    prepare(tmp_path / "corpus", str(tmp_path / "mix"), tokenizer)
    (path,) = {json.loads((tmp_path / "corpus/tokens/tokens.json").read_text())["files"][0]["path"]}
    with open(path, "r+b") as file:
        file.truncate(40)
    with pytest.raises(UserError, match="holds 20 ids, and its records reach to"):
        TokenRecords(tmp_path / "corpus" / "tokens", "train")
    for data, words in (
        (DataConfig(token_files="x"), "tokenized already; set data.tokenizer"),
        (DataConfig(token_files="x", files="y", tokenizer="dolma2"), "data.files=y and data.token_files=x: set one of the two"),
        (DataConfig(token_files="x", tokenizer="a/b.json", token_eos_id=5000), "data.token_eos_id=5000 is beyond model.vocab_size=1024"),
    ):
        with pytest.raises(UserError, match=words):
            StudyConfig(data=data, model=ModelConfig()).check_section("data")
