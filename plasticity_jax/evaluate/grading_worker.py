"""What a process of `grading.Grading` runs: it compares mathematical answers, one pair at a time, and may be killed at any moment.

The module imports neither jax nor NumPy, so that a process starts in about a second. It sets no time limit on comparisons; the pool does.
"""

import contextlib
import ctypes
import logging
import multiprocessing.context
import os
import re
import resource
import signal
import sys
import types
from typing import Any

from plasticity_jax.evaluate.wording import MAX_CHARACTERS, TEXT_COMMAND, formula, has_word

START_SECONDS = 120  # limit of a process's imports on a busy machine

_PR_SET_PDEATHSIG = 1
_SPACES = re.compile(r"\\[,;:! ]|~|\s+")
_BRACED = re.compile(r"\{(\w)\}")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle)(?![A-Za-z])")
# math-verify drops what is below a number (a base) or a bracket, and reads words as products of their letters.
_BASE = re.compile(r"[\d)}\]]\s*_")
_TIME_OF_DAY = re.compile(r"(?::00)?\s*([ap])\.?\s?m\.?$", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'()-]*[A-Za-z)]")


class Process(multiprocessing.context.SpawnProcess):
    """A spawned process that does not import the parent's `__main__`, which may be a script that imports jax or has no `__name__` guard."""

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # without a file or a spec, there is nothing to import
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class SpawnContext(multiprocessing.context.SpawnContext):
    """The start method of the pool's processes: not "fork", because jax has threads."""

    Process = Process


def start(parent: int, memory_bytes: int) -> None:
    """Prepares a new process: it dies with its parent, is silent, and has limits.

    Args:
      parent: process id of the parent.
      memory_bytes: limit of the address space.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for the end of an arithmetic operation
    if sys.platform == "linux":
        # The end of input reaches an idle process only; a busy one would outlive its parent.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    # Parsers print.
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    logging.disable(logging.CRITICAL)
    # macOS does not support a limit of the address space.
    for kind, amount in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (amount, amount))
    signal.alarm(START_SECONDS)
    import math_verify  # noqa: F401  slow, so it comes before the first comparison's clock starts

    signal.alarm(0)


def compare(answer: str, gold: str) -> bool:
    """Whether two answers are equal: as texts, or as formulas that math-verify reads completely, in either order, as its `verify` is not symmetric.

    What it cannot read is compared as text only. Several answers, such as "1331 and 1728", are equal if all of them are, in any order. A text longer
    than `MAX_CHARACTERS`, or one that breaks the parser, equals nothing.
    """
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    try:
        first, second = formula(answer), formula(gold)
        if _as_text(first) == _as_text(second):
            return bool(first)
        if _is_words(first) or _is_words(second):
            return False
        return _verified(_read(first), _read(second))
    except Exception:
        return False


def compare_as_published(answer: str, gold: str) -> bool:
    """The comparison of the original: both strings go to math-verify as they are, so that only LaTeX between delimiters is read as LaTeX.

    Source: paper section 5.3.
    """
    from math_verify import parse

    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    try:
        return _verified(*(parse(text, parsing_timeout=None) for text in (answer, gold)))  # pyright: ignore[reportArgumentType]
    except Exception:
        return False


def _verified(first: list, second: list) -> bool:
    from math_verify import verify

    return bool(verify(second, first, timeout_seconds=None) or verify(first, second, timeout_seconds=None))


def _read(text: str) -> list:
    """The formula as math-verify reads it, or [] if it does not read all of it."""
    from math_verify import LatexExtractionConfig, parse

    if _BASE.search(text) or _TIME_OF_DAY.search(_without_commands(text)):
        return []
    settings: Any = {"extraction_mode": "first_match", "fallback_mode": "no_fallback", "parsing_timeout": None}
    return parse(f"${text}$", [LatexExtractionConfig()], **settings)


def _is_words(text: str) -> bool:
    """Whether a text is an answer in words, such as "even" or "June". Variables have one letter, or two in a product."""
    plain = _without_commands(text)
    return _WORDS.fullmatch(plain) is not None and has_word(plain)


def _as_text(text: str) -> str:
    plain = _TIME_OF_DAY.sub(lambda half: half[1].lower() + "m", _without_commands(text))
    text = _BRACED.sub(r"\1", _SPACES.sub("", _SIZES.sub("", _FRACTION.sub(r"\\frac", plain))))
    return re.sub(r"[().,'-]", "", text).casefold() if _is_words(plain) else text


def _without_commands(text: str) -> str:
    return TEXT_COMMAND.sub(r"\1", text)
