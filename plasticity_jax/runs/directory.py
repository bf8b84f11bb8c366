"""The directory of a run: its files, its states, and who works on it."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import Any

from plasticity_jax.config import StudyConfig, restore_config, to_dict
from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.runs.locks import is_locked, lock
from plasticity_jax.runs.provenance import new_provenance
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, location, make_folder

STUDY = "study.json"  # of a study's folder

# Of every run.
CONFIG, PROVENANCE, RESULTS, DONE = "config.json", "provenance.json", "results.json", "DONE"
FAILED, ERROR_LOG, LOCK = "FAILED", "error.log", "LOCK"
# Of runs that train.
CHECKPOINTS = "checkpoints"
# Of evaluate and reward runs.
PROBLEMS, COMPLETIONS, OPTIONS, REWARDS = "problems.jsonl", "completions.jsonl", "options.jsonl", "rewards.jsonl"


class RunDirectory:
    """The directory of one run. `DONE` is written last; a run without it is not read by any other."""

    def __init__(self, path: AnyPath):
        self.path = path
        self.provenance: dict[str, Any] = {}

    @property
    def done(self) -> bool:
        return (self.path / DONE).is_file()

    def state(self) -> tuple[str, str]:
        """(state, reason): done, diverged, running, failed or missing."""
        if self.done:
            diverged = read_json(self.path / DONE).get("diverged")
            return ("diverged", diverged) if diverged else ("done", "")
        if is_locked(self.path / LOCK):
            return "running", ""
        if (self.path / FAILED).is_file():
            return "failed", read_json(self.path / FAILED)["reason"]
        return "missing", "interrupted; it resumes when run again" if self.path.is_dir() else ""

    @contextlib.contextmanager
    def work(self, run: Run, config: StudyConfig) -> Iterator["RunDirectory"]:
        """Holds the run's lock while its stage works; records a failure, and leaves nothing that looks finished.

        Raises:
          StudyRefused: another process works on this run.
        """
        make_folder(self.path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.path / LOCK))
            (self.path / FAILED).unlink(missing_ok=True)
            write_json(self.path / CONFIG, {"run": run.to_dict(), "config": to_dict(config)})
            self.provenance = new_provenance(run, config)
            try:
                yield self
            except Exception as error:
                with contextlib.suppress(OSError):
                    said = " ".join(str(error).split()) if isinstance(error, UserError) else f"{type(error).__name__}: {reason(error)}"
                    write_json(self.path / FAILED, {"reason": said})
                    (self.path / ERROR_LOG).write_text(traceback.format_exc(), encoding="utf-8")
                raise

    def finish(self, results: dict[str, Any]) -> None:
        """Writes results and provenance, then DONE. `results["diverged"]`, a reason, marks a diverged run."""
        write_json(self.path / RESULTS, results)
        write_json(self.path / PROVENANCE, self.provenance | {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        (self.path / ERROR_LOG).unlink(missing_ok=True)
        write_json(self.path / DONE, {"diverged": results.get("diverged") or ""})

    def run(self) -> Run:
        return Run.from_dict(self._config_json()["run"])

    def config(self) -> StudyConfig:
        return restore_config(self._config_json()["config"])

    def results(self) -> dict[str, Any]:
        return read_json(self.path / RESULTS)

    def _config_json(self) -> dict[str, Any]:
        return read_json(self.path / CONFIG)


def open_run(path: str | AnyPath) -> RunDirectory:
    """Opens a finished run's directory for reading. Raises UserError if it is none."""
    path = location(path)
    directory = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the directory of a finished run (plasticity status lists them).")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} holds no config.json, so it is not a run directory; give one that plasticity status lists as done.")
    if not directory.done:
        raise UserError(f"{path} is not finished (no DONE in it); run its stage to the end first.")
    return directory
