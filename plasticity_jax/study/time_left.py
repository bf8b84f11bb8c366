"""How long a study still takes: the declared work of the runs that are left, at the pace of those that have finished in this command. Nothing depends on it."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from plasticity_jax.progress import duration


@dataclass(frozen=True)
class Declared:
    """What is known of a run before it is carried out.

    Attributes:
      work: in model FLOPs; None where its stage declares none.
      side_by_side: whether runs of its stage proceed beside others (`launch.parallel_runs`).
    """

    stage: str
    work: float | None
    side_by_side: bool = False


@dataclass(frozen=True)
class Finished:
    """Runs of one stage that were carried out together, and the seconds that it took."""

    stage: str
    runs: int
    work: float | None
    seconds: float


@dataclass(frozen=True)
class Left:
    """A run that is not finished.

    Attributes:
      seconds: since it began; 0 for one that has not.
      shown: seconds that it shows itself as left; None where it shows none.
    """

    declared: Declared
    seconds: float = 0.0
    shown: float | None = None


def seconds_left(left: Iterable[Left], finished: Iterable[Finished], at_once: int = 1) -> tuple[float, bool] | None:
    """The time that runs take.

    A stage goes on at its own pace: seconds per FLOP, or per run where its work is not known. One of which no run has finished borrows the pace of the
    others, or of a run in progress.

    Args:
      at_once: runs that proceed side by side, of the stages whose runs do.
    Returns:
      Seconds, and whether they are partly a guess: something is borrowed, or left out because nothing at all is known of it. None where no pace is known.
    """
    left = [*left]
    spent: dict[str, list[float]] = {}  # stage → its seconds, and its FLOPs or number of runs
    flops_spent = [0.0, 0.0]

    def count(spent: list[float], seconds: float, amount: float) -> None:
        spent[0], spent[1] = spent[0] + seconds, spent[1] + amount

    for group in finished:
        count(spent.setdefault(group.stage, [0.0, 0.0]), group.seconds, group.runs if group.work is None else group.work)
        if group.work is not None:
            count(flops_spent, group.seconds, group.work)
    for run in left:
        if run.shown is not None and run.declared.work:
            count(flops_spent, run.seconds + run.shown, run.declared.work)
    own = {stage: seconds / amount for stage, (seconds, amount) in spent.items() if amount}
    borrowed = flops_spent[0] / flops_spent[1] if flops_spent[1] else None
    if not own and borrowed is None:
        return None
    remaining: dict[tuple[str, bool], list[float]] = {}
    about = False
    for run in left:
        stage, work = run.declared.stage, run.declared.work
        if run.shown is not None:
            needed = run.shown
        elif stage in own:
            needed = own[stage] * (1 if work is None else work) - run.seconds
        elif work is None:
            needed, about = 0.0, True
        elif borrowed is not None:
            needed, about = borrowed * work - run.seconds, True
        else:
            return None
        remaining.setdefault((stage, run.declared.side_by_side), []).append(max(needed, 0.0))
    total = sum(max(sum(each) / (at_once if side_by_side else 1), max(each)) for (_, side_by_side), each in remaining.items())
    return total, about


def in_words(left: tuple[float, bool] | None) -> str:
    """ "9 min left", "about 3 h 20 min left", "less than a minute left"; "" for None."""
    if left is None:
        return ""
    seconds, about = left
    minutes = round(seconds / 60)
    if minutes == 0:
        return "less than a minute left"
    return ("about " if about else "") + (f"{minutes} min" if minutes < 60 else duration(60 * minutes)) + " left"


class TimeLeft:
    """The clock of a study: told when runs begin and end, it says how long the rest takes. Threads may share it.

    Args:
      runs: id → what is known, of every run that is to be carried out.
      clock: seconds, from any beginning.
    Attributes:
      at_once: runs that proceed side by side.
    """

    def __init__(self, runs: Mapping[str, Declared], clock: Callable[[], float] = time.monotonic):
        self.at_once = 1
        self._left, self._clock = dict(runs), clock
        self._begun: dict[str, tuple[float, float | None, int]] = {}  # id → when, the seconds that its group shows as left, runs of the group
        self._finished: list[Finished] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many runs are left."""
        return len(self._left)

    def begin(self, runs: Collection[str]) -> None:
        """Runs begin, together as one group."""
        with self._lock:
            self._begun |= {run: (self._clock(), None, len(runs)) for run in runs if run in self._left}

    def show(self, runs: Collection[str], seconds: float | None) -> None:
        """Runs in progress, as one group, show these seconds as left; None where what they show is only a part of their work."""
        with self._lock:
            self._begun |= {run: (self._begun[run][0], seconds, self._begun[run][2]) for run in runs if run in self._begun}

    def end(self, runs: Collection[str], *, finished: bool) -> None:
        """Runs are no longer left. Only of those that have finished as one group is the pace known."""
        with self._lock:
            begun = [self._begun.pop(run) for run in runs if run in self._begun]
            ended = [declared for run in runs if (declared := self._left.pop(run, None)) is not None]
            if finished and ended and begun:
                work = None if any(declared.work is None for declared in ended) else sum(declared.work or 0.0 for declared in ended)
                self._finished.append(Finished(ended[0].stage, len(ended), work, self._clock() - begun[0][0]))

    def text(self) -> str:
        """The time left in words; "" while nothing is known, and for the only run."""
        with self._lock:
            now = self._clock()
            left = []
            for run, declared in self._left.items():
                since, shown, together = self._begun.get(run, (now, None, 1))
                left.append(Left(declared, (now - since) / together, None if shown is None else shown / together))  # members share the seconds
            finished = [*self._finished]
        return in_words(seconds_left(left, finished, self.at_once)) if len(left) + len(finished) > 1 else ""
