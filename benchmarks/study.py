"""The whole default study, prepared wheels to report, by stage: in one process with all cores, and in worker processes of one thread each.

Command: python benchmarks/study.py [--config configs/default.py] [--rounds 1]

Every round begins with an empty folder and nothing compiled. A stage has the time between the end of one run and that of the next, counted for the
later one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from side_by_side import ROOT, finish

from plasticity_jax.runs.directory import DONE

SIDES = {"one process": 1, "worker processes": 0}


def seconds_by_stage(config: str, parallel_runs: int) -> Counter[str]:
    with tempfile.TemporaryDirectory() as folder:
        workdir, cache = Path(folder) / "work", Path(folder) / "compiled"
        command = [sys.executable, "-m", "plasticity_jax", "study", "--config", config, "--workdir", str(workdir)]
        command += [f"--config.launch.parallel_runs={parallel_runs}", f"--config.launch.compile_cache={cache}"]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        began = time.time()
        subprocess.run(command, check=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
        ended = time.time()
        done = sorted((path.stat().st_mtime, path.parents[1].name) for path in workdir.glob(f"*/*/*/{DONE}"))
    found: Counter[str] = Counter()
    before = began
    for moment, stage in done:
        found[stage] += moment - before
        before = moment
    return found + Counter({"report": ended - before, "whole": ended - began})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/default.py")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    taken = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, parallel_runs in SIDES.items():
            taken[side].append(seconds_by_stage(arguments.config, parallel_runs))
            print(f"{side}: {taken[side][-1]['whole']:.0f} s", file=sys.stderr, flush=True)
    medians = {side: {stage: statistics.median(one[stage] for one in rounds) for stage in rounds[0]} for side, rounds in taken.items()}
    one, other = (medians[side] for side in SIDES)
    rows = [
        {"stage": stage, **{side: medians[side][stage] for side in SIDES}, "times as fast": one[stage] / other[stage], "rounds": arguments.rounds}
        for stage in one
    ]
    finish("The whole study", {f"Seconds of {arguments.config} by stage": rows})


if __name__ == "__main__":
    main()
