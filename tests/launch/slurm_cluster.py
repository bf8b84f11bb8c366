"""A real SLURM cluster of one machine: munged, slurmctld and slurmd from Debian, in a folder and on ports of their own. Needs root."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
CPUS = 2  # two tasks of a job side by side, and no more work than that at once, whatever the machine has


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """A running cluster.

    Attributes:
      environment: what a process needs in order to talk to this cluster and to no other.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "JAX", "XLA"))}
        self.environment = inherited | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(list(map(str, command)), env=self.environment | environment, capture_output=True, text=True, timeout=60)

    def state(self, job: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, ExitCode, Dependency, StartTime, EndTime and more."""
        shown = self.run("scontrol", "show", "job", job)
        assert shown.returncode == 0, shown.stderr
        return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)

    def wait(self, jobs: list[str], *, seconds: float) -> dict[str, dict[str, str]]:
        """Waits until all of the jobs have ended; job → its state."""
        end = time.monotonic() + seconds
        while True:
            states = {job: self.state(job) for job in jobs}
            open_jobs = [job for job, state in states.items() if state["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED")]
            if not open_jobs:
                return states
            assert time.monotonic() < end, f"after {seconds} s these have not ended: { {job: states[job]['JobState'] for job in open_jobs} }"
            time.sleep(0.5)


def _configuration(folder: Path, host: str) -> str:
    controller, node = _free_ports(2)
    return f"""\
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=500000
MpiDefault=none
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} CPUs={CPUS} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Starts a cluster and stops it.

    Args:
      folder: short (a socket lies in it), empty, and below folders that everyone may enter, as munged demands.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, f"{', '.join(missing)} missing: apt-get install slurm-wlm munge (.ci/run does)"
    assert os.geteuid() == 0, "SLURM's daemons are started as root"
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    munge = {f"--{name}": folder / "munge" / name for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")} | {"--key-file": key}
    (folder / "slurm.conf").write_text(_configuration(folder, socket.gethostname().partition(".")[0]))
    cluster = Cluster(folder)
    daemons = [
        ["munged", "--foreground", *(f"{name}={path}" for name, path in munge.items())],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf")],
    ]
    running: list[subprocess.Popen] = []
    try:
        for command in daemons:
            with open(folder / f"{command[0]}.out", "wb") as out:
                running.append(subprocess.Popen(command, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
            if command[0] == "munged":
                _until(lambda: (folder / "munge" / "socket").exists(), "munged has no socket", folder)
        _until(lambda: cluster.run("sinfo", "--noheader", "--format=%t").stdout.strip() == "idle", "the node is not idle", folder)
        yield cluster
    finally:
        if (folder / "slurm.conf").exists() and len(running) == len(daemons):
            cluster.run("scancel", "--user=root", "--signal=KILL")
            time.sleep(1)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(true, otherwise: str, folder: Path) -> None:
    end = time.monotonic() + 60
    while not true():
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.out")))
        assert time.monotonic() < end, f"{otherwise}:\n{logs}"
        time.sleep(0.2)
