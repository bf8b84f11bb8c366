"""RACE: reading comprehension of English exams of Chinese middle and high schools, four options."""

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

NAME = "RACE"
PUBLISHED = Published(read=92_753, kept=92_737)
MAX_CHARACTERS = 6_144  # of prompt and response; training rows with this many or more are dropped
N_OPTIONS = 4
COLUMNS = {"article": str, "question": str, "options": list[str], "answer": str}
# The layout of the original files and TFDS: an article with its questions.
BY_ARTICLE = {"article": str, "questions": list[str], "options": list[list[str]], "answers": list[str]}

# The beginning of one training row that is not a question.
NO_QUESTION = "But when you see each other, you can share something you didn't have before"

# Website stamps and leftover layout marks at the end of questions and options.
JUNK_CHARACTERS = 100  # the search takes quadratic time
_JUNK = re.compile(
    r"""(?:\s*+(?:
        (?:https?://|www\W)\S*(?:k\W*s\W*[58]|szzx100)\S*+
      | k\W*s\W*5\W*u(?:\W?c(?:om)?)?
      | \[?:?zxxk(?:\W?com)?\]?
      | s6t-++
      | [\[(][\s,:]*+[\])]
      | \[:?
      | [*^|`>]
      | --++
    ))++\s*\Z""",
    re.IGNORECASE | re.VERBOSE,
)


def build(wheels, settings: RowSettings) -> Rows:
    """Sets "train", "validation" (both for training) and "test" (4,934 rows) of ehovy/race, middle and high school together.

    Also reads files with an article per row and lists of questions, options and answers, as in TFDS. Of 92,753 training rows, drops one that is not
    a question and those of 6,144 characters or more (15); 92,737 remain. Removes website stamps and layout marks at the end of questions and
    options. The authors' list also removes digits, quotes and slashes ("100" becomes "10") and fixes six typos, which is not done here.

    Source: paper section 4.2; the wording of prompt and response is that of the authors' data notebook.
    """
    train = (row for name in ("train", "validation") for row in _rows(name, settings, limited=True))
    return build_rows(NAME, settings, train, _rows("test", settings, limited=False), PUBLISHED)


def clean(text: str) -> str:
    """Removes junk from the end of `text`, within its last 100 characters."""
    return text[:-JUNK_CHARACTERS] + _JUNK.sub("", text[-JUNK_CHARACTERS:])


def race_prompt(article: str, question: str, options: list[str]) -> str:
    return f"Answer the question below based only on the provided passage.\n\nPassage: {article}\n\nQuestion: {question}\n{options_text(options)}"


def race_response(option: str, letter: str) -> str:
    return f"{option}{'' if option.endswith('.') else '.'} Therefore, the answer is {letter}."


def _rows(name: str, settings: RowSettings, *, limited: bool) -> Iterator[Row]:
    for row_id, row in read_set(NAME, settings, name, COLUMNS, otherwise=BY_ARTICLE):
        if "question" in row:
            yield _row(name, row_id, row["article"], row["question"], row["options"], row["answer"], limited=limited)
            continue
        if not len(row["questions"]) == len(row["options"]) == len(row["answers"]):
            yield Dropped("article with questions, options and answers of different numbers")
            continue
        for number, (question, options, answer) in enumerate(zip(row["questions"], row["options"], row["answers"], strict=True), 1):
            yield _row(name, f"{row_id}.{number}", row["article"], question, options, answer, limited=limited)


def _row(name: str, row_id: str, article: str, question: str, options: list[str], answer: str, *, limited: bool) -> Row:
    if is_empty(article, question, answer):
        return Dropped(EMPTY)
    if len(options) != N_OPTIONS or answer not in tuple(LETTERS[:N_OPTIONS]):
        return Dropped("not four options with one of A to D as the answer")
    if question.startswith(NO_QUESTION):
        return Dropped("no question")
    question, options = clean(question), [clean(option) for option in options]
    prompt, response = race_prompt(article, question, options), race_response(options[LETTERS.index(answer)], answer)
    if limited and len(prompt) + len(response) >= MAX_CHARACTERS:
        return Dropped(TOO_LONG)
    return Candidate(example_of(name, row_id, prompt, response, answer), (f"{question} {' '.join(options)}",))


RACE = Task(
    name=NAME,
    grader="letter",
    labels=tuple(LETTERS[:N_OPTIONS]),
    packages=(),
    chance_note="one of four options: about 0.25 of the rows",
    build=build,
    sets={split: Origin("ehovy/race", f"all/{split}*") for split in ("train", "validation", "test")},
    published=(PUBLISHED.kept, 4_934),
)
