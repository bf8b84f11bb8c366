"""How tests run the program: in this process where they can, in one of its own where the process is what they test."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plasticity_jax.cli import main

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
PLASTICITY = [sys.executable, "-m", "plasticity_jax"]
PATIENCE = 300  # seconds that a test waits for an event before it calls it missing; no test is about the time that passes


@dataclass
class Ended:
    """How a command ended: its status, what it printed, and what it said (messages and log lines)."""

    returncode: int
    stdout: str
    stderr: str


def plasticity(*argv) -> Ended:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    log = logging.getLogger("plasticity_jax")
    heard, level, handler = logging.StreamHandler(err), log.level, signal.getsignal(signal.SIGTERM)
    log.addHandler(heard)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in argv])
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
        signal.signal(signal.SIGTERM, handler)
    return Ended(status, out.getvalue(), err.getvalue())


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """The environment of a child process with this many simulated devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | changes


def python(code: str, *argv, devices: int = 1, **changes: str) -> str:
    """Runs Python code in a process of its own; what it printed."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, env=environment(devices, **changes), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def start(*argv, devices: int = 1, **changes: str) -> subprocess.Popen:
    """Starts a command in a process of its own."""
    command = [*PLASTICITY, *map(str, argv)]
    return subprocess.Popen(command, env=environment(devices, **changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen, timeout: float = PATIENCE) -> tuple[int, list[str]]:
    """(status, lines on standard error) of a process, once it has ended."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors.splitlines()


def wait_until(happened: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Waits for an event that running processes bring about; fails where one of them ends first."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, f"status {ended[0].returncode}: {ended[0].stderr.read() if ended[0].stderr else ''}"
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


def status_rows(workdir) -> list[dict]:
    """The rows of `plasticity status --json`."""
    ended = plasticity("status", "--workdir", workdir, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)["runs"]


# A `python -m plasticity_jax` whose training pauses at step $PAUSE_AT, once the step before is written, and says so by making $PAUSED: what is then killed
# or interrupted is always in the middle of its run, on every machine; a signal ends the pause. An evaluation pauses likewise once $PAUSE_AT problems are
# written. It stands before the package on the path, and supervised workers take it too.
_PAUSES = """
import os, time
if "PLASTICITY_WORKER" in os.environ or "--coordinator" not in __import__("sys").argv:
    from plasticity_jax.parallel import preemption
    from plasticity_jax.train import loop
    settle = loop._Loop.settle_pending

    def settle_or_pause(self, state=None):
        if self.pending is not None and self.pending[0] == int(os.environ["PAUSE_AT"]):
            for track in self.tracks:
                track.checkpoints.wait()
            open(os.environ["PAUSED"], "w").close()
            while not preemption.requested():
                time.sleep(0.01)
        settle(self, state)

    loop._Loop.settle_pending = settle_or_pause

    from plasticity_jax.evaluate import evaluate
    class PausingLog(evaluate.AppendLog):
        written = 0

        def append(self, row):
            super().append(row)
            self.written += 1
            if self.written == int(os.environ["PAUSE_AT"]):
                open(os.environ["PAUSED"], "w").close()
                time.sleep(3600)

    evaluate.AppendLog = PausingLog
from plasticity_jax.cli import entry
entry()
"""


def pausing(folder: Path, step: int) -> tuple[dict[str, str], Callable[[], bool]]:
    """(environment for `start`, whether it has paused) of a program that pauses when it would settle this step."""
    package = folder / "pausing" / "plasticity_jax"
    package.mkdir(parents=True)
    real = Path(__file__).parents[1] / "plasticity_jax"
    (package / "__init__.py").write_text(f"__path__.append({str(real)!r})\n")
    (package / "__main__.py").write_text(_PAUSES)
    paused = folder / "paused"
    return {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1", "PAUSE_AT": str(step), "PAUSED": str(paused)}, paused.exists
