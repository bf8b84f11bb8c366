"""One holder at a time: a lock file that the system frees with its process on a disk, an object with a heartbeat on a store."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.runs.storage import AnyPath, is_local, write_bytes

log = logging.getLogger("plasticity_jax")

HEARTBEAT_SECONDS = 15.0
# A holder that was not heard of for so long is taken for dead: well above a slow store, and what the restart of a killed run on another machine waits
# at most. Clocks of holder and reader that agree to less than the difference of the two make that wait shorter, and are not needed.
STALE_SECONDS = 120.0
LOOK_SECONDS = 2.0
# Longer than a store takes to write an object.
TAKEOVER_SECONDS = 2.0

_held: set[str] = set()  # tokens of the locks of this process


class Held:
    """A lock that this process holds."""

    def __init__(self, path: AnyPath, token: str | None = None):
        self._path, self._token = path, token

    def check(self) -> None:
        """Raises UserError if another process has taken the lock meanwhile, because nothing was heard of this one for too long."""
        if self._token is not None and (_read(self._path) or {}).get("token") != self._token:
            raise UserError(f"{self._path} was taken over by another process while this one was silent; let that one finish.")


@contextlib.contextmanager
def lock(path: AnyPath) -> Iterator[Held]:
    """Holds the lock while the block runs; the file is gone after a block that did not raise, and always on a store.

    Where another machine's process holds it, this waits for a sign of life, and takes the lock if none comes.

    Raises:
      BlockingIOError: another process holds it.
    """
    if is_local(path):
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Held(path)
            path.unlink(missing_ok=True)
        return
    token = _acquire(path)
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, token, stop), daemon=True)
    thread.start()
    try:
        yield Held(path, token)
    finally:
        stop.set()
        thread.join()
        _held.discard(token)
        if (_read(path) or {}).get("token") == token:
            path.unlink(missing_ok=True)


def is_locked(path: AnyPath) -> bool:
    """Whether a process holds the lock."""
    if not is_local(path):
        return _alive(_read(path))
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _acquire(path: AnyPath) -> str:
    token = uuid.uuid4().hex
    content = _content(token)
    try:
        path.fs.pipe_file(path.path, content, mode="create")
    except FileExistsError:
        if not _abandoned(path):
            raise BlockingIOError(f"{path} is held") from None
        write_bytes(path, content)
        # Two processes may take over a dead one's lock at once; the last to write has it.
        time.sleep(TAKEOVER_SECONDS)
        if (_read(path) or {}).get("token") != token:
            raise BlockingIOError(f"{path} is held") from None
    _held.add(token)
    return token


def _abandoned(path: AnyPath) -> bool:
    """Whether the holder is gone. Waits for it to be heard of, or to have been silent for too long."""
    first = _read(path)
    if not _alive(first):
        return True
    if first.get("host") == socket.gethostname():
        return False
    log.info("%s is held by process %s of %s; waiting for a sign of life", path, first.get("pid"), first.get("host"))
    end = time.monotonic() + STALE_SECONDS
    with Progress("wait for its holder", total=round(STALE_SECONDS), unit="seconds") as progress:
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            progress.update(round(LOOK_SECONDS))
            now = _read(path)
            if not _alive(now):
                return True
            if now != first:
                return False
    return True


def _content(token: str) -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": token, "time": time.time()}).encode()


def _read(path: AnyPath) -> dict | None:
    """What lies in the lock; None where there is none, and {} where it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _alive(found: dict | None) -> bool:
    """Whether the holder is taken to live: heard of lately, and not known to this machine to be gone."""
    if not found or time.time() - found.get("time", 0.0) > STALE_SECONDS:
        return False
    if found.get("host") != socket.gethostname():
        return True
    if found.get("pid") == os.getpid():  # in a container that was started again, often the number of the process before
        return found.get("token") in _held
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _beat(path: AnyPath, token: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            if (_read(path) or {}).get("token") != token:
                log.error("%s was taken over by another process", path)
                return
            write_bytes(path, _content(token))
        except Exception as error:  # a store that does not answer now may do so at the next beat
            log.warning("%s could not be renewed: %s", path, error)
