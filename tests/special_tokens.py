"""Folders whose files disagree about special tokens, and what transformers reads from them (5.23.0 and 4.57.6, see tests/parity/test_end_of_text.py)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

SPECIALS = {token: 256 + i for i, token in enumerate(("<s>", "</s>", "<|endoftext|>", "<|eot|>", "<|end|>"))}


class Case(NamedTuple):
    """Attributes: files (name → content), and what transformers makes of them: eos and bos (None: none), and the ids that end its generation."""

    files: dict[str, Any]
    eos: str | None
    bos: str | None = None
    generation: tuple[int, ...] = ()


def entry(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


DECODER = {"259": entry("<|eot|>") | {"special": True}}
TOKENIZER, MAP, MODEL, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"
CASES = {
    "configuration": Case({TOKENIZER: {"eos_token": "<|eot|>", "bos_token": "<s>"}}, "<|eot|>", "<s>"),
    "configuration, an object": Case({TOKENIZER: {"eos_token": entry("<|eot|>") | {"__type": "AddedToken"}}}, "<|eot|>"),
    "the map goes first": Case({TOKENIZER: {"eos_token": "<|eot|>", "bos_token": "<s>"}, MAP: {"eos_token": "<|end|>"}}, "<|end|>", "<s>"),
    "the map goes first, an object": Case({TOKENIZER: {"eos_token": "<|eot|>"}, MAP: {"eos_token": entry("<|end|>")}}, "<|end|>"),
    "the map alone": Case({TOKENIZER: {}, MAP: {"eos_token": "<|end|>", "bos_token": "<s>"}}, "<|end|>", "<s>"),
    "the map takes away": Case({TOKENIZER: {"eos_token": "<|eot|>"}, MAP: {"eos_token": None}}, None),
    "added tokens switch the map off": Case(
        {TOKENIZER: {"eos_token": "<|eot|>", "added_tokens_decoder": DECODER}, MAP: {"eos_token": "<|end|>"}}, "<|eot|>"
    ),
    "no added tokens do, too": Case({TOKENIZER: {"eos_token": "<|eot|>", "added_tokens_decoder": {}}, MAP: {"eos_token": "<|end|>"}}, "<|eot|>"),
    "nothing is named": Case({TOKENIZER: {}}, None),
    "ids of the model": Case({TOKENIZER: {"eos_token": "</s>"}, MODEL: {"eos_token_id": [259, 260]}}, "</s>", None, (259, 260)),
    "ids of generation go first": Case(
        {TOKENIZER: {"eos_token": "</s>"}, MODEL: {"eos_token_id": 257}, GENERATION: {"eos_token_id": [259, 260]}}, "</s>", None, (259, 260)
    ),
    "generation without ids": Case({TOKENIZER: {"eos_token": "</s>"}, MODEL: {"eos_token_id": 259}, GENERATION: {"top_k": 7}}, "</s>"),
    "ids alone": Case({TOKENIZER: {}, MODEL: {"eos_token_id": [260, 259]}}, None, None, (260, 259)),
    "one id": Case({TOKENIZER: {"eos_token": "<|eot|>"}, GENERATION: {"eos_token_id": 259}}, "<|eot|>", None, (259,)),
}


def backend() -> tokenizers.Tokenizer:
    """Bytes and SPECIALS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


def tokenizer_folder(folder: Path, files: dict[str, Any], made: tokenizers.Tokenizer | None = None) -> Path:
    """Writes tokenizer.json and the files."""
    folder.mkdir(exist_ok=True, parents=True)
    (made or backend()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
