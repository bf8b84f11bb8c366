r"""SimpleScaling: the 59K questions of s1 with an attempt that ends in a \boxed answer, tested on GSM8K-Platinum and MATH."""

from collections.abc import Iterator

from plasticity_jax.data.tasks.base import Origin, Rows, RowSettings, Task
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.math_tests import CHANCE, ROWS, SETS, math_test_rows
from plasticity_jax.data.tasks.published import EMPTY, Candidate, Dropped, Published, Row, build_rows, example_of, is_empty, read_set

NAME = "SimpleScaling"
PUBLISHED = Published(read=58_986, kept=54_484)


def build(wheels, settings: RowSettings) -> Rows:
    r"""Set "train" is simplescaling/data_ablation_full59K: question → attempt, where the attempt has a \boxed: 54,484 of 58,986 rows.

    Keeps an attempt whose \boxed is never closed, as in the paper, with `answer` "".

    Source: paper section 4.2.
    """
    return build_rows(NAME, settings, _train(settings), math_test_rows(NAME, settings), PUBLISHED)


def _train(settings: RowSettings) -> Iterator[Row]:
    for row_id, row in read_set(NAME, settings, "train", {"question": str, "attempt": str}):
        question, attempt = row["question"], row["attempt"]
        if is_empty(question, attempt):
            yield Dropped(EMPTY)
        elif "\\boxed" not in attempt:
            yield Dropped("no \\boxed")
        else:
            yield Candidate(example_of("train", row_id, question, attempt, last_boxed(attempt) or ""), (question,))


SIMPLESCALING = Task(
    name=NAME,
    grader="math",
    labels=(),
    packages=(),
    chance_note=CHANCE,
    build=build,
    sets={"train": Origin("simplescaling/data_ablation_full59K"), **SETS},
    published=(PUBLISHED.kept, ROWS),
)
