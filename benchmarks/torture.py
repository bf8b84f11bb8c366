"""Torture: kills the tiny study with SIGKILL in the middle of its runs, starts it again, and compares all that it wrote with a study that nothing happened to.

Command: python benchmarks/torture.py --kills 20 --mode sequential | vmapped | two-process

The runs to be killed in are drawn at random from those of all stages, and the moments from the time that each of them took. Of two processes one is killed,
or both. Compared are the parameters, the results, the completions, the logs and the tables of the page, all bit for bit, but for times.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from side_by_side import RESULTS, ROOT, finish

from plasticity_jax.config import load_config
from plasticity_jax.model.load import MODEL_STAGES, load_model
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.integrity import checksums
from plasticity_jax.runs.run import Run
from plasticity_jax.study.graph import build_graph

CONFIG = "configs/tiny.py"
OVERRIDES = {
    "sequential": {"train.compute_dtype": "float32", "grid.mode": "sequential"},
    "vmapped": {"train.compute_dtype": "float32", "grid.mode": "vmapped"},
    "two-process": {"train.compute_dtype": "float32", "grid.mode": "sequential"},
}
KILLS_PER_STUDY = 8
PATIENCE = 1800  # seconds that one attempt may take
TIMES = ("seconds", "per_second", "mfu")  # in the names of numbers that no two studies share


@dataclass
class Attempt:
    """Processes that carry out the study together."""

    processes: list[subprocess.Popen]

    @property
    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def kill(self, which: list[int]) -> None:
        for number in which:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[number].pid, signal.SIGKILL)  # with its worker
        for process in self.processes:
            process.wait(PATIENCE)

    def status(self) -> int:
        return max(abs(process.wait(PATIENCE)) for process in self.processes)


def start(mode: str, work: Path) -> Attempt:
    """The study, from where it is."""
    overrides = [f"--config.{name}={value}" for name, value in OVERRIDES[mode].items()]
    command = [sys.executable, "-m", "plasticity_jax", "study", "--config", CONFIG, "--workdir", str(work), *overrides]
    several = [[]]
    if mode == "two-process":
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
        several = [["--coordinator", address, "--num-processes", "2", "--process-id", str(number)] for number in (0, 1)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    log = open(work.with_suffix(".log"), "ab")
    with log:
        return Attempt(
            [subprocess.Popen([*command, *own], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True) for own in several]
        )


def kill_in(attempt: Attempt, folder: Path, seconds: float, which: list[int]) -> str:
    """Kills once this much time has passed since a run has begun, or at its end; says in which state it was."""
    while not (folder / "config.json").exists():
        if attempt.ended:
            return "ended"
        time.sleep(0.005)
    begun = time.monotonic()
    while time.monotonic() - begun < seconds and not (folder / "DONE").exists() and not attempt.ended:
        time.sleep(0.002)
    state = "done" if (folder / "DONE").exists() else "in progress"
    attempt.kill(which)
    return state


def durations(study: Path, runs: list[Run]) -> dict[str, float]:
    return {run.id: json.loads((study / run.id / "provenance.json").read_text())["seconds"] for run in runs}


def differences(one: Path, other: Path, runs: list[Run]) -> Iterator[str]:
    """What differs between two finished studies, but for times."""
    for run in runs:
        a, b = one / run.id, other / run.id
        if not RunDirectory(b).done:
            yield f"{run.id} is not done"
            continue
        if run.stage in MODEL_STAGES:
            leaves = [jax.tree.leaves(load_model(path).params) for path in (a, b)]
            if any(np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in zip(*leaves, strict=True)):
                yield f"parameters of {run.id}"
        if timeless(RunDirectory(a).results()) != timeless(RunDirectory(b).results()):
            yield f"results of {run.id}"
        files = [set(checksums(path, without=())) for path in (a, b)]
        text = {name for name in files[0] | files[1] if name.endswith((".jsonl", ".npy", "tokenizer.json", ".array_record"))}
        for name in sorted(text):
            if not all((path / name).is_file() for path in (a, b)):
                yield f"{run.id}/{name} is missing"
            elif Path(name).name == "metrics.jsonl":
                rows = [[timeless(json.loads(line)) for line in (path / name).read_text().splitlines()] for path in (a, b)]
                if rows[0] != rows[1]:
                    yield f"{run.id}/{name}"
            elif (a / name).read_bytes() != (b / name).read_bytes():
                yield f"{run.id}/{name}"
        leftovers = [name for name in files[1] if ".partial" in name or "orbax-checkpoint-tmp" in name or ".damaged" in name]
        if leftovers:
            yield f"{run.id} has {leftovers[0]} left over"
    for path in sorted((one / "report" / "tables").glob("*.csv")):
        if table(path) != table(other / "report" / "tables" / path.name):
            yield f"table {path.name}"


def timeless(tree):
    if isinstance(tree, dict):
        return {name: timeless(value) for name, value in tree.items() if not any(word in name for word in TIMES)}
    return [timeless(value) for value in tree] if isinstance(tree, list) else tree


def table(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return [timeless(dict(row)) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mode", choices=tuple(OVERRIDES), default="sequential")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    mode, chance = arguments.mode, random.Random(f"{arguments.mode} {arguments.seed}")
    runs = build_graph(load_config(CONFIG, list(OVERRIDES[mode].items())))
    rows, made, studies, wrong = [], 0, 0, []
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        whole = Path(place) / "whole"
        print(f"{mode}: the study that nothing happens to", file=sys.stderr)
        assert start(mode, whole).status() == 0, whole.with_suffix(".log").read_text()[-3000:]
        took = durations(whole / "tiny", runs)
        while made < arguments.kills:
            studies += 1
            work = Path(place) / f"killed{studies}"
            number = min(KILLS_PER_STUDY, arguments.kills - made)
            targets = sorted(chance.sample(range(len(runs)), min(number, len(runs))))
            for target in targets:
                run, attempt = runs[target], start(mode, work)
                which = [0] if mode != "two-process" else chance.choice(([0], [1], [0, 1]))
                seconds = chance.uniform(0, took[run.id])
                state = kill_in(attempt, work / "tiny" / run.id, seconds, which)
                if state == "ended":
                    continue
                made += 1
                rows.append({"kill": made, "study": studies, "stage": run.stage, "run": run.name, "after (s)": round(seconds, 2), "run was": state})
                print(f"{mode}: kill {made} of {arguments.kills}: {run.id}, {state}", file=sys.stderr)
            assert start(mode, work).status() == 0, work.with_suffix(".log").read_text()[-3000:]
            found = list(differences(whole / "tiny", work / "tiny", runs))
            print(f"{mode}: study {studies}: {found or 'the same bits'}", file=sys.stderr)
            wrong += found
    stages = sorted({row["stage"] for row in rows})
    summary = {"mode": mode, "kills": made, "in the middle of a run": sum(row["run was"] == "in progress" for row in rows)}
    summary |= {"studies": studies, "stages hit": f"{len(stages)} of {len({run.stage for run in runs})}", "differences": len(wrong)}
    path = RESULTS / "torture.json"
    before = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.is_file() else {}
    kept = [row for row in before.get("Kills", []) if row["mode"] != mode]
    finish(
        "Torture",
        {"Kills": sorted([*kept, summary], key=lambda row: list(OVERRIDES).index(row["mode"]))},
        command="python benchmarks/torture.py --kills N --mode MODE",
    )
    for row in rows:
        print(row, file=sys.stderr)
    if wrong:
        sys.exit(f"different: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
