"""From a command to its first training step, with compiled programs kept from before and without; and how long --help takes.

Command: python benchmarks/start_up.py

The command is `plasticity pretrain` with configs/default.py on one device, with its corpus and its step-0 parameters prepared. It is over when the first
row of the run's metrics.jsonl is there; then the process is killed and its run deleted.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import ROOT, finish

from plasticity_jax.config import grid_members, load_config

HELPS, WARM, COLD = 9, 3, 2
PROGRAM = [sys.executable, "-m", "plasticity_jax"]
SETTINGS = ["--config.data.sources=('wikipedia','bbc')", "--config.data.max_documents=400"]  # a corpus that is prepared in seconds
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
}


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(workdir: Path, cache: Path, member: str) -> float:
    """Seconds until the first step is logged."""
    command = [*PROGRAM, "pretrain", "--config", "configs/default.py", "--workdir", str(workdir), "--member", member, *SETTINGS]
    start = time.perf_counter()
    with subprocess.Popen([*command, f"--config.launch.compile_cache={cache}"], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE) as process:
        while not (found := [log for log in workdir.glob("default/pretrain/*/metrics.jsonl") if log.stat().st_size]):
            if process.poll() is not None:
                assert process.stderr is not None
                raise SystemExit(process.stderr.read().decode())
            time.sleep(0.02)
        taken = time.perf_counter() - start
        process.kill()
    shutil.rmtree(found[0].parent)
    return taken


def main() -> None:
    member = grid_members(load_config("configs/default.py"))[0].base
    helps, bare, jaxes = [], [], []
    for _ in range(HELPS):
        helps.append(seconds_of([*PROGRAM, "--help"]))
        bare.append(seconds_of([sys.executable, "-c", "pass"]))
    for _ in range(WARM):
        jaxes.append(seconds_of([sys.executable, "-c", "import jax; jax.devices()"]))
    with tempfile.TemporaryDirectory() as folder:
        workdir, cache = Path(folder) / "work", Path(folder) / "compiled"
        first_step(workdir, cache, member)  # prepares the corpus and the step-0 parameters, and fills the cache
        warm = [first_step(workdir, cache, member) for _ in range(WARM)]
        cold = [first_step(workdir, Path(folder) / f"empty-{i}", member) for i in range(COLD)]
    cases = {
        "plasticity --help": (helps, "under 0.2"),
        "python -c pass, for comparison": (bare, None),
        "import jax and its devices, for comparison": (jaxes, None),
        "command to first step, programs compiled before": (warm, "under 8"),
        "command to first step, nothing compiled": (cold, "under 20"),
    }
    rows = [
        {"what": what, "seconds": statistics.median(taken), "least": min(taken), "most": max(taken), "rounds": len(taken), "wanted": wanted}
        for what, (taken, wanted) in cases.items()
    ]
    finish("Start-up", {"The command line": rows})


if __name__ == "__main__":
    main()
