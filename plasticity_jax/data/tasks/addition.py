"""Addition with a written-out chain of thought, least significant digit first.

    47+85=?    7+5=12 carry 1. 4+8+1=13 carry 1. The answer is 132.

Each step is simple: copy two digits from the prompt, look up a one-digit sum, and copy a carry from the text before it.
"""

from functools import partial
from typing import TYPE_CHECKING

from plasticity_jax.data.sources import split_of
from plasticity_jax.data.tasks.base import Example, Rows, RowSettings, Task, answer_sentence, shuffled

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels


def addition_prompt(first: int, second: int) -> str:
    return f"{first}+{second}=?"


def addition_response(first: int, second: int) -> str:
    """The written-out sum of two non-negative integers of the same number of digits, ending "The answer is N."."""
    steps, carry = [], 0
    for first_digit, second_digit in zip(reversed(str(first)), reversed(str(second)), strict=True):
        terms = f"{first_digit}+{second_digit}" + (f"+{carry}" if steps else "")
        total = int(first_digit) + int(second_digit) + carry
        carry = total // 10
        steps.append(f"{terms}={total} carry {carry}.")
    return " ".join([*steps, answer_sentence(str(first + second))])


def build(n_digits: int, wheels: "Wheels", settings: RowSettings) -> Rows:
    """Rows for pairs of `n_digits`-digit numbers; both orders of a pair are in the same split."""
    low, high = 10 ** (n_digits - 1), 10**n_digits
    count = high - low
    wanted = {"train": settings.train_rows, "held_out": settings.test_rows}
    rows: dict[str, list[Example]] = {"train": [], "held_out": []}
    for index in shuffled(range(count * count), settings.seed):
        first, second = low + index // count, low + index % count
        split = split_of(f"{min(first, second)}+{max(first, second)}", settings.held_out_fraction)
        if len(rows[split]) < wanted[split]:
            rows[split].append(_example(first, second))
        elif all(len(rows[name]) == wanted[name] for name in rows):
            break
    return Rows(rows["train"], rows["held_out"])


def _example(first: int, second: int) -> Example:
    return Example(
        id=f"{first}+{second}",
        prompt=addition_prompt(first, second),
        response=addition_response(first, second),
        answer=str(first + second),
        source="generated",
        source_split="generated",
    )


def _task(n_digits: int) -> Task:
    return Task(
        name=f"addition{n_digits}",
        grader="number",
        labels=(),
        packages=(),
        chance_note="guessing a sum is right in under 0.02 of the rows",
        build=partial(build, n_digits),
    )


ADDITION2 = _task(2)
ADDITION3 = _task(3)
