"""Progress of anything that takes more than two seconds: a bar on a terminal, plain log lines otherwise."""

import logging
import sys
import threading
import time
from collections.abc import Callable

from plasticity_jax.errors import reason

log = logging.getLogger("plasticity_jax")

SHOW_AFTER_SECONDS, LOG_EVERY_SECONDS = 2.0, 10.0


def start_logging() -> None:
    """Sends log lines to standard error, ours from INFO on, and of some libraries only what is fatal: what fails there raises in our code too."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    for library in ("absl", "asyncio", "gcsfs"):  # they would add a trace per array or request
        logging.getLogger(library).setLevel(logging.CRITICAL)
    threading.excepthook = _in_one_line


def _in_one_line(ended: threading.ExceptHookArgs) -> None:
    """A thread of a library that ended with an error, such as the writer of TensorBoard's events on a full disk."""
    if ended.exc_value is not None:
        log.warning("a background thread ended: %s", reason(ended.exc_value))
        log.debug("its trace", exc_info=ended.exc_value)


checks: list[Callable[[], None]] = []  # called at every update, in the thread that works; one raises to end the work


class Progress:
    """Shows how far a wait has come, its rate and the time left.

    On a terminal this is a tqdm bar on standard error, elsewhere a log line every ten seconds and one at the end; either only after two seconds.

    Args:
      what: what is being done, in the user's words ("pretrain wd0.1").
      total: how many units there are, or None when unknown.
      unit: the unit's plural name ("tokens", "documents").
      initial: units done before, as after a resume; they do not count into the rate.
    """

    def __init__(self, what: str, *, total: int | None, unit: str, initial: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.initial = self.done = initial
        self.note = ""
        self._bar = None
        self._start = time.monotonic()
        self._next_line = self._start + SHOW_AFTER_SECONDS

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                initial=self.initial,
                desc=self.what,
                unit=f" {self.unit}",
                unit_scale=True,
                leave=None,  # one within another, such as a held-out loss during training, goes when it is done
                dynamic_ncols=True,
                delay=SHOW_AFTER_SECONDS,
                file=sys.stderr,
            )
        return self

    def update(self, amount: int, note: str = "") -> None:
        """Advances by `amount` units; `note` (such as a loss) is shown beside the rate."""
        for check in checks:
            check()
        self.done += amount
        self.note = note or self.note
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() >= self._next_line and self.done != self.total:  # the end has a line of its own
            self._next_line = time.monotonic() + LOG_EVERY_SECONDS
            log.info(self._line())

    def __exit__(self, kind, value, traceback) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._start > SHOW_AFTER_SECONDS:
            log.info(self._line(final=True))

    def _line(self, final: bool = False) -> str:
        seconds = time.monotonic() - self._start
        rate = (self.done - self.initial) / max(seconds, 1e-9)
        share = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,} ({self.done / max(self.total, 1):.0%})"
        left = ""
        if final:
            left = f", done in {seconds:.0f} s"
        elif self.total is not None and rate > 0:
            left = f", {_duration((self.total - self.done) / rate)} left"
        return f"{self.what}: {share} {self.unit}, {rate:,.0f} {self.unit}/s{left}" + (f", {self.note}" if self.note else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
