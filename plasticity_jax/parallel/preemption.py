"""SIGTERM, which clusters send some seconds before they take a machine back, and Ctrl-C: training saves first, everything else ends at once.

Training is the only work that loses something: what is generated or finished is on disk already. The processes of a run save together, at a step on which
they agree.

A signal raises KeyboardInterrupt where that is safe, and it sets a flag. An exception can be swallowed, as in a callback of the garbage collector; the flag
is looked at by every progress, by the executor, and by the training loop. And while the main thread is in a call of a library, such as a compilation, Python
runs no handler: so a thread of its own hears the signals too, and ends the process where nothing has happened for `GRACE` seconds, or at a second signal.
All files are written so that a process may end at any time. Imports jax only when needed.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from plasticity_jax import progress
from plasticity_jax.parallel import lanes, processes

INTERRUPTED = 130  # exit status
GRACE = 25.0  # seconds after a signal, or after the last step of a training since, in which the process has time to end by itself
_SAME = 2.0  # seconds within which a second SIGTERM is the first once more: a cluster sends it to a worker and to its parent, which passes it on
_NUMBERS = (signal.SIGTERM, signal.SIGINT)

_requested: str | None = None  # what the first signal is called
_raised = False  # whether a handler has raised KeyboardInterrupt
_alive = 0.0  # time of that signal, or of the last step since
_saving: set[int] = set()  # threads in which the block of `saves_first` runs
_writing = 0  # blocks of `writing` that run
_nothing_begun = 0  # blocks of `ends_at_once` that run
_FLAG = "preempted"


class Preempted(KeyboardInterrupt):
    """Training has ended after a signal, and its last step is saved."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles SIGTERM and Ctrl-C while the block runs, in the main thread. A signal that is ignored, as in a background job of a shell, stays so."""
    global _requested, _raised
    _requested, _raised = None, False
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    heard, said = os.pipe()
    os.set_blocking(said, False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    other = signal.set_wakeup_fd(said, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(heard,), name="signals", daemon=True)
    watcher.start()
    progress.checks.append(check)
    try:
        yield
    finally:
        progress.checks.remove(check)
        signal.set_wakeup_fd(other)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(said)  # which ends the watcher
        watcher.join()
        os.close(heard)
        _requested, _raised = None, False


def requested() -> bool:
    """Whether this process has received a signal, or one of another lane."""
    if lanes.active() is None or processes.total() == 1:
        return _requested is not None
    if _requested is not None:
        processes.raise_flag(_FLAG)
    return _requested is not None or processes.flag_raised(_FLAG)


def check() -> None:
    """Raises KeyboardInterrupt after a signal, unless this thread is in a training, which ends by itself."""
    global _raised
    if _requested is not None and threading.get_ident() not in _saving:
        _raised |= threading.current_thread() is threading.main_thread()  # as below
        raise KeyboardInterrupt


def is_saving() -> bool:
    """Whether this thread is in a training that ends by itself, with its last step saved, because of a signal."""
    return threading.get_ident() in _saving and requested()


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """While the block runs, which writes a checkpoint, only a second signal ends the process."""
    global _writing
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
        _show_life()


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """While the block runs, which is one long call that leaves nothing behind, the first signal ends the process."""
    global _nothing_begun
    _nothing_begun += 1
    try:
        yield
    finally:
        _nothing_begun -= 1


def _show_life() -> None:
    global _alive
    _alive = time.monotonic()


def _request(number: int) -> bool:
    """Whether this is the first signal. Called in the main thread and in the watcher, in any order."""
    global _requested
    if _requested is not None:
        return False
    _show_life()
    _requested = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    return True


def _on_signal(number, frame) -> None:
    global _raised
    _request(number)
    if not _saving and not _raised:  # a second one would end what the first has begun to leave behind in order
        _raised = True
        raise KeyboardInterrupt


def _watch(heard: int) -> None:
    """Hears the signals of the process until the other end of the pipe is closed."""
    first: float | None = None
    while True:
        ready, _, _ = select.select([heard], [], [], None if first is None else 0.1)
        if ready:
            numbers = os.read(heard, 64)
            if not numbers:
                return
            for number in (number for number in numbers if number in _NUMBERS):  # others have handlers of their own
                now = time.monotonic()
                _request(number)
                if first is None:
                    first = now
                elif number == signal.SIGINT or now - first >= _SAME:
                    _end("by a second signal")
        elif first is not None and _nothing_begun:
            _end(f"by {_requested}")
        elif first is not None and not _writing and time.monotonic() - _alive >= GRACE:
            _end(f"by {_requested}, after {GRACE:.0f} s in which it did not end by itself")


def _end(how: str) -> None:
    with contextlib.suppress(Exception):
        print(f"plasticity: ended {how}; the same command resumes.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def saves_first() -> Iterator[Callable[[int], bool]]:
    """Defers a signal while the block runs, which asks after every step whether to save and end. All processes enter it together.

    Gives a function (step just dispatched) → whether the block must save this step and raise `Preempted`. It answers all processes alike, provided that
    each asks at every step, after it has read a result of the step before to which all processes contribute.
    Raises:
      Preempted: the signal came after the last question.
    """
    global _raised
    _saving.add(threading.get_ident())
    try:
        yield _alone if processes.count() == 1 else _agreed()
        if any(processes.gather("preempted at the end", requested())):
            raise Preempted(f"ended by {name()} after the last step of a training, which is saved")
    finally:
        _raised |= _requested is not None  # the handler, which may run later than this, need not raise
        _saving.discard(threading.get_ident())


def name() -> str:
    """What the signal is called that this process has received; SIGTERM if it was another process."""
    return _requested or "SIGTERM"


def _alone(step: int) -> bool:
    _show_life()
    return requested()


def _agreed() -> Callable[[int], bool]:
    propose, agreed = processes.first_wins("preempted")
    asked = False

    def save_now(step: int) -> bool:
        nonlocal asked
        _show_life()
        if requested() and not asked:
            # Nobody has asked at that step yet: to ask there, a process must have read the result of the next one, which this process has not begun.
            propose(step + 2)
            asked = True
        return agreed() == step

    return save_now
