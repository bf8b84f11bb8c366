"""PubMedQA: whether an abstract answers its title's question with yes, no or maybe."""

from collections.abc import Iterator

from plasticity_jax.data.tasks.base import Origin, Rows, RowSettings, Task
from plasticity_jax.data.tasks.published import EMPTY, TOO_LONG, Candidate, Dropped, Published, Row, build_rows, example_of, is_empty, read_set

NAME = "PubMedQA"
PUBLISHED = Published(read=211_269, kept=211_168)
ANSWERS = ("yes", "no", "maybe")
MAX_PROMPT, MAX_RESPONSE = 4_000, 1_500  # in characters; training rows with this many or more are dropped
COLUMNS = {"question": str, "context": {"contexts": list[str]}, "long_answer": str, "final_decision": str}


def build(wheels, settings: RowSettings) -> Rows:
    """Set "pqa_artificial" of qiaojin/PubMedQA is for training, "pqa_labeled" (1,000 rows) for the test.

    Keeps training rows with a prompt under 4,000 and a response under 1,500 characters: 211,168 of 211,269.

    Source: paper section 4.2; the wording of prompt and response is that of the authors' data notebook.
    """
    return build_rows(NAME, settings, _rows("pqa_artificial", settings, limited=True), _rows("pqa_labeled", settings, limited=False), PUBLISHED)


def pubmedqa_prompt(question: str, contexts: list[str]) -> str:
    return (
        "Based on the paper abstract below, answer the following question with 'yes', 'maybe', or 'no'.\n\n"
        f"Question: {question}\n\nAbstract: {' '.join(contexts)}"
    )


def pubmedqa_response(conclusion: str, answer: str) -> str:
    return f"The conclusion of the abstract is: {conclusion} Therefore, the answer is {answer}."


def _rows(name: str, settings: RowSettings, *, limited: bool) -> Iterator[Row]:
    for row_id, row in read_set(NAME, settings, name, COLUMNS):
        question, contexts, conclusion, answer = row["question"], row["context"]["contexts"], row["long_answer"], row["final_decision"]
        prompt, response = pubmedqa_prompt(question, contexts), pubmedqa_response(conclusion, answer)
        if is_empty(question, conclusion, answer):
            yield Dropped(EMPTY)
        elif answer not in ANSWERS:
            yield Dropped("answer is not yes, no or maybe")
        elif limited and (len(prompt) >= MAX_PROMPT or len(response) >= MAX_RESPONSE):
            yield Dropped(TOO_LONG)
        else:
            yield Candidate(example_of(name, row_id, prompt, response, answer), (question,))


PUBMEDQA = Task(
    name=NAME,
    grader="exact",
    labels=ANSWERS,
    packages=(),
    chance_note="yes is the answer of about 0.55 of the test rows",
    build=build,
    sets={name: Origin("qiaojin/PubMedQA", f"{name}/*") for name in ("pqa_artificial", "pqa_labeled")},
    published=(PUBLISHED.kept, 1_000),
)
