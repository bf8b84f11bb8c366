"""Worker processes of one thread each, which carry out parts of a command side by side on a CPU.

XLA adds in the same order wherever it has one thread, so that results depend neither on the number of workers nor on that of the cores. Small models gain
most: their operations are too short to be divided among threads.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from plasticity_jax.parallel import preemption, processes
from plasticity_jax.parallel.supervise import ending
from plasticity_jax.parallel.threads import Threads
from plasticity_jax.runs.jsonfiles import to_json

ONE_THREAD = {"NPROC": "1", "JAX_PLATFORMS": "cpu"}
ONE_THREAD_FLAG = "--xla_cpu_multi_thread_eigen=false"
MEMORY = 2**31  # bytes that there should be for each worker

Message = dict[str, Any]


def number_of_workers(parallel_runs: int) -> int | None:
    """How many workers `launch.parallel_runs` means here; None where runs share this process, as on accelerators, simulated devices and several hosts."""
    import jax

    if parallel_runs == 1 or processes.total() > 1 or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return None
    return parallel_runs or _as_many_as_fit()


def _as_many_as_fit() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY))


class Workers:
    """Workers, each started when there is work for it. They end with the block.

    Args:
      number: how many, at most.
      program: Python code that calls `serve`.
      task: what each is told at its start.
    """

    def __init__(self, number: int, program: str, task: Message):
        self._program, self._task = program, to_json(task)
        self._workers: list[_Worker | None] = [None] * number
        self._kinds: dict[int, str] = {}  # of the last question that each was asked

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        for worker in filter(None, self._workers):
            worker.end()

    def ask(
        self,
        questions: Sequence[Message],
        answered: Callable[[int, Any], bool],
        *,
        asked: Callable[[int], Message] = lambda index: {},
        kinds: Sequence[str] = (),
    ) -> None:
        """Has questions answered, each by the first worker that is free.

        Args:
          kinds: of the questions; those of one kind go to one worker while others have any, because what it has compiled serves for all. None is made to
            wait for that. Without them questions are asked in order.
          asked: (index of a question) → what is added to it, when a worker is about to get it.
          answered: (index of a question, its answer) → whether to ask what has not been asked yet. A worker that dies answers {"died": how}.
        Raises:
          KeyboardInterrupt, Preempted: this process was told to end, and has told the workers, which have ended.
          UserError, Failed: what a worker raised; the others have ended.
        """
        left, one_by_one, choosing = list(range(len(questions))), threading.Lock(), threading.Lock()
        of = kinds or [""] * len(questions)
        errors: list[BaseException] = []

        def next_for(place: int) -> int | None:
            """The question that is left for a worker: of its own kind, else of one that no other is at, else the first."""
            with choosing:
                if not left or errors:
                    return None
                of_others = {kind for other, kind in self._kinds.items() if other != place}
                index = min(left, key=lambda index: (of[index] != self._kinds.get(place), of[index] in of_others))
                left.remove(index)
                self._kinds[place] = of[index]
                return index

        def work(place: int) -> None:
            while (index := next_for(place)) is not None:
                try:
                    answer = self._answer(place, questions[index] | asked(index))
                    with one_by_one:
                        if not answered(index, answer):
                            left.clear()
                except BaseException as error:
                    errors.append(error)

        told = threading.Event()

        def check() -> None:
            preemption.check()
            if errors and not told.is_set():
                told.set()
                self._signal(signal.SIGTERM)  # so that the others save what they train

        threads = Threads({f"worker {place}": functools.partial(work, place) for place in range(min(len(self._workers), len(left)))})
        try:
            threads.wait(check)
        except KeyboardInterrupt as interrupt:
            left.clear()
            self._signal(signal.SIGTERM if preemption.name() == "SIGTERM" else signal.SIGINT)
            with preemption.writing():  # which the workers may do
                threads.wait()
            raise next((error for error in errors if isinstance(error, preemption.Preempted)), interrupt) from None
        if errors:
            raise errors[0]

    def _answer(self, place: int, question: Message) -> Any:
        worker = self._workers[place] = self._workers[place] or _Worker(self._program, self._task)
        answer = worker.ask(question)
        if answer is None:
            self._workers[place] = None
            return {"died": ending(worker.end())}
        if "interrupted" in answer:
            raise (preemption.Preempted if answer["saved"] else KeyboardInterrupt)(answer["interrupted"])
        return processes.outcome_of(answer)

    def _signal(self, number: int) -> None:
        for worker in filter(None, self._workers):
            worker.signal(number)


class _Worker:
    """A process that runs `serve`. What it says on standard error appears on that of this process."""

    def __init__(self, program: str, task: str):
        environment = os.environ | ONE_THREAD | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD_FLAG}"}
        pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        # In its own process group, so that Ctrl-C reaches it only once, from here.
        self._process = subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, process_group=0, **pipes)
        self._relay = threading.Thread(target=self._pass_on, daemon=True)
        self._relay.start()
        self._say(task)

    def ask(self, question: Message) -> Message | None:
        """Its answer; None if it died."""
        self._say(to_json(question))
        line = self._process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        return json.loads(line) if line.endswith("\n") else None

    def signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> int:
        """Its exit status, once it has said all. It ends by itself where it has nothing to do or was told to."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        self._relay.join()
        return self._process.wait()

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # that it has died is seen when it does not answer
            print(line, file=self._process.stdin, flush=True)

    def _pass_on(self) -> None:
        for line in self._process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------- in the worker


def serve(prepare: Callable[[Message], Callable[[Message], Any]]) -> None:
    """Answers questions until there are no more, or until the process that asks is gone.

    Args:
      prepare: (task) → what answers a question with a JSON value. It may raise.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is printed is no answer
    questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    asked = answered = 0

    def listen() -> None:
        nonlocal asked
        for line in sys.stdin:
            asked += 1
            questions.put(line)
        if asked != answered:  # whoever asked is gone; the next command goes on with what is not finished
            os._exit(1)
        questions.put(None)

    threading.Thread(target=listen, daemon=True).start()
    message: Message = {}
    with preemption.handled():
        with contextlib.suppress(KeyboardInterrupt):  # while there is nothing to do
            answer = prepare(json.loads(questions.get() or "{}"))
            answered += 1
            while "interrupted" not in message and (question := questions.get()) is not None:
                try:
                    message = {"value": answer(json.loads(question))}
                except Exception as error:
                    message = processes.as_message(error)
                except KeyboardInterrupt as error:
                    message = {"interrupted": str(error), "saved": isinstance(error, preemption.Preempted)}
                answered += 1
                print(to_json(message), file=answers, flush=True)
        told = preemption.requested()
    if told:  # jax would wait for what was interrupted
        sys.stderr.flush()
        os._exit(preemption.INTERRUPTED)
