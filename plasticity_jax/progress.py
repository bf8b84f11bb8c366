"""What a command says while it runs: log lines on standard error and in a file, and the progress of anything that takes more than two seconds."""

import contextlib
import contextvars
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from plasticity_jax.errors import reason
from plasticity_jax.terminal import colored

log = logging.getLogger("plasticity_jax")

SHOW_AFTER_SECONDS, LOG_EVERY_SECONDS = 2.0, 10.0
LOGS = "logs"  # folder of a workdir, with a log file per command
QUIET, NORMAL, VERBOSE = -1, 0, 1


class _Terminal(logging.StreamHandler):
    """Log lines on standard error: in color where they are warnings or errors, and above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm and self.stream.isatty() else contextlib.nullcontext():
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else colored(text, "red" if record.levelno >= logging.ERROR else "yellow", self.stream)

    def filter(self, record: logging.LogRecord):
        return not getattr(record, "in_bar", False) and super().filter(record)


_terminal: _Terminal | None = None


def start_logging(verbosity: int = NORMAL) -> None:
    """Sends log lines to standard error, and of some libraries only what is fatal: what fails there raises in our code too.

    Args:
      verbosity: QUIET says warnings and errors only; VERBOSE says details too.
    """
    global _terminal
    root = logging.getLogger()
    if not root.handlers:
        _terminal = _Terminal(sys.stderr)
        _terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(_terminal)
    if _terminal is not None:
        _terminal.setLevel(logging.WARNING if verbosity == QUIET else logging.NOTSET)
    log.setLevel(logging.DEBUG if verbosity == VERBOSE else logging.INFO)
    for library in ("absl", "asyncio", "gcsfs"):  # they would add a trace per array or request
        logging.getLogger(library).setLevel(logging.CRITICAL)
    threading.excepthook = _in_one_line


class LogFile(logging.Handler):
    """A file with everything that is logged, the command line first. What keeps it from being written is no reason to fail.

    It begins once the workdir is there, so that a command that is refused before leaves nothing.
    """

    def __init__(self, workdir: Path, path: Path, heading: Sequence[str]):
        super().__init__()
        self.path = path
        self._workdir, self._waiting, self._file = workdir, list(heading), None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.say(self.format(record))

    def say(self, text: str) -> None:
        """Appends lines."""
        self._waiting.append(text)
        with contextlib.suppress(OSError):
            if self._file is None:
                if not self._workdir.is_dir():
                    return
                self.path.parent.mkdir(exist_ok=True)
                self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            waiting, self._waiting = self._waiting, []
            self._file.write("".join(f"{line}\n" for line in waiting))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        super().close()


_log_file: LogFile | None = None


@contextlib.contextmanager
def logged(workdir: Path | None, command: str, argv: Sequence[str]) -> Iterator[None]:
    """Keeps what is logged during the block in `<workdir>/logs/<command>-<UTC time>-<process>.log`. None keeps nothing."""
    if workdir is None:
        yield
        return
    now = time.gmtime()
    path = workdir / LOGS / f"{command}-{time.strftime('%Y%m%dT%H%M%SZ', now)}-{os.getpid()}.log"
    place = f"# {time.strftime('%Y-%m-%d %H:%M:%S', now)} UTC, process {os.getpid()}, in {os.getcwd()}"
    with _kept(LogFile(workdir, path, [shlex.join(["plasticity", *argv]), place])):
        yield


@contextlib.contextmanager
def _kept(file: LogFile) -> Iterator[None]:
    global _log_file
    logging.getLogger().addHandler(file)
    _log_file = file
    try:
        yield
    finally:
        _log_file = None
        logging.getLogger().removeHandler(file)
        file.close()


def say_last(text: str, *, shown: str | None = None) -> None:
    """The last line of a command that failed: on standard error, in red on a terminal, and in the log file.

    Args:
      shown: what stands on standard error in its place; "" for nothing.
    """
    if _log_file is not None:
        _log_file.say(text)
    if shown := text if shown is None else shown:
        print(colored(shown, "red", sys.stderr), file=sys.stderr)


def as_here() -> dict[str, Any]:
    """What a child process needs to say things as this one does; see `as_there`."""
    verbosity = QUIET if quiet() else VERBOSE if log.isEnabledFor(logging.DEBUG) else NORMAL
    return {"verbosity": verbosity, "log_file": None if _log_file is None else str(_log_file.path)}


def as_there(verbosity: int, log_file: str | None) -> None:
    """Says things as the parent does, whose `as_here` is given, and into the same log file; for the rest of this process."""
    global _log_file
    start_logging(verbosity)
    if log_file is not None:
        path = Path(log_file)
        _log_file = LogFile(path.parent.parent, path, ())
        logging.getLogger().addHandler(_log_file)


def quiet() -> bool:
    """Whether only warnings and errors are shown."""
    return _terminal is not None and _terminal.level >= logging.WARNING


def _in_one_line(ended: threading.ExceptHookArgs) -> None:
    """A thread of a library that ended with an error, such as the writer of TensorBoard's events on a full disk."""
    if ended.exc_value is not None:
        log.warning("a background thread ended: %s", reason(ended.exc_value))
        log.debug("its trace", exc_info=ended.exc_value)


checks: list[Callable[[], None]] = []  # called at every update, in the thread that works; one raises to end the work


class _Watch:
    """Who wants to know how far a piece of work is, whichever display shows it: the outermost, where one lies within another."""

    def __init__(self, look: Callable[["Progress"], str], every: float):
        self._look, self._every, self._next = look, every, 0.0
        self.of: Progress | None = None

    def begin(self, progress: "Progress") -> None:
        """Looks at this one from now on, unless it lies within another; at its first update at once, however long ago the look before was."""
        if self.of is None:
            self.of, self._next = progress, 0.0

    def see(self, progress: "Progress", now: float) -> None:
        if self.of is progress and now >= self._next:
            self._next = now + self._every
            progress.aside = self._look(progress)


_watching: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("watching", default=None)  # of this thread


@contextlib.contextmanager
def watched(look: Callable[["Progress"], str], *, every: float) -> Iterator[None]:
    """Has every progress of this thread looked at while the block runs.

    Args:
      look: what to do with one; returns what is shown beside it, or "".
      every: seconds between two looks.
    """
    token = _watching.set(_Watch(look, every))
    try:
        yield
    finally:
        _watching.reset(token)


class Progress:
    """Shows how far a wait has come, its rate and the time left.

    On a terminal this is a tqdm bar on standard error, elsewhere a log line every ten seconds and one at the end; either only after two seconds.

    Args:
      what: what is being done, in the user's words ("pretrain wd0.1").
      total: how many units there are, or None when unknown.
      unit: the unit's plural name ("tokens", "documents").
      initial: units done before, as after a resume; they do not count into the rate.
      main: its units are what the work consists of, and not a part before or after it: how far they are says how far the work is.
    """

    def __init__(self, what: str, *, total: int | None, unit: str, initial: int = 0, main: bool = False):
        self.what, self.total, self.unit, self.main = what, total, unit, main
        self.initial = self.done = initial
        self.note = self.aside = ""
        self._watch = _watching.get()
        self._bar = None
        self._start = time.monotonic()
        self._paced_from: tuple[int, float] | None = None  # units and time of the first update: what came before was compiled or opened
        self._next_line = self._start + SHOW_AFTER_SECONDS

    def __enter__(self) -> "Progress":
        if self._watch is not None:
            self._watch.begin(self)
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO) and not quiet():
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
        first = self._paced_from is None
        if self._paced_from is None:
            self._paced_from = self.done, time.monotonic()
        now = time.monotonic()
        if self._watch is not None:
            self._watch.see(self, now)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self.note, self.aside))), refresh=False)
            if first:
                self._bar.delay = max(0.0, SHOW_AFTER_SECONDS - (time.monotonic() - self._start))
                self._bar.initial = self._bar.n = self._bar.last_print_n = self.done
                self._bar.unpause()
            else:
                self._bar.update(amount)
        if now >= self._next_line and self.done != self.total:  # the end has a line of its own
            self._next_line = now + LOG_EVERY_SECONDS
            self._log(self._line())

    def seconds_left(self) -> float | None:
        """At the pace since the first update, before which something was compiled or opened; None where that is not known."""
        pace = self._pace()
        return (self.total - self.done) / pace if self.total is not None and pace else None

    def __exit__(self, kind, value, traceback) -> None:
        if self._watch is not None and self._watch.of is self:
            self._watch.of = None
        if self._bar is not None:
            self._bar.close()
        if kind is None and time.monotonic() - self._start > SHOW_AFTER_SECONDS:
            self._log(self._line(final=True))

    def _log(self, line: str) -> None:
        log.info("%s", line, extra={"in_bar": self._bar is not None})  # which says it on the terminal

    def _line(self, final: bool = False) -> str:
        seconds = time.monotonic() - self._start
        rate = (self.done - self.initial) / max(seconds, 1e-9)
        share = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,} ({self.done / max(self.total, 1):.0%})"
        said = [f"{self.what}: {share} {self.unit}", f"{rate:,.0f} {self.unit}/s"]
        if final:
            said.append(f"done in {duration(seconds)}")
        elif (left := self.seconds_left()) is not None:
            said.append(f"{duration(left)} left")
        return ", ".join(filter(None, (*said, self.note, "" if final else self.aside)))

    def _pace(self) -> float:
        """Units per second since the first update; 0 before the second."""
        done, since = self._paced_from or (self.done, 0.0)
        return (self.done - done) / max(time.monotonic() - since, 1e-9)


def duration(seconds: float) -> str:
    """Seconds in words: "3 h 20 min", "2 min 5 s", "7 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h" if hours >= 100 else f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
