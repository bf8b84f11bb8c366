"""Rows of real questions in which no training row resembles a test row."""

from collections.abc import Sequence
from dataclasses import dataclass

from plasticity_jax.data.sources import split_of
from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, shuffled
from plasticity_jax.data.tasks.overlap import drop_overlaps


@dataclass(frozen=True)
class Question:
    """A row, and the texts that are compared with those of other rows: its question and, if it has one, its passage."""

    row: Example
    texts: tuple[str, ...]


def split_by_hash(questions: Sequence[Question], settings: RowSettings) -> tuple[list[Question], list[Question]]:
    """Splits questions into training and test by the hash of their last text, so that equal passages stay on one side.

    The last text is the passage, or the question if there is no passage.
    """
    sides: dict[str, list[Question]] = {"train": [], "held_out": []}
    for question in questions:
        sides[split_of(question.texts[-1], settings.held_out_fraction)].append(question)
    return sides["train"], sides["held_out"]


def disjoint_rows(train: Sequence[Question], test: Sequence[Question], settings: RowSettings, counts: dict[str, int] | None = None) -> Rows:
    """Drops the training questions that resemble a test question in any text (`drop_overlaps`), then draws the rows.

    All test questions are compared, however many are drawn, so `test_rows` does not change the training rows.

    Args:
      train, test: questions whose texts correspond: first with first, second with second.
      counts: what earlier filters counted.
    Returns:
      The rows. Their counts also say how many were dropped here and how many there were to draw from.
    """
    kept, dropped = list(train), 0
    for index in range(len(test[0].texts) if test else 0):
        kept, found = drop_overlaps(kept, [question.texts[index] for question in test], lambda question: question.texts[index])
        dropped += found
    train_rows, test_rows = ([question.row for question in shuffled(side, settings.seed)] for side in (kept, test))
    counts = (counts or {}) | {"resemble a test row": dropped, "train": len(kept), "test": len(test)}
    return Rows(train_rows[: settings.train_rows], test_rows[: settings.test_rows], counts)


def hash_split_rows(questions: Sequence[Question], settings: RowSettings, counts: dict[str, int] | None = None) -> Rows:
    """`disjoint_rows` of a source with a single published split, divided by `split_by_hash`."""
    return disjoint_rows(*split_by_hash(questions, settings), settings, counts or {"read": len(questions)})
