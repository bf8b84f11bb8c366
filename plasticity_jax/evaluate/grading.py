"""Grading of many completions: verdicts and majorities, mathematics in processes that may hang, explode or die without harm."""

import enum
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.answers import GRADERS, MAJORITY_WINDOW, extract_answer, judge, majority_index
from plasticity_jax.progress import Progress

SECONDS = 4.0  # that a comparison may take; paper section 5.3
MEMORY_BYTES = 1 << 30
START_SECONDS = 120.0  # for a worker's imports on a busy machine
FAILED_STARTS = 3  # in a row, after which it is no accident

_WORKER = Path(__file__).with_name("grading_worker.py")

Pair = tuple[str, str]


class Verdict(enum.StrEnum):
    """What became of a completion; only RIGHT counts.

    TIMED_OUT: the comparison took longer than its limit, or broke two processes in a row (out of memory, a crash of the interpreter).
    """

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no answer"
    TIMED_OUT = "timed out"


class Grading:
    """Judges answers with one grader; a context manager, since "math" may have processes running.

    Args:
      grader: "exact", "number", "letter" (see `answers.judge`), or "math": equal by math-verify in either order, or equal as texts without the white
        space around them. Only "math" starts processes, and only once there is something to compare.
      faithful: see `answers.judge`.
      workers: processes at most; 0 takes one per core that this process may use.
      seconds: wall time of one comparison, after which its process is killed and another takes its place.
      memory_bytes: address space of a process. Beyond it, an answer is wrong where the parser survives and "timed out" where it does not.
    Raises:
      ValueError: an unknown grader, or limits that are not positive.
      UserError: "math" without the package math-verify.
    Source: paper sections 5.3 and 5.4.
    """

    def __init__(self, grader: str, *, faithful: bool, workers: int = 0, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES):
        if grader not in (*GRADERS, "math"):
            raise ValueError(f"grader {grader!r} is unknown; use one of {', '.join((*GRADERS, 'math'))}.")
        if workers < 0 or not seconds > 0 or memory_bytes < 1:
            raise ValueError(f"workers={workers} must not be negative, and seconds={seconds} and memory_bytes={memory_bytes} must be positive.")
        if grader == "math" and importlib.util.find_spec("math_verify") is None:
            raise UserError("mathematical answers are compared by the package math-verify, which is not installed; pip install math-verify.")
        self.grader, self.faithful = grader, faithful
        self._pool = _Pool(workers or _cores(), seconds, memory_bytes)
        self._known: dict[Pair, Verdict] = {}

    def __enter__(self) -> "Grading":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.close()

    def judge(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """Verdicts on (answer, gold), in order; an answer is what `extract_answer` found, None where it found nothing."""
        if self.grader == "math":
            self._compare(((answer, gold) for answer, gold in pairs if answer is not None), "grade answers")
            return [Verdict.NO_ANSWER if answer is None else self._verdict(answer, gold) for answer, gold in pairs]
        return [
            Verdict.NO_ANSWER if answer is None else Verdict.RIGHT if judge(answer, gold, self.grader, faithful=self.faithful) else Verdict.WRONG
            for answer, gold in pairs
        ]

    def majority(self, completions: Sequence[Sequence[str]]) -> list[int]:
        """Per problem, the position of the first completion of its largest cluster, as in `answers.majority_index`.

        With "math", an answer joins the first cluster whose first answer it is equal to. One whose comparison times out joins only its own text.

        Raises:
          ValueError: a problem without completions.
        """
        if self.grader != "math":
            return [majority_index(of_problem, self.grader, faithful=self.faithful) for of_problem in completions]
        if not all(completions):
            raise ValueError("a problem has no completions; a majority needs at least one.")
        answers = [[extract_answer(text[-MAJORITY_WINDOW:]) for text in of_problem] for of_problem in completions]
        distinct = [list(dict.fromkeys(answer for answer in of_problem if answer is not None)) for of_problem in answers]
        # An answer that cannot even be compared with itself in time would cost the limit again beside every other.
        contested = [of_problem for of_problem in distinct if len(of_problem) > 1]
        self._compare(((answer, answer) for of_problem in contested for answer in of_problem), "read answers", equal_texts=True)
        cluster: list[dict[str, str]] = [{} for _ in distinct]  # of each problem: answer → first answer of its cluster
        for turn in range(max(map(len, distinct), default=0)):
            candidates = {
                problem: (of_problem[turn], self._comparable(of_problem[turn], cluster[problem]))
                for problem, of_problem in enumerate(distinct)
                if turn < len(of_problem)
            }
            self._compare(((answer, other) for answer, others in candidates.values() for other in others), "cluster answers")
            for problem, (answer, others) in candidates.items():
                equal = (other for other in others if self._verdict(answer, other) is Verdict.RIGHT)
                cluster[problem][answer] = next(equal, answer)
        return [_largest(of_problem, own) for of_problem, own in zip(answers, cluster)]

    def _comparable(self, answer: str, cluster: dict[str, str]) -> list[str]:
        if not cluster or self._known[answer, answer] is Verdict.TIMED_OUT:
            return []
        return [other for other in dict.fromkeys(cluster.values()) if self._known[other, other] is not Verdict.TIMED_OUT]

    def _verdict(self, answer: str, gold: str) -> Verdict:
        return Verdict.RIGHT if answer.strip() == gold.strip() else self._known[answer, gold]

    def _compare(self, pairs: Iterable[Pair], what: str, equal_texts: bool = False) -> None:
        """Makes the verdict of each pair known; equal texts need none, unless asked for."""
        unknown = [pair for pair in dict.fromkeys(pairs) if pair not in self._known and (equal_texts or pair[0].strip() != pair[1].strip())]
        if unknown:
            with Progress(what, total=len(unknown), unit="comparisons") as progress:
                for pair, verdict in self._pool.compare(unknown, progress):
                    self._known[pair] = verdict


def _largest(answers: Sequence[str | None], cluster: dict[str, str]) -> int:
    """Position of the first member of the largest cluster; ties go to the cluster that comes first."""
    members: dict[str | int, list[int]] = {}
    for position, answer in enumerate(answers):
        members.setdefault(position if answer is None else cluster[answer], []).append(position)
    return max(members.values(), key=len)[0]


# -------------------------------------------------------------------------------------------------------------------------- processes


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process, and the pair that it is at."""

    def __init__(self, memory_bytes: int):
        self.process = subprocess.Popen(
            # -P: the script's folder, full of modules with common names, stays off its path.
            [sys.executable, "-P", str(_WORKER), str(os.getpid()), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # the terminal's Ctrl-C is the parent's to handle
        )
        self.pair: Pair | None = None
        self.is_ready = False
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def is_busy(self) -> bool:
        return self.pair is not None or not self.is_ready

    def give(self, pair: Pair, seconds: float) -> None:
        self.pair = pair
        self.deadline = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(pair).encode("ascii") + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead, which its output will tell

    def reply(self) -> bool | str | None:
        """Its next line; None where it has died."""
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # what it was given and never read


class _Pool:
    """Workers that are started when there is work, and replaced when they die or are killed."""

    def __init__(self, limit: int, seconds: float, memory_bytes: int):
        self.limit, self.seconds, self.memory_bytes = limit, seconds, memory_bytes
        self.workers: list[_Worker] = []
        self.waiting: deque[Pair] = deque()
        self.broken: set[Pair] = set()  # pairs that a worker died of, or during
        self.failed_starts = 0
        self.selector: selectors.BaseSelector | None = None

    def compare(self, pairs: Sequence[Pair], progress: Progress) -> Iterable[tuple[Pair, Verdict]]:
        """Yields each pair with its verdict, as they come."""
        self.waiting, self.broken = deque(pairs), set()
        left = len(pairs)
        try:
            while len(self.workers) < min(self.limit, len(pairs)):
                self._start()
            for worker in self.workers:
                self._feed(worker)
            while left:
                for pair, verdict in [*self._replies(), *self._overdue()]:
                    yield pair, verdict
                    left -= 1
                    progress.update(1)
                progress.update(0)  # shows that nothing comes, while everything hangs
        finally:
            if left:  # cut off: the workers are at pairs that nobody waits for
                self.close()

    def _replies(self) -> Iterable[tuple[Pair, Verdict]]:
        next_deadline = min(worker.deadline for worker in self.workers if worker.is_busy)
        for key, _ in self.selector.select(min(max(0.0, next_deadline - time.monotonic()), 1.0)):
            worker, pair = key.data, key.data.pair
            reply = worker.reply()
            if reply is None:
                self._replace(worker)
                if pair in self.broken:
                    yield pair, Verdict.TIMED_OUT
                elif pair is not None:  # it may have been killed for what it had nothing to do with, as by the system short of memory
                    self.broken.add(pair)
                    self.waiting.appendleft(pair)
                continue
            worker.pair, worker.is_ready = None, True
            self.failed_starts = 0
            self._feed(worker)
            if pair is not None:
                yield pair, Verdict.RIGHT if reply is True else Verdict.WRONG

    def _overdue(self) -> Iterable[tuple[Pair, Verdict]]:
        now = time.monotonic()
        for worker in [worker for worker in self.workers if worker.is_busy and now > worker.deadline]:
            pair = worker.pair
            self._replace(worker)
            if pair is not None:
                yield pair, Verdict.TIMED_OUT

    def _feed(self, worker: _Worker) -> None:
        if worker.is_ready and self.waiting:
            worker.give(self.waiting.popleft(), self.seconds)

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers.clear()
        if self.selector is not None:
            self.selector.close()
            self.selector = None

    def _start(self) -> None:
        self.selector = self.selector or selectors.DefaultSelector()
        worker = _Worker(self.memory_bytes)
        self.workers.append(worker)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _replace(self, worker: _Worker) -> None:
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        worker.end()
        self.failed_starts += not worker.is_ready
        if self.failed_starts == FAILED_STARTS:
            raise UserError(
                f"a process that compares mathematical answers ended before it was ready (status {worker.process.returncode}, "
                f"memory limit {self.memory_bytes:,} bytes); see whether `{sys.executable} -c 'import math_verify'` works."
            )
        self._start()
