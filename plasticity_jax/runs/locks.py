"""One holder at a time: a lock file that the system frees with its process on a disk, an object that is created once on a store."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
from upath import UPath

from plasticity_jax.errors import StudyRefused
from plasticity_jax.runs.storage import AnyPath, is_local

LOOK_SECONDS = 0.5  # for which a lock is tried: `is_locked` may hold it for an instant

_held: set[str] = set()  # tokens of the locks on stores that this process holds or is about to


@contextlib.contextmanager
def lock(path: AnyPath) -> Iterator[None]:
    """Holds the lock while the block runs.

    On a disk the system frees the lock of a process that dies. On a store its object stays; this machine sees that its own process is gone, and for one
    of another machine the refusal says what to delete.

    Raises:
      StudyRefused: another process holds it, or it is no file.
    """
    if not is_local(path):
        with _lease(path):
            yield
        return
    if os.path.lexists(path) and not path.is_file():
        raise StudyRefused(f"{path} is no regular file; delete it and run again.")
    held = filelock.UnixFileLock(path, timeout=LOOK_SECONDS)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise StudyRefused(f"{path.parent} is being worked on by another process; wait for it or stop it.") from error
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def _lease(path: UPath) -> Iterator[None]:
    """The lock on a store: an object that is created if there is none."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    _held.add(mine["token"])
    mine["since"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        _remove_left_behind(path)
        path.fs.pipe_file(path.path, json.dumps(mine).encode(), mode="create")
    except FileExistsError as error:
        found = _holder(path) or {}
        who = f"process {found.get('pid', '?')} of {found.get('host', 'an unknown host')} since {found.get('since', 'an unknown time')}"
        raise StudyRefused(f"{path.parent} is being worked on by {who}; wait for it, or delete {path} if that process is gone.") from error
    try:
        yield
    finally:
        if _holder(path) == mine:  # else somebody has deleted it, and it is another's now
            path.unlink(missing_ok=True)
        _held.discard(mine["token"])


def _remove_left_behind(path: UPath) -> None:
    """Removes the lock of a process of this machine that has ended; one process of this machine at a time, so that none removes a new lock."""
    if not _is_gone(_holder(path)):
        return
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    with filelock.UnixFileLock(Path(tempfile.gettempdir()) / f"plasticity-{os.getuid()}-{name}.lock"):
        if _is_gone(_holder(path)):
            path.unlink(missing_ok=True)


def is_locked(path: AnyPath) -> bool:
    """Whether a process holds the lock."""
    if not is_local(path):
        holder = _holder(path)
        return holder is not None and not _is_gone(holder)
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with open(path) as file:  # shared, so that those who only look do not get into each other's way
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holder(path: UPath) -> dict | None:
    """What lies in a lock on a store; None where there is none, and {} where it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _is_gone(holder: dict | None) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if not holder or holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    if holder["pid"] == os.getpid():  # a container that is started again often has the process number of the one before
        return holder.get("token") not in _held
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
