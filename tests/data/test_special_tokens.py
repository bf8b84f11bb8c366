"""Which tokens begin and end a text, from all files of a tokenizer's folder. tests/parity/test_end_of_text.py holds the same cases against transformers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from special_tokens import CASES, SPECIALS, backend, tokenizer_folder
from tokenizers import processors

from plasticity_jax.data.named_tokenizers import open_tokenizer, setting_fingerprint
from plasticity_jax.data.tokenizer import Tokenizer, copy_tokenizer
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError


@pytest.mark.parametrize("name", CASES)
def test_the_end_of_text_is_that_of_transformers(name, tmp_path):
    case = CASES[name]
    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, case.files))
    assert tokenizer.eos_id == (SPECIALS[case.eos] if case.eos else case.generation[0] if case.generation else SPECIALS["<|endoftext|>"])
    assert tokenizer.bos_id == (SPECIALS[case.bos] if case.bos else None)
    assert set(tokenizer.eos_ids) == {tokenizer.eos_id, *case.generation} and tokenizer.eos_ids[0] == tokenizer.eos_id


@pytest.mark.parametrize("name", CASES)
def test_a_corpus_keeps_the_end_of_text_of_its_tokenizer(name, tmp_path):
    folder = tokenizer_folder(tmp_path / "hf", CASES[name].files)
    tokenizer = open_tokenizer(str(folder), Wheels(tmp_path), vocab_size=300)
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "run")
    assert (again.eos_id, again.pad_id, again.bos_id) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id)
    assert again.fingerprint == tokenizer.fingerprint


def test_every_file_that_is_read_defines_the_corpus(tmp_path):
    folder = tokenizer_folder(tmp_path, {"tokenizer_config.json": {}})
    seen = {setting_fingerprint(str(folder))}
    for name in ("special_tokens_map.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text(json.dumps({"eos_token": "</s>"}))
        seen.add(setting_fingerprint(str(folder)))
    assert len(seen) == 6


@pytest.mark.parametrize("ids", ["x", [1, "2"], [True], 1.5, {"a": 1}, 2**40])
def test_ids_that_are_none_are_one_line(ids, tmp_path):
    folder = tokenizer_folder(tmp_path, {"generation_config.json": {"eos_token_id": ids}})
    with pytest.raises(UserError, match="generation_config.json beside it has eos_token_id=.*; give a token id, or a list of them$"):
        Tokenizer.load(folder)


def test_a_file_that_is_not_json_is_one_line(tmp_path):
    for name in ("special_tokens_map.json", "generation_config.json"):
        (tokenizer_folder(tmp_path / name, {}) / name).write_text("{")
        with pytest.raises(UserError, match=f"{name} beside it is not valid JSON"):
            Tokenizer.load(tmp_path / name)


def test_a_copy_has_every_file_and_no_stale_one(tmp_path):
    folder = tokenizer_folder(tmp_path / "a", {"tokenizer_config.json": {"chat_template": "{{ x }}"}, "generation_config.json": {"top_k": 3}})
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "special_tokens_map.json", "merges.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (tmp_path / "b" / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.model", "additional_chat_templates/old.jinja", "results.json"):
        (tmp_path / "b" / name).write_text("stale")
    copy_tokenizer(folder, tmp_path / "b")
    found = {path.relative_to(tmp_path / "b").as_posix(): path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    wanted = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == wanted | {"results.json": b"stale"}


# ---------------------------------------------------------------------------------------------------------------- before and after a text

RULES = {
    "before": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)]),
    "around": processors.TemplateProcessing(single="<s> <|eot|> $A </s>", special_tokens=[("<s>", 256), ("<|eot|>", 259), ("</s>", 257)]),
    "in a sequence": processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])]
    ),
    "nothing": processors.ByteLevel(trim_offsets=False),
}


@pytest.mark.parametrize("name", RULES)
@given(text=st.text(max_size=20))
def test_what_a_post_processor_puts_around_a_text_is_found(name, text):
    made = backend()
    made.post_processor = RULES[name]
    made.encode_special_tokens = True
    tokenizer = Tokenizer(made)
    assert [*tokenizer.prefix_ids, *tokenizer.encode(text), *tokenizer.suffix_ids] == made.encode(text, add_special_tokens=True).ids
    plain = tokenizer.without_frame()
    assert (plain.prefix_ids, plain.suffix_ids) == ((), ()) and plain.encode(text) == tokenizer.encode(text)
    assert (plain.eos_ids, plain.pad_id, plain.vocab_size) == (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size)


def test_a_corpus_has_no_beginning_of_text_and_its_runs_know_that(tmp_path):
    made = backend()
    made.post_processor = RULES["before"]
    folder = tokenizer_folder(tmp_path / "hf", {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}, made)
    assert Tokenizer.load(folder).prefix_ids == (256,)
    tokenizer = open_tokenizer(str(folder), Wheels(tmp_path), vocab_size=300)
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "run")
    assert again.prefix_ids == () and (again.bos_id, again.eos_id) == (256, 257) and again.fingerprint == tokenizer.fingerprint
