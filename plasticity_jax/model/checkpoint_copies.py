"""Checkpoints on a store that Orbax does not write to: saved and read in a folder of this machine, copied to and from the store step by step."""

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from upath import UPath

from plasticity_jax.runs.storage import download, remove_tree, upload

# Written last into a step's folder, and removed first: a step without it is no step. Orbax does the same on gs://, by this name, and writes it on a
# disk too.
COMMITTED = "commit_success.txt"


def committed_steps(store: UPath) -> set[int]:
    """The steps below a folder of a store that are whole."""
    if not store.is_dir():
        return set()
    return {int(path.name) for path in store.iterdir() if path.name.isdigit() and (path / COMMITTED).is_file()}


def remove_step(store: UPath, step: int) -> None:
    """Removes a step, whole or not."""
    (store / str(step) / COMMITTED).unlink(missing_ok=True)
    remove_tree(store / str(step))


class StepCopies:
    """The steps of a run on a store, and a local folder that Orbax takes for them.

    Args:
      store: the folder that holds the steps.
      keep: how many of the latest steps to keep there.
    Attributes:
      folder: the local folder, removed by `close`.
    """

    def __init__(self, store: UPath, *, keep: int):
        self._store, self._keep = store, keep
        self.folder = Path(tempfile.mkdtemp(prefix="plasticity-checkpoints-"))
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def latest(self) -> int | None:
        """The largest step that is whole on the store, or None."""
        return max(committed_steps(self._store), default=None)

    def fetch(self, step: int) -> None:
        """Brings a step to the local folder."""
        download(self._store / str(step), self.folder / str(step))

    def publish(self, step: int, saved: Callable[[], None]) -> None:
        """Copies a step to the store in the background, once `saved` has returned, and removes the oldest there."""
        self.wait()
        self._pending = self._thread.submit(self._publish, step, saved)

    def _publish(self, step: int, saved: Callable[[], None]) -> None:
        saved()
        remove_step(self._store, step)
        (self.folder / str(step) / COMMITTED).touch()
        upload(self.folder / str(step), self._store / str(step), last=COMMITTED)
        for old in sorted(committed_steps(self._store))[: -self._keep]:
            remove_step(self._store, old)

    def wait(self) -> None:
        """Returns when every step published so far is whole on the store. Raises what went wrong with one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and removes the local folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)
