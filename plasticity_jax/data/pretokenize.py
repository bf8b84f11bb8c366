"""Cuts text where the tokenizer cuts it anyway, so that every distinct piece is tokenised once.

Running text repeats itself: 36 MB of it hold under 200,000 distinct pieces. Looking pieces up is several times faster than tokenising
every occurrence. Where a tokenizer never merges is known for three kinds: the study's own, OLMo-2's and SentencePiece's.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

# A piece is a digit, a word with the space before it, or a run of white space. The tokenizer (digits first, then GPT-2's pattern) never
# merges across these boundaries. Words of plain letters are cut off before the marks that end clauses, where it never merges either:
# fewer distinct pieces. An apostrophe is no such mark, because the tokenizer's contractions look at what follows it.
_PIECE = re.compile(r"""\d| ?[A-Za-z]+(?![^\s\d.,;:!?)"])| ?[^\s\d]+|\s+(?![^\s\d])|\s+""")

# Before the space between two words, or between a mark and a word, OLMo-2's pattern ends a token whatever came before, and begins one.
_WORD = re.compile(r"(?<=[A-Za-z.,;:])(?= [A-Za-z])")
_OLMO2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPACE = "▁"  # how SentencePiece writes it

# What can hold disputed characters: nearly all text is ASCII, and set look-ups for all of it would cost as much as the cutting.
_UNCOMMON = re.compile(r"[^\x00-\x1b -\x7f]+")


def pieces(text: str) -> list[str]:
    """The pieces of `text`, in order; joined they are the text, and tokenised one by one they give the tokens of the text.

    A text with characters on whose class Python and the tokenizer disagree is one piece.
    """
    if all(map(_agreed, set().union(*_UNCOMMON.findall(text)))):
        return _PIECE.findall(text)
    return [text]


@functools.cache
def _agreed(character: str) -> bool:
    # White space to Python alone (the four separators), digits to the tokenizer alone (Nl, No), or too new for one of the two (Cn).
    return character not in "\x1c\x1d\x1e\x1f" and unicodedata.category(character) not in ("Nl", "No", "Cn")


def words(text: str) -> list[str]:
    """The pieces for OLMo-2's tokenizer: words with the space before them and the marks behind."""
    return _WORD.split(text)


def words_without_space(text: str) -> list[str]:
    """The pieces for SentencePiece's: `words` without the space before each, which the tokenizer puts there by itself."""
    first, *others = _WORD.split(text)
    return [first, *(word[1:] for word in others)]


def own_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """How the study's tokenizers cut text: every digit by itself, then GPT-2's pattern."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def sentencepiece_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts before spaces; right for a vocabulary in which no piece has a space behind another character."""
    return pre_tokenizers.Split(tokenizers.Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")


def sentencepiece_normalizer(*, prefix: bool) -> normalizers.Normalizer:
    """Writes spaces as SentencePiece does, with one before the text if `prefix`."""
    steps = [normalizers.Replace(" ", SPACE)]
    return normalizers.Sequence([normalizers.Prepend(SPACE), *steps] if prefix else steps)


def cutter(backend: tokenizers.Tokenizer) -> Callable[[str], list[str]] | None:
    """The function that cuts text for this tokenizer; None where it is not known how.

    The tokens of a text are those of its pieces, each tokenised like a text of its own.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    spaced = any(token.lstrip or token.rstrip or token.single_word or " " in token.content for token in added)
    if not isinstance(backend.model, models.BPE) or backend.pre_tokenizer is None or spaced:
        return None
    state = backend.pre_tokenizer.__getstate__()
    if backend.normalizer is None:
        if state == own_pre_tokenizer().__getstate__() and not added:
            return pieces
        steps = json.loads(state).get("pretokenizers", [])
        first = steps[0] if len(steps) == 2 else {}
        if first.get("pattern") == {"Regex": _OLMO2_PATTERN} and steps[1]["type"] == "ByteLevel" and not steps[1]["add_prefix_space"]:
            return words
        return None
    if state == sentencepiece_pre_tokenizer().__getstate__() and not added:
        if backend.normalizer.__getstate__() == sentencepiece_normalizer(prefix=True).__getstate__():
            return words_without_space
    return None
