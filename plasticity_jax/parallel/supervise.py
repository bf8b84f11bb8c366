"""Supervises one process of a distributed run: starts it as a worker, and reports in one line how it ended.

If a process of a run dies, jax aborts the others from C++ with a stack trace. The worker's runtime therefore writes to a log file, and its parent,
which does not import jax, prints the path of that file.
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

from plasticity_jax.parallel.processes import JOINED, JOINING, LEAVING

WORKER = "PLASTICITY_WORKER"  # set in a worker: file descriptors of its parent's stdout and stderr

_PR_SET_PDEATHSIG = 1


def become_worker() -> bool:
    """Returns whether this process is a worker. If so, sends Python's stdout and stderr to the terminal, and unsets WORKER for child processes."""
    terminal = os.environ.pop(WORKER, None)
    if terminal is None:
        return False
    sys.stdout, sys.stderr = (os.fdopen(int(number), "w", buffering=1, encoding="utf-8", errors="backslashreplace") for number in terminal.split(","))
    return True


def supervise(argv: list[str], log_dir: Path | None) -> int:
    """Runs the same command line in a worker and waits for it.

    Args:
      log_dir: folder for the runtime's messages, one file per process. If it is None or cannot be made, a temporary folder is used.
    Returns:
      The worker's exit status if it is 0, 2 or 130, or after an interrupt; 2 if the processes did not meet in time; otherwise 1.
    """
    made = _missing_folders(log_dir)
    log_path = _log_path(log_dir)
    terminal = [os.dup(1), os.dup(2)]
    parent = os.getpid()

    def in_worker():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    with open(log_path, "wb") as log_file:
        environment = os.environ | {WORKER: ",".join(map(str, terminal))}
        command = [sys.executable, "-m", "plasticity_jax", *argv]
        worker = subprocess.Popen(  # in its own process group, so that Ctrl-C reaches it only once, from here
            command, stdout=log_file, stderr=log_file, env=environment, pass_fds=terminal, preexec_fn=in_worker, process_group=0
        )
    interrupted = []

    def pass_on(number, frame):
        interrupted.append(number)
        worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = worker.wait()
    marks = log_path.read_text(encoding="utf-8", errors="replace")
    leaving = re.search(rf"^{LEAVING}(\d+)$", marks, re.MULTILINE)
    if status == -signal.SIGABRT and leaving:
        status = int(leaving[1])
    if status in (0, 2):
        log_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # folders made for the log; rmdir keeps any that hold other files
            for folder in made:
                folder.rmdir()
    if status in (0, 2, 130) or (interrupted and status >= 0):
        return status
    joining = re.search(rf"^{JOINING}(.+)$", marks, re.MULTILINE)
    if status == -signal.SIGABRT and joining and JOINED not in marks:
        print(f"plasticity: {joining[1]}", file=sys.stderr)
        return 2
    if status != 1:  # main returns 1 only after it has printed why
        who = re.search(rf"^{JOINED}(\d+ of \d+)$", marks, re.MULTILINE)
        name = f"process {who[1]}" if who else "this process"
        print(f"plasticity: {name} ended with {ending(status)}; see {log_path}; run the same commands again: they resume", file=sys.stderr)
    return 1


def ending(status: int) -> str:
    if status > 0:
        return f"status {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


def _missing_folders(folder: Path | None) -> list[Path]:
    """Returns the folder and its parents that do not exist yet, innermost first."""
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
