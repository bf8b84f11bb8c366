"""Fine-tuning tasks, one small file each: the paper's tasks, substitutes for them, and small tasks for small models.

Test and validation rows never appear among training rows, however many rows are requested.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from plasticity_jax.data.content import content_hash
from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task
from plasticity_jax.data.tasks.files import read_task, write_task
from plasticity_jax.data.tasks.module import module_file, task_of_module
from plasticity_jax.data.tasks.table import table_task
from plasticity_jax.data.tasks.validation import with_validation
from plasticity_jax.errors import UserError
from plasticity_jax.plugins import Discovered, discover

if TYPE_CHECKING:
    from plasticity_jax.config import TaskConfig
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


def get_task(name: str, own: Mapping[str, "TaskConfig"] | None = None) -> Task:
    """The task of that name.

    Args:
      own: settings of the tasks of a config (`config.tasks`), which declare a task of the user's own where they name a table or a module.
    Raises:
      UserError: there is none; the message names the nearest one and lists them all. Or the user's own cannot be had.
    """
    settings = (own or {}).get(name)
    if settings is not None and settings.of_table:
        return table_task(name, settings)
    if settings is not None and settings.module is not None:
        return task_of_module(name, settings.module)
    known = tasks()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        left_out = "".join(f" {problem}." for problem in discovered().problems)
        raise UserError(
            f"task {name!r} is unknown; did you mean {nearest!r}? The tasks are {', '.join(known)}; one of your own needs rows or a module "
            f"(docs/tasks.md).{left_out}"
        )
    return known[name]


def code_of(name: str, own: Mapping[str, "TaskConfig"] | None = None) -> str | None:
    """The sha256 of the Python file that declares a task; None for a task of ours, or of a table."""
    settings = (own or {}).get(name)
    if settings is not None and settings.module is not None:
        return content_hash(module_file(settings.module))
    file = None if settings is not None and settings.of_table else discovered().files.get(name)
    return content_hash(file) if file else None


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
    validation_rows: int = 0,
    verifier_rows: int = 0,
    files: Mapping[str, str] | None = None,
    own: Mapping[str, "TaskConfig"] | None = None,
) -> Rows:
    """Makes the rows of a task. Splits are disjoint, and equal arguments give equal rows on every machine.

    A row's split depends only on its text, so `train_rows` and `seed` never move a row to another split. Classes keep their natural
    frequencies.

    Args:
      name: a key of `tasks()`.
      wheels: the task's packages; unused by generated tasks.
      train_rows, test_rows: upper limits; a source that has fewer rows gives all it has.
      held_out_fraction: fraction of documents or number pairs kept for test rows; use the corpus's own fraction, so that test
        documents were not in the pretraining data.
      seed: the order in which rows are drawn.
      validation_rows: upper limit of the validation rows, see `with_validation`; the training rows then follow them in the order of `seed`.
      verifier_rows: training rows reserved for an outcome verifier, in addition to `train_rows`; rows without an answer are then removed.
      files: set of the task → places of its original rows, for tasks with `sets`.
      own: see `get_task`.
    Raises:
      UserError: the task is unknown, a number is out of range, a wheel is missing or altered, files are missing or have another schema, a split
        is empty, or there are too few training rows.
    """
    task = get_task(name, own)

    def build(n: int) -> Rows:
        return task.build(wheels, RowSettings(n, test_rows, held_out_fraction, seed, files or {}))

    needed = train_rows + verifier_rows
    rows = with_validation(build, name=name, wanted=validation_rows, needed=needed) if validation_rows else build(needed)
    for split, found in (("train", rows.train), ("test", rows.test)):
        if not found and (split == "test" or task.trained):
            way_out = "give files with rows that its filters keep" if task.sets else "use a held_out_fraction such as 0.1"
            raise UserError(
                f"task {name!r} is left without {split} rows (held_out_fraction={held_out_fraction}, {rows.counts or 'no filters'}); {way_out}."
            )
    if not task.trained:
        return rows
    # If there are too few rows, the verifier gets the full number that the user asked for.
    n_train = min(train_rows, len(rows.train) - verifier_rows)
    if n_train < 1:
        raise UserError(f"tasks.{name}.verifier_rows={verifier_rows} leaves no row of the {len(rows.train)} to fine-tune on; lower it.")
    # A row without a readable answer can be trained on, but nothing can be graded against it.
    verifier = [row for row in rows.train[n_train : n_train + verifier_rows] if row.answer]
    return dataclasses.replace(rows, train=rows.train[:n_train], verifier=verifier, validation=rows.validation if validation_rows else [])
