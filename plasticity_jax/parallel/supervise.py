"""A run of several processes, supervised: the command's own process starts a worker and says in one line how it ended.

When one process of a run dies, jax ends the others from C++ with a trace. So the worker's runtime writes to a log file, and its parent, which
does not import jax, points to it.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from plasticity_jax.parallel.processes import JOINED, JOINING

WORKER = "PLASTICITY_WORKER"  # set for a worker: file descriptors of its parent's standard output and error

_PR_SET_PDEATHSIG = 1


def become_worker() -> bool:
    """In a worker: messages go to the terminal again, and True. The mark is taken off, so that programs started from here are none."""
    terminal = os.environ.pop(WORKER, None)
    if terminal is None:
        return False
    sys.stdout, sys.stderr = (os.fdopen(int(number), "w", buffering=1, encoding="utf-8", errors="backslashreplace") for number in terminal.split(","))
    return True


def supervise(argv: list[str], log_dir: Path | None) -> int:
    """Runs the same command line as a worker and waits for it.

    Args:
      log_dir: where the runtime's messages go, one file per process; None, or a folder that cannot be made, takes one for temporary files.
    Returns:
      The worker's exit status; 1 where it was lost or lost another.
    """
    made = _missing_folders(log_dir)
    log_path = _log_path(log_dir)
    terminal = [os.dup(1), os.dup(2)]
    parent = os.getpid()

    def in_worker():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    with open(log_path, "wb") as log_file:
        environment = os.environ | {WORKER: ",".join(map(str, terminal))}
        command = [sys.executable, "-m", "plasticity_jax", *argv]
        worker = subprocess.Popen(  # in a group of its own: the terminal's Ctrl-C reaches it once, from here
            command, stdout=log_file, stderr=log_file, env=environment, pass_fds=terminal, preexec_fn=in_worker, process_group=0
        )
    interrupted = []

    def pass_on(number, frame):
        interrupted.append(number)
        worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = worker.wait()
    if status in (0, 2):
        log_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what was made for the log alone goes with it, and nothing that holds more
            for folder in made:
                folder.rmdir()
    if status in (0, 2, 130) or (interrupted and status >= 0):
        return status
    marks = log_path.read_text(encoding="utf-8", errors="replace")
    joining = re.search(rf"^{JOINING}(.+)$", marks, re.MULTILINE)
    if status == -signal.SIGABRT and joining and JOINED not in marks:
        print(f"plasticity: {joining[1]}", file=sys.stderr)
        return 2
    if status < 0:  # a worker that ends by itself has printed why
        who = re.search(rf"^{JOINED}(\d+ of \d+)$", marks, re.MULTILINE)
        name = f"process {who[1]}" if who else "this process"
        print(f"plasticity: {name} ended with {_signal_name(-status)}; see {log_path}; run the same commands again: they resume", file=sys.stderr)
    return 1


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _missing_folders(folder: Path | None) -> list[Path]:
    """The folder and those above it that do not exist yet, innermost first."""
    return [] if folder is None else [path for path in (folder, *folder.parents) if not path.exists()]


def _log_path(folder: Path | None) -> Path:
    name = f"{socket.gethostname()}-{os.getpid()}.log"
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return folder / name
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="plasticity-")) / name
