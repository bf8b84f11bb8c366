"""Splits text at boundaries that a tokenizer never merges across, so that each distinct piece is tokenized only once.

Running text repeats itself: 36 MB hold under 200,000 distinct pieces. Looking pieces up takes a half to two fifths of the processor time of
`tokenizers.Tokenizer.encode_batch_fast` on whole texts (benchmarks/tokenize_corpus.py; docs/decisions.md). Safe boundaries are known for the study's
own tokenizers and for OLMo-2's. For SentencePiece's the gain was too small to keep.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

# A piece is a digit, a word with the space before it, or a run of white space. The tokenizer (digits first, then GPT-2's pattern) never
# merges across these boundaries. Words of plain letters also end before punctuation that ends a clause, which leaves fewer distinct pieces.
# An apostrophe does not end a word, because the tokenizer's contractions depend on what follows it.
_PIECE = re.compile(r"""\d| ?[A-Za-z]+(?![^\s\d.,;:!?)"])| ?[^\s\d]+|\s+(?![^\s\d])|\s+""")

# OLMo-2's pattern always starts a new token at the space between two words, or between punctuation and a word.
_WORD = re.compile(r"(?<=[A-Za-z.,;:])(?= [A-Za-z])")
_OLMO2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPACE = "▁"  # SentencePiece's symbol for a space

# Characters to check one by one. Nearly all text is ASCII; checking all of it would cost as much as the split itself.
_UNCOMMON = re.compile(r"[^\x00-\x1b -\x7f]+")


def split_own(text: str) -> list[str]:
    """Splits a text for the study's own tokenizers. The pieces join to the text, and their tokens join to its tokens.

    A text with a character that Python and the tokenizer may classify differently stays one piece.
    """
    if all(map(_same_class, set().union(*_UNCOMMON.findall(text)))):
        return _PIECE.findall(text)
    return [text]


@functools.cache
def _same_class(character: str) -> bool:
    # Only Python treats the four separators as white space; only the tokenizer treats Nl and No as digits; either may not know Cn yet.
    return character not in "\x1c\x1d\x1e\x1f" and unicodedata.category(character) not in ("Nl", "No", "Cn")


def split_olmo2(text: str) -> list[str]:
    """Splits a text for OLMo-2's tokenizer: words with the space before and the punctuation after them."""
    return _WORD.split(text)


def own_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of the study's own tokenizers: single digits, then GPT-2's pattern."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def sentencepiece_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits before spaces. Correct only for a vocabulary in which no piece has a space after another character."""
    return pre_tokenizers.Split(tokenizers.Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")


def sentencepiece_normalizer(*, prefix: bool) -> normalizers.Normalizer:
    """Replaces spaces as SentencePiece does, and adds one before the text if `prefix`."""
    replace = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence([normalizers.Prepend(SPACE), replace] if prefix else [replace])


def splitter(backend: tokenizers.Tokenizer) -> Callable[[str], list[str]] | None:
    """Returns the function that splits text for this tokenizer, or None if no safe boundaries are known.

    Tokenizing the pieces separately and joining the results gives the tokens of the whole text.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    spaced = any(token.lstrip or token.rstrip or token.single_word or " " in token.content for token in added)
    if not isinstance(backend.model, models.BPE) or backend.pre_tokenizer is None or spaced:
        return None
    state = backend.pre_tokenizer.__getstate__()
    if backend.normalizer is None:
        if state == own_pre_tokenizer().__getstate__() and not added:
            return split_own
        steps = json.loads(state).get("pretokenizers", [])
        first = steps[0] if len(steps) == 2 else {}
        if first.get("pattern") == {"Regex": _OLMO2_PATTERN} and steps[1]["type"] == "ByteLevel" and not steps[1]["add_prefix_space"]:
            return split_olmo2
        return None
    return None
