"""SIGTERM, which clusters send some seconds before they take a machine back: training saves first, everything else ends at once.

Training is the only work that loses something: what is generated or finished is on disk already. The processes of a run save together, at a step on which
they agree. Imports jax only when needed.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from plasticity_jax.parallel import lanes, processes

_SAME = 2.0  # seconds within which a second signal is the first once more: a cluster sends it to a worker and to its parent, which passes it on

_requested: float | None = None  # time of the first SIGTERM
_saving: set[int] = set()  # threads in which the block of `saves_first` runs
_FLAG = "preempted"


class Preempted(KeyboardInterrupt):
    """Training has ended after SIGTERM, and its last step is saved."""


def handle_sigterm() -> None:
    """Installs the handler. Outside of `saves_first` SIGTERM raises KeyboardInterrupt, and so does a second one inside."""
    global _requested
    _requested = None
    signal.signal(signal.SIGTERM, _on_sigterm)


def requested() -> bool:
    """Whether this process has received SIGTERM, or one of another lane."""
    if lanes.active() is None or processes.total() == 1:
        return _requested is not None
    if _requested is not None:
        processes.raise_flag(_FLAG)
    return _requested is not None or processes.flag_raised(_FLAG)


def is_saving() -> bool:
    """Whether this thread is in a training that ends by itself, with its last step saved, because of SIGTERM."""
    return threading.get_ident() in _saving and requested()


def _on_sigterm(number, frame) -> None:
    global _requested
    now = time.monotonic()
    if _requested is not None and now - _requested < _SAME:
        return
    first, _requested = _requested is None, now
    if not (first and _saving):
        raise KeyboardInterrupt


@contextlib.contextmanager
def saves_first() -> Iterator[Callable[[int], bool]]:
    """Defers SIGTERM while the block runs, which asks after every step whether to save and end. All processes enter it together.

    Gives a function (step just dispatched) → whether the block must save this step and raise `Preempted`. It answers all processes alike, provided that
    each asks at every step, after it has read a result of the step before to which all processes contribute.
    Raises:
      Preempted: the signal came after the last question.
      KeyboardInterrupt: a second signal came.
    """
    _saving.add(threading.get_ident())
    try:
        yield _alone if processes.count() == 1 else _agreed()
        if any(processes.gather("preempted at the end", requested())):
            raise Preempted("ended by SIGTERM after the last step of a training, which is saved")
    finally:
        _saving.discard(threading.get_ident())


def _alone(step: int) -> bool:
    return requested()


def _agreed() -> Callable[[int], bool]:
    propose, agreed = processes.first_wins("preempted")
    asked = False

    def save_now(step: int) -> bool:
        nonlocal asked
        if requested() and not asked:
            # Nobody has asked at that step yet: to ask there, a process must have read the result of the next one, which this process has not begun.
            propose(step + 2)
            asked = True
        return agreed() == step

    return save_now
