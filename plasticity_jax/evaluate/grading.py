"""Grading of many completions: verdicts and majorities. Mathematics runs in processes that may hang, run out of memory or die without harm."""

import enum
import importlib.util
import os
import queue
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import pebble

from plasticity_jax.data.pool import available_cores
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import grading_worker
from plasticity_jax.evaluate.answers import GRADERS, MAJORITY_WINDOW, extract_answer, judge, majority_index
from plasticity_jax.evaluate.wording import formula, own_clause
from plasticity_jax.progress import Progress

SECONDS = 4.0  # limit of a comparison; paper section 5.3
MEMORY_BYTES = 1 << 30
MAX_BROKEN_POOLS = 3  # in a row, before giving up

Pair = tuple[str, str]


class Verdict(enum.StrEnum):
    """What became of a completion; only RIGHT counts.

    TIMED_OUT: the comparison took longer than its limit, or killed two processes in a row (out of memory, a crash of the interpreter).
    """

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no answer"
    TIMED_OUT = "timed out"


class Grading:
    """Judges answers with one grader. A context manager, because "math" keeps processes running.

    Args:
      grader: one of `answers.GRADERS` (see `answers.judge`), or "math": equal as formulas according to math-verify, in either order, or as texts, see
        `grading_worker.compare`. Only "math" starts processes, when the first comparison needs them.
      faithful: see `answers.judge`; "math" is then `grading_worker.compare_as_published` of the whole answer.
      workers: number of processes; 0 takes one per core available to this process.
      seconds: wall time of one comparison, after which its process is killed and replaced.
      memory_bytes: address space of a process. Beyond it, an answer is wrong if the parser survives and "timed out" if it does not.
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
            raise UserError("the grader 'math' needs the package math-verify, which is not installed; pip install math-verify.")
        self.grader, self.faithful = grader, faithful
        self.workers, self.seconds, self.memory_bytes = workers or available_cores(), seconds, memory_bytes
        self._pool: pebble.ProcessPool | None = None
        self._known: dict[Pair, Verdict] = {}

    def __enter__(self) -> "Grading":
        return self

    def __exit__(self, *exception) -> None:
        self._stop_pool()

    def judge(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """Verdicts on (answer, gold), in order. An answer is what `answers.answer_of` returned, None included."""
        if self.grader == "math":
            read = [(None if answer is None else self._formula(answer), gold if self.faithful else formula(gold)) for answer, gold in pairs]
            self._compare(((answer, gold) for answer, gold in read if answer is not None), "grade answers")
            return [Verdict.NO_ANSWER if answer is None else self._verdict(answer, gold) for answer, gold in read]
        return [
            Verdict.NO_ANSWER if answer is None else Verdict.RIGHT if judge(answer, gold, self.grader, faithful=self.faithful) else Verdict.WRONG
            for answer, gold in pairs
        ]

    def majority(self, completions: Sequence[Sequence[str]]) -> list[int]:
        """Per problem, the position of the first completion of its largest cluster, as in `answers.majority_index`.

        With "math", an answer joins the first cluster whose first answer equals it. An answer whose comparison times out joins only its own text.

        Raises:
          ValueError: a problem without completions.
        """
        if self.grader != "math":
            return [majority_index(of_problem, self.grader, faithful=self.faithful) for of_problem in completions]
        if not all(completions):
            raise ValueError("a problem has no completions; a majority needs at least one.")
        answers = [[self._stated(text[-MAJORITY_WINDOW:]) for text in of_problem] for of_problem in completions]
        distinct = [list(dict.fromkeys(answer for answer in of_problem if answer is not None)) for of_problem in answers]
        # An answer that cannot even be compared with itself in time would reach the limit again with every other answer.
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

    def _stated(self, text: str) -> str | None:
        answer = extract_answer(text, faithful=self.faithful)
        return None if answer is None else self._formula(answer)

    def _formula(self, answer: str) -> str:
        """What is compared of an answer."""
        return answer if self.faithful else formula(own_clause(answer))

    def _comparable(self, answer: str, cluster: dict[str, str]) -> list[str]:
        if not cluster or self._known[answer, answer] is Verdict.TIMED_OUT:
            return []
        return [other for other in dict.fromkeys(cluster.values()) if self._known[other, other] is not Verdict.TIMED_OUT]

    def _verdict(self, answer: str, gold: str) -> Verdict:
        return Verdict.RIGHT if self._equal_texts(answer, gold) else self._known[answer, gold]

    def _equal_texts(self, answer: str, gold: str) -> bool:
        """Whether two answers are equal without a process. The original knows no such rule."""
        return not self.faithful and answer == gold

    def _compare(self, pairs: Iterable[Pair], what: str, equal_texts: bool = False) -> None:
        """Looks up or computes the verdict of each pair. Equal texts are skipped unless `equal_texts`."""
        unknown = [pair for pair in dict.fromkeys(pairs) if pair not in self._known and (equal_texts or not self._equal_texts(*pair))]
        if unknown:
            with Progress(what, total=len(unknown), unit="comparisons") as progress:
                self._known.update(self._compare_in_processes(unknown, progress))

    def _compare_in_processes(self, pairs: Sequence[Pair], progress: Progress) -> Iterator[tuple[Pair, Verdict]]:
        """Yields each pair with its verdict, in the order of completion."""
        waiting = dict.fromkeys(pairs, False)  # pair → whether it has already killed a process
        broken_pools = 0
        try:
            while waiting:
                try:
                    for pair, verdict in self._compare_until_broken(waiting, progress):
                        broken_pools = 0
                        yield pair, verdict
                except RuntimeError as error:  # from pebble: a process ended while it was not comparing anything
                    self._stop_pool()
                    broken_pools += 1
                    if broken_pools == MAX_BROKEN_POOLS:
                        raise UserError(
                            f"the processes that compare mathematical answers end before they are ready (memory limit {self.memory_bytes:,} bytes); "
                            f"check that `{sys.executable} -c 'import math_verify'` works."
                        ) from error
        finally:
            if waiting:  # interrupted: the processes work on pairs that nobody waits for
                self._stop_pool()

    def _compare_until_broken(self, waiting: dict[Pair, bool], progress: Progress) -> Iterator[tuple[Pair, Verdict]]:
        pool, futures = self._running_pool(), {}
        compare = grading_worker.compare_as_published if self.faithful else grading_worker.compare
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def schedule(pair: Pair) -> None:
            future = pool.schedule(compare, args=pair, timeout=self.seconds)
            futures[future] = pair
            future.add_done_callback(done.put)

        for pair in waiting:
            schedule(pair)
        while waiting:
            try:
                future = done.get(timeout=1.0)
            except queue.Empty:
                progress.update(0)  # shows that nothing arrives while everything hangs
                continue
            pair, error = futures.pop(future), future.exception()
            if isinstance(error, pebble.ProcessExpired) and not waiting[pair]:
                waiting[pair] = True  # the first time may be an accident, such as a system short of memory
                schedule(pair)
                continue
            if error is not None and not isinstance(error, (TimeoutError, pebble.ProcessExpired)):
                raise error
            del waiting[pair]
            progress.update(1)
            yield pair, Verdict.TIMED_OUT if error is not None else Verdict.RIGHT if future.result() else Verdict.WRONG

    def _running_pool(self) -> pebble.ProcessPool:
        if self._pool is not None and not self._pool.active:
            self._stop_pool()
        if self._pool is None:
            self._pool = pebble.ProcessPool(
                self.workers,
                initializer=grading_worker.start,
                initargs=(os.getpid(), self.memory_bytes),
                context=grading_worker.SpawnContext(),
            )
            # Ctrl-C is for this process to handle. Threads and processes inherit the blocked signal, so no worker prints a trace while it starts.
            resource_tracker.ensure_running()  # unblocks the signal when it starts
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._pool.schedule(os.getpid)  # starts the pool
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._pool

    def _stop_pool(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


def _largest(answers: Sequence[str | None], cluster: dict[str, str]) -> int:
    """Position of the first member of the largest cluster; ties go to the cluster that comes first."""
    members: dict[str | int, list[int]] = {}
    for position, answer in enumerate(answers):
        members.setdefault(position if answer is None else cluster[answer], []).append(position)
    return max(members.values(), key=len)[0]
