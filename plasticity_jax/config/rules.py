"""The rules that many config fields obey, each with its message. All raise UserError."""

import difflib
import math
import re

from plasticity_jax.errors import UserError


def refuse_unless(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def check_positive(path: str, value: float) -> None:
    refuse_unless(math.isfinite(value) and value > 0, f"{path}={value} must be positive and finite.")


def check_fraction(path: str, value: float) -> None:
    refuse_unless(0 <= value <= 1, f"{path}={value} is a share; it must lie between 0 and 1.")


def check_choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    refuse_unless(value in choices, f"{path}={value!r} must be one of {', '.join(choices)}{hint}")


def check_pattern(where: str, pattern: str, example: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where} {pattern!r} is no regular expression ({error}); write one such as {example!r}.") from error
