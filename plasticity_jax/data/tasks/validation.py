"""Validation rows: taken from the training side of a task, so that no row to fine-tune on resembles one of them."""

import logging
import os.path
from collections.abc import Callable, Sequence

from plasticity_jax.data.tasks.base import Example, Rows, without_leaks
from plasticity_jax.data.tasks.overlap import drop_overlaps, overlapping_pairs
from plasticity_jax.errors import UserError

log = logging.getLogger("plasticity_jax")

# The rows that validation rows are drawn from, per row wanted. A source must hold so many that most are left to train on.
POOL = 5


def with_validation(build: Callable[[int], Rows], *, name: str, wanted: int, needed: int) -> Rows:
    """Builds a task's rows and takes validation rows from them.

    The first rows of the training order are walked: each that is not yet taken becomes a validation row, and takes along those that resemble it, so
    that problems made from one template stay on one side. Only the first `POOL` · `wanted` rows are looked at, so the same rows are taken
    however many training rows are requested. Every training row that equals, contains or is contained in a validation row (`without_leaks`), or
    resembles one (`drop_overlaps`), is dropped; prompts are compared, without the words that all begin or end with.

    Args:
      build: number of training rows → the rows of the task.
      name: of the task, for messages.
      wanted: validation rows, at least 1.
      needed: training rows that are to be left, if the source has them.
    Returns:
      The rows, with at most `wanted` validation rows, a fifth of the source at most. The counts say how many training rows were dropped.
    Raises:
      UserError: the source is too small to give one.
    """
    pool = POOL * wanted
    asked = max(pool, wanted + needed + needed // 4)  # some resemble a validation row
    while True:
        rows = build(asked)
        found = _split(rows, pool, wanted, name)
        if len(found.train) >= needed or len(rows.train) < asked:
            return found
        asked *= 2


def _split(rows: Rows, pool: int, wanted: int, name: str) -> Rows:
    # A row without a readable answer can be trained on, but nothing can be graded against it.
    drawn_from = [row for row in (rows.validation or rows.train)[:pool] if row.answer]
    compared = without_template([row.prompt for row in drawn_from])
    most = len(drawn_from) if rows.validation else len(drawn_from) // POOL
    validation = _take([compared(row) for row in drawn_from], drawn_from, min(wanted, most))
    if not validation:
        raise UserError(
            f"tasks.{name}.validation_rows={wanted} needs at least {POOL} training rows with an answer, and there are {len(drawn_from)}; set it to 0."
        )
    if len(validation) < wanted:
        log.warning("task %s: %d validation rows instead of tasks.%s.validation_rows=%d; its source has no more", name, len(validation), name, wanted)
    ids = {row.id for row in validation}
    others = [row for row in rows.train if row.id not in ids]
    texts = [compared(row) for row in validation]
    train, equal = without_leaks(others, texts, compared)
    train, alike = drop_overlaps(train, texts, compared)
    if not train:
        raise UserError(f"tasks.{name}.validation_rows={wanted}: every training row resembles a validation row; lower it, or set it to 0.")
    return Rows(train, rows.test, rows.counts | {"validation": len(validation), "resemble a validation row": equal + alike}, validation=validation)


def _take(texts: Sequence[str], rows: Sequence[Example], wanted: int) -> list[Example]:
    taken: dict[int, None] = {}
    for position, alike in enumerate(overlapping_pairs(texts)):
        if len(taken) < wanted and position not in taken:
            taken |= dict.fromkeys([position, *sorted(alike)])
    return [rows[position] for position in list(taken)[:wanted]]


def without_template(prompts: Sequence[str]) -> Callable[[Example], str]:
    """A row's prompt without the words that all of `prompts` begin or end with, such as the question that follows every text."""
    words = [prompt.split() for prompt in dict.fromkeys(prompts)]
    if len(words) < 2:
        return lambda row: row.prompt
    first, last = (len(os.path.commonprefix(side)) for side in (words, [of_prompt[::-1] for of_prompt in words]))
    return lambda row: " ".join(_cut(row.prompt.split(), first, last))


def _cut(words: list[str], first: int, last: int) -> list[str]:
    return words[first : max(first, len(words) - last)]
