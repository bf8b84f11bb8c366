"""The test sets of MetaMathQA and SimpleScaling: GSM8K-Platinum and MATH by level."""

from collections.abc import Iterator

from plasticity_jax.data.tasks.base import Origin, RowSettings
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.published import EMPTY, Candidate, Dropped, Row, example_of, is_empty, read_set

SETS = {"gsm8k-platinum": Origin("madrylab/gsm8k-platinum"), "math": Origin("EleutherAI/hendrycks_math", "*/test*")}
SUBSET_OF_LEVEL = {"Level 1": "MATH-1", "Level 2": "MATH-2", "Level 3": "MATH-3", "Level 4": "MATH-4", "Level 5": "MATH-Hard"}
ROWS = 6_209  # GSM8K-Platinum's 1,209 and MATH's 5,000
CHANCE = "guessing the value of an open answer is right in almost no row"


def math_test_rows(task: str, settings: RowSettings) -> Iterator[Row]:
    r"""Yields the rows of GSM8K-Platinum (1,209 rows; columns question and answer, which ends "#### n") and MATH (5,000: problem, solution, level).

    The gold answer is what follows "####", and the last \boxed{...}. Subsets: "GSM8K-Platinum"; "MATH-1" to "MATH-4" (437, 894, 1,131 and 1,214
    rows) and "MATH-Hard", level 5 (1,324).

    Source: paper sections 4.2 and 5.2.
    """
    for row_id, row in read_set(task, settings, "gsm8k-platinum", {"question": str, "answer": str}):
        _, marked, gold = row["answer"].rpartition("####")
        if is_empty(row["question"], gold if marked else row["answer"]):
            yield Dropped(EMPTY)
        elif not marked:
            yield Dropped("no #### before the answer")
        else:
            example = example_of("gsm8k-platinum", row_id, row["question"], row["answer"], gold.strip(), subset="GSM8K-Platinum")
            yield Candidate(example, (row["question"],))
    for row_id, row in read_set(task, settings, "math", {"problem": str, "solution": str, "level": str}):
        gold = last_boxed(row["solution"])
        if is_empty(row["problem"], row["solution"]):
            yield Dropped(EMPTY)
        elif not gold:
            yield Dropped("no \\boxed answer")
        elif row["level"] not in SUBSET_OF_LEVEL:
            yield Dropped("no level from 1 to 5")
        else:
            example = example_of("math", row_id, row["problem"], row["solution"], gold, subset=SUBSET_OF_LEVEL[row["level"]])
            yield Candidate(example, (row["problem"],))
