"""One holder at a time: a lock file that the system frees with its process on a disk, an object that is created once on a store."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

import filelock

from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import AnyPath, is_local


@contextlib.contextmanager
def lock(path: AnyPath) -> Iterator[None]:
    """Holds the lock while the block runs.

    On a disk the system frees the lock of a process that dies. On a store its object stays; this machine sees that its own process is gone, and for one
    of another machine the refusal says what to delete.

    Raises:
      UserError: another process holds it.
    """
    if is_local(path):
        held = filelock.UnixFileLock(path, blocking=False)
        try:
            held.acquire()
        except filelock.Timeout as error:
            raise UserError(f"{path.parent} is being worked on by another process; wait for it or stop it.") from error
        try:
            yield
        finally:
            held.release()
        return
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()
    holder = _holder(path)
    if holder is not None and _is_gone(holder):
        path.unlink(missing_ok=True)
    try:
        path.fs.pipe_file(path.path, content, mode="create")
    except FileExistsError as error:
        found = _holder(path) or {}
        who = f"process {found.get('pid', '?')} of {found.get('host', 'an unknown host')} since {found.get('since', 'an unknown time')}"
        raise UserError(f"{path.parent} is being worked on by {who}; wait for it, or delete {path} if that process is gone.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def is_locked(path: AnyPath) -> bool:
    """Whether a process holds the lock."""
    if not is_local(path):
        holder = _holder(path)
        return holder is not None and not _is_gone(holder)
    try:
        with open(path) as file:  # shared, so that those who only look do not get into each other's way
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holder(path: AnyPath) -> dict | None:
    """What lies in a lock on a store; None where there is none, and {} where it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _is_gone(holder: dict) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
