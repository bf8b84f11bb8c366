"""Tests beyond the tasks that models are fine-tuned on: CRUXEval, BoardgameQA, TabMWP and StrategyQA, from their published files.

They have no training rows. Every base model and every fine-tuned model answers them, in the template of the study.

Source: paper section 4.2 names them; prompts and gold answers are those of the authors' data scripts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from plasticity_jax.data.tasks.base import Origin, Rows, RowSettings, Task
from plasticity_jax.data.tasks.originals import Columns
from plasticity_jax.data.tasks.published import EMPTY, TOO_LONG, Candidate, Dropped, Row, build_test, example_of, is_empty, read_set
from plasticity_jax.errors import UserError

SET = "test"
WORDS_TO_TOKENS, MAX_TOKENS = 1.3, 2048  # the original leaves out BoardgameQA's prompts that are longer by this estimate
BOARDGAME = {"proved": "True", "disproved": "False", "unknown": "Uncertain"}

Asked = tuple[str, str]  # prompt and gold answer


def cruxeval(row: dict[str, Any]) -> Asked:
    """cruxeval-org/cruxeval, split test: 800 Python functions with an input, whose output is asked for."""
    return (
        f"You are given the following function:\n\n{row['code']}\n\nYou are also given the following input (the order of the input is the same as the "
        f"order of the input variables in the function):\n\n{row['input']}\n\nWith the given function and input, what would be the output?",
        row["output"],
    )


def boardgameqa(row: dict[str, Any]) -> Asked:
    """tasksource/Boardgame-QA, split test: whether rules that contradict one another prove a statement."""
    if row["label"] not in BOARDGAME:
        raise UserError(f"BoardgameQA test: label {row['label']!r} is none of {', '.join(BOARDGAME)}; give the data set as it was published")
    return f'Solve the following problem. Your final answer should be "True", "False", or "Uncertain".\n\n{row["example"]}', BOARDGAME[row["label"]]


def tabmwp(row: dict[str, Any]) -> Asked:
    """TabMWP, JSON lines of its 1,000 test problems (problems_test1k): a question on a table."""
    return (
        f"You are given a table with the following data:\n\n{row['table']}\n\nBased on the table, answer the following question:\n\n{row['question']}",
        row["answer"],
    )


def strategyqa(row: dict[str, Any]) -> Asked:
    """StrategyQA's strategyQA_train.json, whose answers are published: facts, and a question that follows from them."""
    facts = "".join(f"{number}. {fact}\n" for number, fact in enumerate(row["facts"], 1))
    return (
        f"You are given the following facts:\n{facts}\nBased on the facts above, answer the following question. Your final answer should be either "
        f'"True" or "False".\n{row["question"]}',
        str(row["answer"]),
    )


def build(name: str, columns: Columns, ask: Callable[[dict[str, Any]], Asked], longest: int | None, wheels, settings: RowSettings) -> Rows:
    def rows() -> Iterator[Row]:
        for row_id, row in read_set(name, settings, SET, columns):
            prompt, answer = ask(row)
            if is_empty(prompt, answer) or any(value == "" for value in row.values()):
                yield Dropped(EMPTY)
            elif longest is not None and len(prompt.split()) * WORDS_TO_TOKENS > longest:
                yield Dropped(TOO_LONG)
            else:
                yield Candidate(example_of(SET, row_id, prompt, f"The answer is {answer}.", answer), ())

    return build_test(settings, rows())


def _task(
    name: str,
    columns: Columns,
    ask: Callable[[dict[str, Any]], Asked],
    *,
    grader: str,
    rows: int | None,
    origin: Origin,
    chance: str,
    labels: tuple[str, ...] = (),
    longest: int | None = None,
) -> Task:
    return Task(
        name=name,
        grader=grader,
        labels=labels,
        packages=(),
        chance_note=chance,
        build=partial(build, name, columns, ask, longest),
        sets={SET: origin},
        published=(0, rows),
        trained=False,
    )


CRUXEVAL = _task(
    "CRUXEval",
    {"code": str, "input": str, "output": str},
    cruxeval,
    grader="literal",
    rows=800,
    origin=Origin("cruxeval-org/cruxeval"),
    chance="guessing the output of a function is right in almost no row",
)
BOARDGAMEQA = _task(
    "BoardgameQA",
    {"example": str, "label": str},
    boardgameqa,
    grader="exact",
    rows=None,
    origin=Origin("tasksource/Boardgame-QA", "*test*"),
    chance="one of three answers: about a third of the rows",
    labels=tuple(BOARDGAME.values()),
    longest=MAX_TOKENS,
)
TABMWP = _task(
    "TabMWP",
    {"question": str, "table": str, "answer": str},
    tabmwp,
    grader="math",
    rows=1_000,
    origin=Origin("https://github.com/lupantech/PromptPG (data/tabmwp/problems_test1k.json; one object per line)"),
    chance="a quarter of the questions have options, the others a number that guessing hardly finds",
)
STRATEGYQA = _task(
    "StrategyQA",
    {"question": str, "facts": list[str], "answer": bool},
    strategyqa,
    grader="exact",
    rows=2_290,
    origin=Origin("https://allenai.org/data/strategyqa (strategyqa_train.json)"),
    chance="one of two answers: about half of the rows",
    labels=("True", "False"),
)
