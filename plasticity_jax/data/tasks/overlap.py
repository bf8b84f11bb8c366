"""Finds test questions that rephrase a training question or change its numbers, by the words that they share."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# In a sample of the GSM8K test, different questions stayed below 0.53, while a question and its template exceed it.
THRESHOLD = 0.6

_WORD = re.compile(r"\w+")


def word_set(text: str) -> frozenset[str]:
    """The set of case-folded words and numbers of a text."""
    return frozenset(_WORD.findall(text.casefold()))


def drop_overlaps(rows: Sequence[T], others: Iterable[str], text_of: Callable[[T], str], *, threshold: float = THRESHOLD) -> tuple[list[T], int]:
    """Drops rows whose text has a Jaccard similarity of at least `threshold` with any of the other texts.

    Compares word sets: words in both over words in either. A text without words overlaps nothing.

    Args:
      rows: in any order.
      others: the texts that no row may resemble.
      text_of: a row's text.
      threshold: in (0, 1].
    Returns:
      The remaining rows, in order, and the number dropped.
    Source: the search is the prefix filter of Chaudhuri, Ganti and Kaushik (2006), which is exact.
    """
    found = overlapping([text_of(row) for row in rows], others, threshold=threshold)
    return [row for position, row in enumerate(rows) if position not in found], len(found)


def overlapping(texts: Sequence[str], others: Iterable[str], *, threshold: float = THRESHOLD) -> set[int]:
    """Indices of the texts that have a Jaccard similarity of at least `threshold` with any of `others`; see `drop_overlaps`."""
    sets, other_sets = [word_set(text) for text in texts], sorted({word_set(text) for text in others}, key=sorted)
    return {position for position, found in enumerate(_matches(sets, other_sets, threshold)) if next(found, None) is not None}


def overlapping_pairs(texts: Sequence[str], *, threshold: float = THRESHOLD) -> Iterator[Iterator[int]]:
    """For each text, the indices of those that have a Jaccard similarity of at least `threshold` with it, itself included if it has words."""
    sets = [word_set(text) for text in texts]
    return _matches(sets, sets, threshold)


def _matches(sets: Sequence[frozenset[str]], others: Sequence[frozenset[str]], threshold: float) -> Iterator[Iterator[int]]:
    """For each set, the positions of the others that are as similar as `threshold`."""
    counts = Counter(word for words in (*sets, *others) for word in words)
    # Two sets this similar share one of their rarest words, so common words need no index.
    holders = defaultdict(list)
    for position, words in enumerate(others):
        for word in _rarest(words, counts, threshold):
            holders[word].append(position)
    return (_similar(words, others, holders, counts, threshold) for words in sets)


def _rarest(words: frozenset[str], counts: Counter, threshold: float) -> list[str]:
    # A similar set shares at least threshold * len(words) words, so it has at least one of these.
    needed = math.ceil(threshold * len(words) - 1e-9)
    return sorted(words, key=lambda word: (counts[word], word))[: len(words) - needed + 1] if words else []


def _similar(
    words: frozenset[str], others: Sequence[frozenset[str]], holders: dict[str, list[int]], counts: Counter, threshold: float
) -> Iterator[int]:
    seen = set()
    for word in _rarest(words, counts, threshold):
        for position in holders.get(word, ()):
            other = others[position]
            # The ratio of the sizes bounds the similarity, which rules out most candidates.
            if position not in seen and min(len(words), len(other)) / max(len(words), len(other)) >= threshold:
                seen.add(position)
                shared = len(words & other)
                if shared / (len(words) + len(other) - shared) >= threshold:
                    yield position
