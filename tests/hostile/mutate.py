"""What input may look like that nobody meant: values, trees of JSON, and bytes, changed at random in the ways in which files break and people err."""

import contextlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from plasticity_jax.errors import UserError

SECONDS = 60  # after which a case hangs
MEGABYTES = 600  # by which a test's cases together may raise the memory of the process

NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**48, 2**63, 2**64, 10**18, 10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308)
NOT_NUMBERS = (float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "a", "\x00", "a\x00b", "\ud800", "\u202e", "é" * 130, "x" * 300, "x" * 5000, "../../x", "/dev/zero", "/proc/self/mem", "-1", "None",
         "(a+)+$", "(", "{x}", "%s", "gs://", "file:///", "nan", "1e5", "auto", "train.steps", "wd0", "C:\\x", "a\nb", "~", "~nobody-here/x", "*")  # fmt: skip


def deep(levels: int) -> Any:
    tree: Any = 1
    for _ in range(levels):
        tree = [tree]
    return tree


def value(random: Random, levels: int = 3) -> Any:
    """A value that no field may mean."""
    kind = random.randrange(9 if levels else 6)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(TEXTS)
    if kind == 5:
        return random.choice((None, True, False, *NOT_NUMBERS))
    if kind == 6:
        return [value(random, levels - 1) for _ in range(random.choice((0, 1, 2, 2, 9)))]
    if kind == 7:
        return {random.choice((*TEXTS, "a", "b")): value(random, levels - 1) for _ in range(random.randrange(3))}
    return deep(random.choice((1, 5, 200)))


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all that lies in a tree of JSON."""
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def change_tree(tree: Any, random: Random) -> Any:
    """A tree of JSON with one to three of its parts replaced, removed, doubled, moved, or added to."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return value(random)
        path = random.choice(found)
        node = tree
        for key in path[:-1]:
            node = node[key]
        old, kind = node[path[-1]], random.randrange(8)
        if kind == 0 and isinstance(node, dict):
            del node[path[-1]]
        elif kind == 1 and isinstance(node, dict):
            node[random.choice((*TEXTS, str(path[-1]) + "s"))] = value(random)
        elif kind == 2 and isinstance(old, list):
            node[path[-1]] = [*old, *old, *([value(random)] if random.random() < 0.5 else [])]
        elif kind == 3 and isinstance(old, (int, float)) and not isinstance(old, bool):
            node[path[-1]] = random.choice((-old, old * 2, old * 1000, old + 1, old * 10**12, str(old), [old], {"a": old}))
        elif kind == 4:
            other = random.choice(found)
            inner = tree
            with contextlib.suppress(KeyError, IndexError, TypeError):  # it may lie in what is gone
                for key in other:
                    inner = inner[key]
                node[path[-1]] = json.loads(json.dumps(inner))
        else:
            node[path[-1]] = value(random)
    return tree


def change_bytes(content: bytes, random: Random) -> bytes:
    """Bytes with some flipped, cut off, repeated, zeroed, or replaced."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        kind, place = random.randrange(7), random.randrange(len(content) + 1)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place : place + random.choice((1, 2, 8, 1000))]
        elif kind == 3:
            content[place:place] = content[max(0, place - random.choice((1, 8, 1000))) : place]
        elif kind == 4:
            content[place:place] = random.choice(
                (b"\x00", b"\xff" * 8, b"\n", b"{", b'"', b"]", b"\xed\xa0\x80", b"[" * 100_000, b"9" * 5000, b"\xef\xbb\xbf")
            )
        elif kind == 5:
            content[place : place + 8] = random.choice((2**63 - 1, 2**64 - 1, 0, 2**40)).to_bytes(8, "little")
        else:
            content[place : place + 64] = bytes(len(content[place : place + 64]))
    return bytes(content)


@contextlib.contextmanager
def within_limits() -> Iterator[Callable[..., Any]]:
    """Gives a function that calls another and takes its UserError, of one line, for an answer; None then. All else fails: other errors, hangs, memory."""

    def hangs(number, frame):
        raise AssertionError(f"still at work after {SECONDS} s")

    def answered(work: Callable[[], Any]) -> Any:
        signal.alarm(SECONDS)
        try:
            return work()
        except UserError as error:
            assert_one_line(str(error))
            return None
        finally:
            signal.alarm(0)

    before, handler = _memory(), signal.signal(signal.SIGALRM, hangs)
    try:
        yield answered
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert _memory() - before <= MEGABYTES, f"the memory grew from {before} to {_memory()} MB"


def assert_one_line(message: str) -> None:
    """A message that a terminal shows as one line, whatever the input held."""
    assert message and "\n" not in message and len(message) <= 1010, message[:3000]
    message.encode("utf-8")


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*")}
