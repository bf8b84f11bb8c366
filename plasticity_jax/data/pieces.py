"""Cuts text where the tokenizer cuts it anyway, so that every distinct piece is tokenised once.

Running text repeats itself: 36 MB of it hold under 200,000 distinct pieces. Looking pieces up is several times faster than tokenising
every occurrence.
"""

import functools
import re
import unicodedata

# A piece is a digit, a word with the space before it, or a run of white space. The tokenizer (digits first, then GPT-2's pattern) never
# merges across these boundaries. Words of plain letters are cut off before the marks that end clauses, where it never merges either:
# fewer distinct pieces. An apostrophe is no such mark, because the tokenizer's contractions look at what follows it.
_PIECE = re.compile(r"""\d| ?[A-Za-z]+(?![^\s\d.,;:!?)"])| ?[^\s\d]+|\s+(?![^\s\d])|\s+""")

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
