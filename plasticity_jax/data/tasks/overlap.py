"""Test questions that are training questions in other words or with other numbers: found by the words they share."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

# Two different questions of the GSM8K test never passed 0.53 in a sampled check, while a question and its template do.
THRESHOLD = 0.6

_WORD = re.compile(r"\w+")


def word_set(text: str) -> frozenset[str]:
    """The different words and numbers of a text, in folded case."""
    return frozenset(_WORD.findall(text.casefold()))


def drop_overlaps(rows: Sequence[T], others: Iterable[str], text_of: Callable[[T], str], *, threshold: float = THRESHOLD) -> tuple[list[T], int]:
    """Drops the rows whose text has the Jaccard similarity `threshold`, or more, with any of the other texts.

    The similarity is that of `word_set`: words in both over words in either. A text without words overlaps nothing.

    Args:
      rows: in any order.
      others: the texts that no row may resemble.
      text_of: a row's text.
      threshold: in (0, 1].
    Returns:
      The rows that stay, in order, and how many were dropped.
    Source: the search is the prefix filter of Chaudhuri, Ganti and Kaushik (2006), which is exact.
    """
    found = overlapping([text_of(row) for row in rows], others, threshold=threshold)
    return [row for position, row in enumerate(rows) if position not in found], len(found)


def overlapping(texts: Sequence[str], others: Iterable[str], *, threshold: float = THRESHOLD) -> set[int]:
    """Positions of the texts that have a Jaccard similarity of at least `threshold` with any of `others`; see `drop_overlaps`."""
    sets, other_sets = [word_set(text) for text in texts], sorted({word_set(text) for text in others}, key=sorted)
    counts = Counter(word for words in (*sets, *other_sets) for word in words)
    # Of two sets this similar, those parts that begin with the rarest words share a word, so the common words need no index.
    holders = defaultdict(list)
    for position, words in enumerate(other_sets):
        for word in _rarest(words, counts, threshold):
            holders[word].append(position)
    return {position for position, words in enumerate(sets) if _meets_any(words, other_sets, holders, counts, threshold)}


def _rarest(words: frozenset[str], counts: Counter, threshold: float) -> list[str]:
    # A similar set shares at least threshold * len(words) of the words: it cannot do without one of so many.
    needed = math.ceil(threshold * len(words) - 1e-9)
    return sorted(words, key=lambda word: (counts[word], word))[: len(words) - needed + 1] if words else []


def _meets_any(words: frozenset[str], others: Sequence[frozenset[str]], holders: dict[str, list[int]], counts: Counter, threshold: float) -> bool:
    seen = set()
    for word in _rarest(words, counts, threshold):
        for position in holders.get(word, ()):
            other = others[position]
            # The similarity is at most the ratio of the sizes: most candidates end here.
            if position not in seen and min(len(words), len(other)) / max(len(words), len(other)) >= threshold:
                seen.add(position)
                shared = len(words & other)
                if shared / (len(words) + len(other) - shared) >= threshold:
                    return True
    return False
