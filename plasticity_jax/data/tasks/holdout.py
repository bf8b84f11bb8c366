"""Rows of real questions, kept apart: no training row resembles a test row."""

from collections.abc import Sequence
from dataclasses import dataclass

from plasticity_jax.data.sources import split_of
from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, shuffled
from plasticity_jax.data.tasks.overlap import drop_overlaps


@dataclass(frozen=True)
class Question:
    """A row, and the texts in which another row could be the same: its question and, where it has one, its passage."""

    row: Example
    texts: tuple[str, ...]


def split_by_hash(questions: Sequence[Question], settings: RowSettings) -> tuple[list[Question], list[Question]]:
    """Training and test questions of a source with one split: by the hash of their last text, so equal passages never part.

    Without passages that is the question.
    """
    sides: dict[str, list[Question]] = {"train": [], "held_out": []}
    for question in questions:
        sides[split_of(question.texts[-1], settings.held_out_fraction)].append(question)
    return sides["train"], sides["held_out"]


def disjoint_rows(train: Sequence[Question], test: Sequence[Question], settings: RowSettings, counts: dict[str, int] | None = None) -> Rows:
    """Drops the training questions that resemble any test question by `drop_overlaps`, in either text, and draws as many rows as asked for.

    All test questions count here, however many are drawn, so `test_rows` changes no training row.

    Args:
      train, test: their texts correspond: the first with the first, the second with the second.
      counts: what was filtered before.
    Returns:
      The rows; their counts say further how many were dropped here and how many there were to draw from.
    """
    kept, dropped = list(train), 0
    for index in range(len(test[0].texts) if test else 0):
        kept, found = drop_overlaps(kept, [question.texts[index] for question in test], lambda question: question.texts[index])
        dropped += found
    train_rows, test_rows = ([question.row for question in shuffled(side, settings.seed)] for side in (kept, test))
    counts = (counts or {}) | {"resemble a test row": dropped, "train": len(kept), "test": len(test)}
    return Rows(train_rows[: settings.train_rows], test_rows[: settings.test_rows], counts)
