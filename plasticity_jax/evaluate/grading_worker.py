"""A process that compares mathematical answers, one pair at a time: run as a script by `grading.Grading`, of which it is the expendable half.

It imports nothing of this package, so that it starts in under a second and no jax comes with it. JSON lines go in ([answer, gold]) and out (true or
false), after a first line that says it is ready. It sets no time limit: whoever feeds it does, and kills it.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys

READY = "ready"

# Parsing takes about a millisecond per character, and no answer of a benchmark comes near: what is longer is rambling.
MAX_CHARACTERS = 2000

_PR_SET_PDEATHSIG = 1
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_WORD = re.compile(r"(?<!\S)[A-Za-z]{3,}\b")
_MATHEMATICAL = frozenset(
    "sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp lim max min gcd lcm det mod inf infty infinity alpha beta "
    "gamma delta theta lambda sigma omega phi psi".split()
)


def equivalent(answer: str, gold: str) -> bool:
    """Whether math-verify takes two answers as equal, in either order: its `verify` is not symmetric.

    Each is read as LaTeX; one with words, such as "12 dollars", as prose in which the last number or formula counts. A text beyond `MAX_CHARACTERS` equals
    none.

    Source: paper section 5.3.
    """
    from math_verify import verify

    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    first, second = _parsed(answer), _parsed(gold)
    return verify(second, first, timeout_seconds=None) or verify(first, second, timeout_seconds=None)


def _parsed(text: str) -> list:
    from math_verify import parse

    text = " ".join(text.split()).rstrip(".,;:! ")
    if _DELIMITED.search(text):
        return parse(text, parsing_timeout=None)
    # Bare answers need dollars to be read as LaTeX at all. Words within them would be read as products of variables.
    words = [word for word in _WORD.findall(text) if word.lower() not in _MATHEMATICAL]
    found = parse(text, parsing_timeout=None) if words and "\\" not in text else []
    return found or parse(f"${text}$", parsing_timeout=None)


def _limit(memory_bytes: int) -> None:
    # Where the system knows a limit it holds; macOS refuses to bound the address space.
    for kind, amount in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (amount, amount))


def _die_with(parent: int) -> None:
    """The end of input tells an idle worker that its parent is gone; one that computes for ever would not read it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main(parent: int, memory_bytes: int) -> None:
    """Answers until its input ends."""
    _die_with(parent)
    _limit(memory_bytes)
    # Parsers print to standard output, which carries the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  the slow part of the start, before "ready" starts the first pair's clock

    print(json.dumps(READY), file=replies)
    for line in sys.stdin.buffer:
        try:
            verdict = bool(equivalent(*json.loads(line)))
        except Exception:  # whatever a hostile answer breaks inside the parser, it is not equal to anything
            verdict = False
        print(json.dumps(verdict), file=replies)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
