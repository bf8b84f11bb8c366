"""MetaMathQA: 395,000 rewritten questions of the training sets of GSM8K and MATH, tested on GSM8K-Platinum and MATH."""

from collections.abc import Iterator

from plasticity_jax.data.tasks.base import Origin, Rows, RowSettings, Task
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.math_tests import CHANCE, ROWS, SETS, math_test_rows
from plasticity_jax.data.tasks.published import EMPTY, Candidate, Dropped, Published, Row, build_rows, example_of, is_empty, read_set

NAME = "MetaMathQA"
PUBLISHED = Published(read=395_000, kept=395_000)
COLUMNS = {"query": str, "response": str, "original_question": str}


def build(wheels, settings: RowSettings) -> Rows:
    """Set "train" is meta-math/MetaMathQA: query → response, which ends "The answer is: X". Drops only empty texts,
    and rows whose query or original question is a test question.

    Source: paper section 4.2.
    """
    return build_rows(NAME, settings, _train(settings), math_test_rows(NAME, settings), PUBLISHED)


def _train(settings: RowSettings) -> Iterator[Row]:
    for row_id, row in read_set(NAME, settings, "train", COLUMNS):
        query, response = row["query"], row["response"]
        if is_empty(query, response):
            yield Dropped(EMPTY)
            continue
        _, marked, answer = response.rpartition("The answer is:")
        answer = answer.strip() if marked else last_boxed(response) or ""
        yield Candidate(example_of("train", row_id, query, response, answer), (query, row["original_question"]))


METAMATHQA = Task(
    name=NAME,
    grader="math",
    labels=(),
    packages=(),
    chance_note=CHANCE,
    build=build,
    sets={"train": Origin("meta-math/MetaMathQA"), **SETS},
    published=(PUBLISHED.kept, ROWS),
)
