"""Threads that the main thread waits for while it hears signals.

`Thread.join` and `is_alive` do not serve: where a signal's exception interrupts one of them, Python 3.11 and 3.12 take the thread for ended.
"""

import threading
from collections.abc import Callable, Mapping


class Threads:
    """Threads that have begun.

    Args:
      works: name → what the thread does; it must not raise.
    """

    def __init__(self, works: Mapping[str, Callable[[], None]]):
        self._ended = [threading.Event() for _ in works]
        for (name, work), ended in zip(works.items(), self._ended, strict=True):
            threading.Thread(target=self._run, args=(work, ended), name=name, daemon=True).start()

    @staticmethod
    def _run(work: Callable[[], None], ended: threading.Event) -> None:
        try:
            work()
        finally:
            ended.set()

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Waits until all have ended, and calls `check` ten times a second; what it raises, or a signal, ends the wait, which may be begun again."""
        for ended in self._ended:
            while not ended.wait(0.1):
                check()
