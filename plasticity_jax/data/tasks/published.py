"""Turns published rows into examples for the paper's tasks: counts filters, drops test questions from training, checks the paper's counts."""

import heapq
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, normalized, shuffled
from plasticity_jax.data.tasks.originals import Columns, read_rows
from plasticity_jax.errors import UserError

log = logging.getLogger("plasticity_jax")

LETTERS = "ABCDEFGHIJ"
EMPTY = "empty question or answer"
TOO_LONG = "too long"
LEAK = "also a test question"


@dataclass(frozen=True)
class Published:
    """Size of the training set in the paper, before and after the task's filters."""

    read: int
    kept: int


@dataclass(frozen=True)
class Candidate:
    """A row that passes the filters.

    Attributes:
      questions: texts that identify the question. A training row is dropped if it shares one with a test row, comparing only letters and digits.
    """

    example: Example
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Dropped:
    """A row that a filter drops; `reason` is the filter's name in the counts."""

    reason: str


Row = Candidate | Dropped


class FirstShuffled:
    """The first `n` of `shuffled(rows, seed)` for streamed rows, with at most `n` in memory."""

    def __init__(self, n: int, seed: int):
        self._n, self._draw, self._position = n, random.Random(seed).random, count()
        self._heap: list[tuple[float, int, Example]] = []  # the last in the order is on top

    def add(self, row: Example) -> None:
        item = (-self._draw(), -next(self._position), row)
        if len(self._heap) < self._n:
            heapq.heappush(self._heap, item)
        elif item > self._heap[0]:
            heapq.heapreplace(self._heap, item)

    def rows(self) -> list[Example]:
        return [row for _, _, row in sorted(self._heap, reverse=True)]


def options_text(options: Sequence[str]) -> str:
    """The options with their letters, one per line, up to J.

    Source: paper section 4.2, prompts of MedMCQA, MMLUProCoT and RACE.
    """
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def is_empty(*texts: str) -> bool:
    """Whether one of the texts is empty or white space."""
    return not all(text.strip() for text in texts)


def build_rows(task: str, settings: RowSettings, train: Iterable[Row], test: Iterable[Row], published: Published) -> Rows:
    """Makes the rows of a task from its filtered published rows.

    Drops training rows that ask the question of a test row (`Candidate.questions`). Unlike `without_leaks`, allows one question to contain another,
    because short questions are part of many unrelated longer ones. Training rows are sampled from the stream, so that only the requested rows are
    in memory.

    Args:
      train, test: each is read once, test first.
      published: the paper's counts. Logs a warning if as many training rows are read as in the paper but another number is kept.
    Returns:
      At most as many rows as requested, in the order of `settings.seed`. The counts are "read" (training set), the rows of every filter, "train",
      and the same for the test sets with the prefix "test: ".
    """
    test_counts: Counter[str] = Counter()
    kept_test = list(_counted(test, test_counts))
    asked = {normalized(question) for row in kept_test for question in row.questions}
    counts: Counter[str] = Counter()
    drawn = FirstShuffled(settings.train_rows, settings.seed)
    for row in _counted(train, counts):
        if any(normalized(question) in asked for question in row.questions):
            counts[LEAK] += 1
        else:
            drawn.add(row.example)
    kept = counts.pop("kept", 0)
    if counts["read"] == published.read and kept != published.kept:
        log.warning(
            "%s: the filters keep %s of %s rows, but %s in the paper; its data or filters differ",
            task,
            f"{kept:,}",
            f"{published.read:,}",
            f"{published.kept:,}",
        )
    examples = shuffled((row.example for row in kept_test), settings.seed)[: settings.test_rows]
    test_counts["test"] = test_counts.pop("kept", 0)
    totals = {**counts, "train": kept - counts[LEAK]} | {name if name == "test" else f"test: {name}": n for name, n in test_counts.items()}
    return Rows(drawn.rows(), examples, counts=totals)


def build_test(settings: RowSettings, test: Iterable[Row]) -> Rows:
    """Makes the rows of a task without training rows: as `build_rows`, with the counts of the test set without a prefix."""
    counts: Counter[str] = Counter()
    examples = shuffled((row.example for row in _counted(test, counts)), settings.seed)[: settings.test_rows]
    counts["test"] = counts.pop("kept", 0)
    return Rows([], examples, counts=dict(counts))


def _counted(rows: Iterable[Row], counts: Counter[str]) -> Iterator[Candidate]:
    for row in rows:
        counts["read"] += 1
        if isinstance(row, Dropped):
            counts[row.reason] += 1
        else:
            counts["kept"] += 1
            yield row


def read_set(
    task: str, settings: RowSettings, name: str, columns: Columns, *, otherwise: Columns | None = None, why: str = ""
) -> Iterator[tuple[str, dict]]:
    """`read_rows` of one of the task's sets.

    Raises:
      UserError: the settings give no place for the set; or see `read_rows`.
    """
    if name not in settings.files:
        raise UserError(f"tasks.{task}.files has no {name!r}, and {task} brings no rows of its own; give the file or folder that holds them.")
    return read_rows(settings.files[name], columns, what=f"{task} {name}{why}", otherwise=otherwise)


def example_of(name: str, row_id: str, prompt: str, response: str, answer: str, *, subset: str = "") -> Example:
    """An example from the user's files. The set's name is its published split."""
    return Example(id=f"{name}:{row_id}", prompt=prompt, response=response, answer=answer, source=f"files:{row_id}", source_split=name, subset=subset)
