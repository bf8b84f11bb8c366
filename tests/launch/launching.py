"""How tests start launchers, and stand-ins for the programs that these call."""

import os
import subprocess
import sys
from pathlib import Path

from plasticity_jax.config import StudyConfig, load_config
from plasticity_jax.study.graph import build_graph, save_study

TOP = Path(__file__).parents[2]
LAUNCH = TOP / "launch"
TINY = TOP / "configs" / "tiny.py"


def run(script, *arguments, path: str | None = None, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    script = LAUNCH / script
    command = [sys.executable, script] if script.suffix == ".py" else [script]
    known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TPU", "PLASTICITY"))}
    if path is not None:
        known["PATH"] = path
    return subprocess.run([*map(str, command), *map(str, arguments)], env=known | environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def stand_in(folder: Path, name: str, body: str) -> str:
    """Puts a program of this name before all others; returns the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def saved_study(workdir: Path) -> StudyConfig:
    """Writes the study.json of configs/tiny.py in float32, as prepare would; returns its config."""
    config = load_config(TINY, [("train.compute_dtype", "float32")])
    save_study(workdir, config, build_graph(config))
    return config


def write_jobs(workdir: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    given = ["--config", TINY, "--config.train.compute_dtype=float32", "--workdir", workdir, "--out", out]
    return run("slurm/study.py", *given, *more)
