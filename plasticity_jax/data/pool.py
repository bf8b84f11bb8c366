"""Makes shards in several processes. Neither the order nor the result depends on their number."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from plasticity_jax.data.shards import Interrupted, Part, ShardSettings, write_shard
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.5

# The state of a worker process.
_worker: dict[str, Any] = {}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ShardPool:
    """A pool of processes that make shards. A single worker runs in this process.

    Args:
      workers: the number of processes.
      tokenizer_path: the tokenizer.json that every worker loads.
      settings: of the shards.
      on_progress: called from time to time in this process with (documents, tokens) done since the last call.
    Leaving the `with` block cancels unfinished work.
    """

    def __init__(self, workers: int, tokenizer_path: Path, settings: ShardSettings, *, on_progress: Callable[[int, int], None]):
        self._workers, self._settings, self._tokenizer_path, self._on_progress = workers, settings, tokenizer_path, on_progress
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "ShardPool":
        return self

    def __exit__(self, *exception) -> None:
        if self._executor is not None:
            self._stop.set()
            self._executor.shutdown(cancel_futures=True)

    def shards(self, tasks: Iterator[tuple[Path, Part, dict | None]]) -> Iterator[dict]:
        """Yields the manifests of the shards in the order of the tasks, which are consumed only as needed.

        Args:
          tasks: (folder, part, manifest if the shard already exists).
        Raises:
          UserError: see `write_shard`; or the system killed a worker.
        """
        if self._workers == 1:
            tokenizer = Tokenizer.load(self._tokenizer_path)
            for folder, part, manifest in tasks:
                yield manifest or write_shard(folder, part, tokenizer, self._settings, on_chunk=self._on_progress)
            return
        pending: deque[dict | Future] = deque()
        for folder, part, manifest in tasks:
            pending.append(manifest or self._submit(folder, part))
            while pending and (isinstance(pending[0], dict) or sum(isinstance(item, Future) for item in pending) >= 2 * self._workers):
                yield self._result(pending.popleft())
        while pending:
            yield self._result(pending.popleft())

    def _submit(self, folder: Path, part: Part) -> Future:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._stop, self._documents, self._tokens = context.Event(), context.Value("q"), context.Value("q")
            self._seen = (0, 0)
            shared = (self._tokenizer_path, self._settings, self._stop, self._documents, self._tokens)
            self._executor = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_start_worker, initargs=shared)
        return self._executor.submit(_make_shard, folder, part)

    def _result(self, item: dict | Future) -> dict:
        if isinstance(item, dict):
            return item
        while futures.wait([item], timeout=SECONDS_BETWEEN_LOOKS).not_done:
            self._report()
        self._report()
        try:
            return item.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {self._workers} tokenizer processes was killed by the system, probably because memory ran out; "
                "lower data.workers and run again: finished shards are kept"
            ) from error

    def _report(self) -> None:
        now = (self._documents.value, self._tokens.value)
        if now != self._seen:
            self._on_progress(now[0] - self._seen[0], now[1] - self._seen[1])
            self._seen = now


def _start_worker(tokenizer_path: Path, settings: ShardSettings, stop, documents, tokens) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _worker.update(tokenizer=Tokenizer.load(tokenizer_path), settings=settings, stop=stop, documents=documents, tokens=tokens)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent cannot notify its workers, which would wait forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _make_shard(folder: Path, part: Part) -> dict:
    def count(documents: int, tokens: int) -> None:
        if _worker["stop"].is_set():
            raise Interrupted
        with _worker["documents"].get_lock(), _worker["tokens"].get_lock():
            _worker["documents"].value += documents
            _worker["tokens"].value += tokens

    return write_shard(folder, part, _worker["tokenizer"], _worker["settings"], on_chunk=count)
