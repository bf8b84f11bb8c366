"""What stages exchange: runs, their directories, and strict JSON. No stage knows more of another than what is written here."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plasticity_jax.config import StudyConfig, execution_fields, restore_config, to_dict
from plasticity_jax.errors import UserError
from plasticity_jax.runs.append_log import AppendLog
from plasticity_jax.runs.locks import Held, is_locked, lock
from plasticity_jax.runs.storage import AnyPath, is_local, location, make_folder, replacing, upload, write_bytes

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "array-record",
    "tokenizers",
    "sentencepiece",
    "numpy",
)


# --------------------------------------------------------------------------------------------------------------------------------- JSON


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: non-finite numbers become the strings "inf", "-inf", "nan"; NumPy scalars and arrays become plain values."""
    return json.dumps(_strict(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, AnyPath):
        return str(value)
    return value


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one, never a part."""
    write_bytes(path, (to_json(value, indent=1) + "\n").encode())


def read_json(path: AnyPath) -> Any:
    """Reads JSON; `float(x)` turns the strings "inf", "-inf" and "nan" back into numbers. Raises UserError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run again.") from error


def write_jsonl(path: AnyPath, rows: Iterator[dict] | list[dict]) -> None:
    """Writes one JSON object per line, atomically."""
    with replacing(path) as file:
        file.writelines((to_json(row) + "\n").encode() for row in rows)


def read_jsonl(path: AnyPath) -> list[dict]:
    """Reads one JSON object per line; a half-written last line (after a kill) is left out."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run: one row of numbers per logged step. On a store both are brought there by `close_part`.

    Args:
      directory: the run's directory.
      step: rows after this step are dropped first, so that a resumed run repeats none.
    """

    def __init__(self, directory: AnyPath, *, step: int):
        from tensorboardX import SummaryWriter

        self._rows = AppendLog(directory / METRICS, keep=lambda row: row["step"] <= step)
        self._events_folder = directory / "tensorboard"
        self._temporary = None if is_local(directory) else tempfile.TemporaryDirectory(prefix="plasticity-events-")
        self._events = SummaryWriter(self._temporary.name if self._temporary else str(self._events_folder), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Appends `values`; nested dicts become TensorBoard tags joined by slashes."""
        self._rows.append(to_json({"step": step, **values}))
        for tag, value in _flatten(values):
            if isinstance(value, (int, float)) and math.isfinite(value):  # tensorboardX prints a warning for every other
                self._events.add_scalar(tag, value, step)

    def close_part(self) -> None:
        """Makes what was written outlive this process, also on a store; due before a checkpoint that a later process goes on from."""
        self._rows.close_part()
        if self._temporary is not None:
            self._events.flush()
            upload(Path(self._temporary.name), self._events_folder)

    def close(self) -> None:
        self._events.close()
        self._rows.close()
        if self._temporary is not None:
            upload(Path(self._temporary.name), self._events_folder)
            self._temporary.cleanup()


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


# --------------------------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One node of a study's graph.

    Attributes:
      study: the study's name.
      stage: name of its stage, or "import" for a model from elsewhere, which belongs to no graph.
      name: readable name, unique within the stage together with the hash.
      fields: what defines the result, besides the parents.
      parents: role (such as "base", "task") → id of the run that plays it.
      member, task, seed: what the run is about; None where it does not apply.
      version: of the stage's code.
    """

    study: str
    stage: str
    name: str
    fields: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    member: str | None = None
    task: str | None = None
    seed: int | None = None
    version: int = 1

    @property
    def hash(self) -> str:
        """First eight hex digits of the sha256 over stage, version, fields and the parents' hashes."""
        parents = {role: parent.rsplit("-", 1)[1] for role, parent in sorted(self.parents.items())}
        text = json.dumps([self.stage, self.version, _strict(self.fields), parents], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def id(self) -> str:
        """`<stage>/<name>-<hash8>`, which is also the run's path below the study's folder."""
        return f"{self.stage}/{self.name}-{self.hash}"

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Run":
        return cls(**{f.name: tree[f.name] for f in dataclasses.fields(cls) if f.name in tree or f.default is dataclasses.MISSING})


class RunDirectory:
    """The directory of one run. `DONE` is written last; a run without it is not read by any other."""

    def __init__(self, path: AnyPath):
        self.path = path
        self.provenance: dict[str, Any] = {}
        self._held: Held | None = None

    @property
    def done(self) -> bool:
        return (self.path / "DONE").is_file()

    def state(self) -> tuple[str, str]:
        """(state, reason): done, diverged, running, failed or missing."""
        if self.done:
            diverged = read_json(self.path / "DONE").get("diverged")
            return ("diverged", diverged) if diverged else ("done", "")
        if is_locked(self.path / "LOCK"):
            return "running", ""
        if (self.path / "FAILED").is_file():
            return "failed", read_json(self.path / "FAILED")["reason"]
        return "missing", "interrupted; it resumes when run again" if self.path.is_dir() else ""

    @contextlib.contextmanager
    def work(self, run: Run, config: StudyConfig) -> Iterator["RunDirectory"]:
        """Holds the run's lock while its stage works; records a failure, and leaves nothing that looks finished.

        Raises:
          UserError: another process works on this run.
        """
        make_folder(self.path)
        with contextlib.ExitStack() as stack:
            try:
                self._held = stack.enter_context(lock(self.path / "LOCK"))
            except BlockingIOError as error:
                raise UserError(f"{self.path} is being worked on by another process; wait for it or stop it.") from error
            (self.path / "FAILED").unlink(missing_ok=True)
            write_json(self.path / "config.json", {"run": run.to_dict(), "config": to_dict(config)})
            self.provenance = _provenance(run, config)
            try:
                yield self
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                with contextlib.suppress(OSError):
                    write_json(self.path / "FAILED", {"reason": f"{type(error).__name__}: {reason}"[:500]})
                    (self.path / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
                raise

    def finish(self, results: dict[str, Any]) -> None:
        """Writes results and provenance, then DONE. `results["diverged"]`, a reason, marks a diverged run.

        Raises:
          UserError: another process has taken the run over meanwhile, which can happen on a store alone.
        """
        if self._held is not None:
            self._held.check()
        write_json(self.path / "results.json", results)
        write_json(self.path / "provenance.json", self.provenance | {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        (self.path / "error.log").unlink(missing_ok=True)
        write_json(self.path / "DONE", {"diverged": results.get("diverged") or ""})

    def run(self) -> Run:
        return Run.from_dict(self._config_json()["run"])

    def config(self) -> StudyConfig:
        return restore_config(self._config_json()["config"])

    def results(self) -> dict[str, Any]:
        return read_json(self.path / "results.json")

    def _config_json(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")


def open_run(path: str | AnyPath) -> RunDirectory:
    """Opens a finished run's directory for reading. Raises UserError if it is none."""
    path = location(path)
    directory = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the directory of a finished run (plasticity status lists them).")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json, so it is no run directory; give one that plasticity status lists as done.")
    if not directory.done:
        raise UserError(f"{path} is not finished (no DONE in it); run its stage to the end first.")
    return directory


def _provenance(run: Run, config: StudyConfig) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "parents": run.parents,
        "execution": execution_fields(config),
        "versions": versions,
        "git": _git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_state() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; empty for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", str(here)))}
    except (OSError, subprocess.SubprocessError):
        return {}
