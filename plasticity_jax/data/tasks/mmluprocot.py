"""MMLUProCoT: exam questions with up to ten options, trained on reasoning sampled from a larger model."""

from collections.abc import Iterator

import numpy as np

from plasticity_jax.data.tasks.base import Origin, Rows, RowSettings, Task
from plasticity_jax.data.tasks.published import (
    EMPTY,
    LETTERS,
    TOO_LONG,
    Candidate,
    Dropped,
    Published,
    Row,
    build_rows,
    example_of,
    is_empty,
    options_text,
    read_set,
)

NAME = "MMLUProCoT"
PUBLISHED = Published(read=130_811, kept=123_836)
COLUMNS = {"question": str, "options": list[str], "answer": str, "cot_content": str}
MAX_CHARACTERS = 6_144  # of prompt and response; training rows with this many or more are dropped
# Number of questions to move to the test set, and the seed that chooses them, as in the paper.
N_MOVED, SEED = 500, 42


def build(wheels, settings: RowSettings) -> Rows:
    """Both sets are splits of dongboklee/MMLU-Pro-Llama-3.1-70B-Instruct-CoT: "test" is for training, "validation" (67 questions) for the test.

    Of 130,811 rows, drops those that do not end with the right letter (699), all rows of 500 questions, which move to the test set, and those of
    6,144 characters or more (84); 123,836 remain. As in the paper, NumPy's generator with seed 42 chooses among the distinct questions in order.
    With fewer than 5,000 questions, a tenth moves. Questions are identified by their text.

    Source: paper section 4.2; choice and answer rule are those of the authors' data notebook.
    """
    moved = _moved(settings)
    return build_rows(NAME, settings, _train(settings, moved), _test(settings, moved), PUBLISHED)


def final_answer(response: str) -> str:
    """The text after the last "answer is", and after the last colon in it, without final punctuation; "" if there is none."""
    _, marked, answer = response.rpartition("answer is")
    return answer.rpartition(":")[2].strip().rstrip(".,;!?") if marked else ""


def _read(name: str, settings: RowSettings, why: str) -> Iterator[tuple[str, dict, str | None]]:
    """(id, row, name of the filter that drops it, if any)."""
    for row_id, row in read_set(NAME, settings, name, COLUMNS, why=why):
        reason = None
        if is_empty(row["question"], row["answer"]):
            reason = EMPTY
        elif row["answer"] not in tuple(LETTERS[: len(row["options"])]):
            reason = "answer is not among the options"
        yield row_id, row, reason


def _moved(settings: RowSettings) -> dict[str, tuple[str, dict]]:
    """Question → (id, row) of the first of its rows, for those that move to the test set."""
    first: dict[str, tuple[str, dict]] = {}
    for row_id, row, reason in _read("test", settings, ", to choose test questions"):
        if reason is None and final_answer(row["cot_content"]) == row["answer"]:
            first.setdefault(row["question"], (row_id, row))
    questions = list(first)
    chosen = np.random.default_rng(SEED).choice(len(questions), size=min(N_MOVED, len(questions) // 10), replace=False) if questions else []
    return {questions[i]: first[questions[i]] for i in sorted(chosen)}


def _train(settings: RowSettings, moved: dict[str, tuple[str, dict]]) -> Iterator[Row]:
    for row_id, row, reason in _read("test", settings, ""):
        prompt, response = _prompt(row), row["cot_content"]
        if reason is not None or is_empty(response):
            yield Dropped(reason or EMPTY)
        elif final_answer(response) != row["answer"]:
            yield Dropped("wrong final answer")
        elif row["question"] in moved:
            yield Dropped("moved to the test set")
        elif len(prompt) + len(response) >= MAX_CHARACTERS:
            yield Dropped(TOO_LONG)
        else:
            yield Candidate(example_of("test", row_id, prompt, response, row["answer"]), (row["question"],))


def _test(settings: RowSettings, moved: dict[str, tuple[str, dict]]) -> Iterator[Row]:
    seen = set()
    for row_id, row, reason in _read("validation", settings, ""):
        if reason is not None:
            yield Dropped(reason)
        elif row["question"] in seen:
            yield Dropped("a question again")
        else:
            seen.add(row["question"])
            yield _test_row("validation", row_id, row)
    for question, (row_id, row) in moved.items():
        yield Dropped("a question again") if question in seen else _test_row("test", row_id, row)


def _test_row(name: str, row_id: str, row: dict) -> Candidate:
    return Candidate(example_of(name, row_id, _prompt(row), f"The answer is {row['answer']}.", row["answer"]), (row["question"],))


def _prompt(row: dict) -> str:
    return f"{row['question']}\n{options_text(row['options'])}"


MMLUPROCOT = Task(
    name=NAME,
    grader="letter",
    labels=tuple(LETTERS),
    packages=(),
    chance_note="one of ten options as a rule: about 0.1 of the rows",
    build=build,
    sets={split: Origin("dongboklee/MMLU-Pro-Llama-3.1-70B-Instruct-CoT", f"*{split}*") for split in ("test", "validation")},
    published=(PUBLISHED.kept, N_MOVED + 67),
)
