"""Reads the completions of an evaluate run, for reward models and verifiers."""

from typing import Any, NamedTuple

from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import COMPLETIONS, PROBLEMS
from plasticity_jax.runs.jsonfiles import read_jsonl
from plasticity_jax.runs.storage import AnyPath


class Completion(NamedTuple):
    """One graded completion.

    Attributes:
      id: of its problem.
      sample: 0 for the greedy one, then 1 to n.
      problem: the task's prompt, without template.
      prompt: the text given to the model, template included.
      text: what the model wrote.
      ended: whether it ended by itself, not at the token limit.
      correct: the grader's verdict.
    """

    id: str
    sample: int
    problem: str
    prompt: str
    text: str
    ended: bool
    correct: bool


def read_completions(folder: AnyPath) -> list[Completion]:
    """The completions of an evaluate run, problem by problem in their order, the greedy one first.

    Raises:
      UserError: a file or field is missing, a problem is unknown, or problems have different numbers of completions.
    """
    problems = {row["id"]: row for row in _rows(folder / PROBLEMS, ("id", "prompt", "problem"))}
    of_problem: dict[str, list[Completion]] = {name: [] for name in problems}
    path = folder / COMPLETIONS
    for row in _rows(path, ("id", "sample", "text", "ended", "correct")):
        if row["id"] not in problems:
            raise UserError(
                f"{path} answers the problem {row['id']!r}, which problems.jsonl does not hold; delete the run's directory and run its stage again."
            )
        asked = problems[row["id"]]
        of_problem[row["id"]].append(
            Completion(row["id"], row["sample"], asked["problem"], asked["prompt"], row["text"], bool(row["ended"]), bool(row["correct"]))
        )
    for name, found in of_problem.items():
        found.sort(key=lambda completion: completion.sample)
        if [completion.sample for completion in found] != list(range(max(len(next(iter(of_problem.values()))), 1))):
            raise UserError(
                f"{path} holds {len(found)} completions of the problem {name!r}, not as many as of the others; delete the run's directory and run its stage again."
            )
    return [completion for found in of_problem.values() for completion in found]


_KINDS: dict[str, type] = {"id": str, "prompt": str, "problem": str, "sample": int, "text": str, "ended": int, "correct": int}


def _rows(path: AnyPath, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing, so there are no completions to read; give an evaluate run of a task whose answers are generated.")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for name in fields:
            if not isinstance(row.get(name), _KINDS[name]):
                raise UserError(f"{path}: line {number} has no {name!r} of the right type; delete the run's directory and run its stage again.")
    return rows
