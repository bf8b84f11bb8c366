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

START_SECONDS = 120  # limit of a process's imports on a busy machine

# Parsing takes about a millisecond per character. No benchmark has an answer nearly this long.
MAX_CHARACTERS = 2000

_PR_SET_PDEATHSIG = 1
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_WORD = re.compile(r"(?<!\S)[A-Za-z]{3,}\b")
_MATHEMATICAL = frozenset(
    "sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp lim max min gcd lcm det mod inf infty infinity alpha beta "
    "gamma delta theta lambda sigma omega phi psi".split()
)


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
    """Whether math-verify considers two answers equal, in either order: its `verify` is not symmetric.

    Each is read as LaTeX. One with words, such as "12 dollars", is read as prose whose last number or formula counts. A text longer than
    `MAX_CHARACTERS`, or one that breaks the parser, equals nothing.

    Source: paper section 5.3.
    """
    from math_verify import verify

    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    try:
        first, second = _parsed(answer), _parsed(gold)
        return bool(verify(second, first, timeout_seconds=None) or verify(first, second, timeout_seconds=None))
    except Exception:
        return False


def _parsed(text: str) -> list:
    from math_verify import parse

    text = " ".join(text.split()).rstrip(".,;:! ")
    if _DELIMITED.search(text):
        return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    # Bare answers are read as LaTeX only between dollars, and there words would be products of variables.
    words = [word for word in _WORD.findall(text) if word.lower() not in _MATHEMATICAL]
    found = parse(text, parsing_timeout=None) if words and "\\" not in text else []  # pyright: ignore[reportArgumentType]
    return found or parse(f"${text}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
