"""MedMCQA: medical exam questions with four options; trained on written-out reasoning, tested on the validation split."""

import re
from collections.abc import Iterator

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
from plasticity_jax.errors import UserError

NAME = "MedMCQA"
PUBLISHED = Published(read=182_736, kept=182_555)
MAX_CHARACTERS = 10_000
OPTIONS = ("opa", "opb", "opc", "opd")

# The answer at the very end. Some add the option's text in one word ("Answer: A. ade").
_ENDING = re.compile(r"Answer: ([A-D])(?:\.(?: \w+\.?)?)?\Z")


def build(wheels, settings: RowSettings) -> Rows:
    """Set "train" is HPAI-BSC/medmcqa-cot-llama31 (columns question and response), "validation" is openlifescienceai/medmcqa's (4,183 rows).

    Training prompts are the text after "Question: " in the published question: the question, "Options:" and the lettered options. Test prompts
    have the same form. Drops responses of more than 10,000 characters (12 of 182,736) and those that do not end with the answer (169); 182,555
    remain. Replaces "Answer: X." at the end, and every other "Answer: ", with "The answer is ".

    Source: paper section 4.2 for rows and formats; the limit and the ending are those of the authors' data notebook.
    """
    return build_rows(NAME, settings, _train(settings), _test(settings), PUBLISHED)


def _train(settings: RowSettings) -> Iterator[Row]:
    for row_id, row in read_set(NAME, settings, "train", {"question": str, "response": str}):
        before, marked, after = row["question"].partition("Question: ")
        prompt, response = after if marked else before, row["response"]
        ending = _ENDING.search(response)
        if is_empty(prompt, response):
            yield Dropped(EMPTY)
        elif len(response) > MAX_CHARACTERS:
            yield Dropped(TOO_LONG)
        elif ending is None:
            yield Dropped("no answer at the end")
        else:
            response = f"{response[: ending.start()]}Answer: {ending[1]}.".replace("Answer: ", "The answer is ")
            yield Candidate(example_of("train", row_id, prompt, response, ending[1]), (prompt,))


def _test(settings: RowSettings) -> Iterator[Row]:
    columns = {"question": str, "cop": int} | dict.fromkeys(OPTIONS, str)
    for row_id, row in read_set(NAME, settings, "validation", columns):
        if not 0 <= row["cop"] < len(OPTIONS):
            raise UserError(
                f"{NAME} validation: {row_id}: cop={row['cop']} is not an option; give openlifescienceai/medmcqa's validation split, where cop is 0 to 3"
            )
        if is_empty(row["question"]):
            yield Dropped(EMPTY)
            continue
        letter, prompt = LETTERS[row["cop"]], f"{row['question']}\nOptions:\n{options_text([row[name] for name in OPTIONS])}"
        yield Candidate(example_of("validation", row_id, prompt, f"The answer is {letter}.", letter), (prompt,))


MEDMCQA = Task(
    name=NAME,
    grader="letter",
    labels=tuple("ABCD"),
    packages=(),
    chance_note="one of four options: about 0.25 of the rows",
    build=build,
    sets={"train": Origin("HPAI-BSC/medmcqa-cot-llama31"), "validation": Origin("openlifescienceai/medmcqa", "*validation*")},
    published=(PUBLISHED.kept, 4_183),
)
