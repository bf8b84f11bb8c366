"""The directory of a run: its files, its states, and who works on it."""

import contextlib
import logging
import time
import traceback
from collections.abc import Iterator
from typing import Any

from plasticity_jax.config import StudyConfig, restore_config, to_dict
from plasticity_jax.errors import StudyRefused, UserError, reason
from plasticity_jax.progress import Progress
from plasticity_jax.runs.integrity import Checksums, checksums, differences
from plasticity_jax.runs.jsonfiles import damaged, read_json, to_json, write_json
from plasticity_jax.runs.locks import is_locked, lock
from plasticity_jax.runs.provenance import new_provenance
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, location, make_folder, remove_partial, replacing

log = logging.getLogger("plasticity_jax")

STUDY = "study.json"  # of a study's folder

# Of every run.
CONFIG, PROVENANCE, RESULTS, DONE = "config.json", "provenance.json", "results.json", "DONE"
FAILED, ERROR_LOG, LOCK = "FAILED", "error.log", "LOCK"
PROGRESS = "progress.json"  # how far a run in progress is; gone once it has ended
CHANGING = (DONE, FAILED, ERROR_LOG, LOCK, PROGRESS)  # what no checksum is taken of
ASKED = "asked.json"  # of a run that a command was asked for by itself, and no graph: the model that it was given
WARNINGS = "warnings.json"  # of a run in which something was passed over
# Of runs that train.
CHECKPOINTS = "checkpoints"
# Of evaluate and reward runs.
PROBLEMS, COMPLETIONS, OPTIONS, REWARDS = "problems.jsonl", "completions.jsonl", "options.jsonl", "rewards.jsonl"


class RunDirectory:
    """The directory of one run. `DONE` is written last, with checksums of all other files; a run without it is not read by any other."""

    def __init__(self, path: AnyPath):
        self.path = path
        self.provenance: dict[str, Any] = {}

    @property
    def done(self) -> bool:
        return (self.path / DONE).is_file()

    @property
    def is_record(self) -> bool:
        """Whether a finished run was unpacked from records, and so is here without its checkpoints and data."""
        return self.done and self._done()["record"]

    def state(self) -> tuple[str, str]:
        """(state, reason): done, diverged, damaged, running, failed or missing. Damaged is here only that DONE cannot be read."""
        if self.done:
            try:
                diverged = self._done()["diverged"]
            except UserError as error:
                return "damaged", str(error)
            return ("diverged", diverged) if diverged else ("done", "")
        if is_locked(self.path / LOCK):
            return "running", ""
        if (self.path / FAILED).is_file():
            return "failed", str(read_json(self.path / FAILED).get("reason"))
        return "missing", "interrupted; it resumes when run again" if self.path.is_dir() else ""

    def damage(self, *, whole: bool = False) -> str | None:
        """What is wrong with the files of a finished run, and the way out; None if nothing is.

        Args:
          whole: read the arrays of checkpoints and the token records too, which are otherwise judged by their size.
        """
        try:
            found = differences(self.path, self._done()["files"], whole=whole)
        except UserError as error:
            return str(error)
        if not found:
            return None
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f"{self.path}: {found[0]} since the run finished{more}; put the file back, or delete {self.path} and run again, which makes it anew."

    def check_whole(self) -> None:
        """Raises UserError if a file of the finished run has changed since."""
        if damage := self.damage():
            raise UserError(damage)

    def recorded(self) -> Checksums:
        """The checksums of a finished run's files; none where it was finished before there were any. Raises UserError if they cannot be read."""
        return self._done()["files"]

    def _done(self) -> dict[str, Any]:
        """What DONE holds: why the run diverged or "", the checksums (none in those that were written before there were any), and whether it is a record."""
        path = self.path / DONE
        with damaged(path):
            found = read_json(path)
            diverged, files = found["diverged"], {name: (int(size), str(digest)) for name, (size, digest) in found.get("files", {}).items()}
            if not isinstance(diverged, str):
                raise TypeError(f"diverged is {type(diverged).__name__}")
        return {"diverged": diverged, "files": files, "record": found.get("record") is True}

    @contextlib.contextmanager
    def work(self, run: Run, config: StudyConfig) -> Iterator["RunDirectory"]:
        """Holds the run's lock while its stage works; records a failure, and leaves nothing that looks finished.

        Raises:
          StudyRefused: another process works on this run, or has finished it meanwhile.
        """
        make_folder(self.path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.path / LOCK))
            if self.done:
                raise StudyRefused(f"{self.path} has been finished by another process meanwhile; run again to go on from there.")
            for left_behind in (FAILED, PROGRESS):
                (self.path / left_behind).unlink(missing_ok=True)
            remove_partial(self.path)
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
            finally:
                with contextlib.suppress(OSError):
                    (self.path / PROGRESS).unlink(missing_ok=True)

    def earlier_environments(self) -> list[dict[str, Any]]:
        """Where earlier attempts at this run were made, as its provenance says; none if it cannot be read."""
        with contextlib.suppress(UserError, OSError):
            found = read_json(self.path / PROVENANCE).get("environments")
            return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        return []

    def write_provenance(self, **more: Any) -> None:
        write_json(self.path / PROVENANCE, self.provenance | more)

    def finish(self, results: dict[str, Any]) -> None:
        """Writes results and provenance, then DONE with the checksums. `results["diverged"]`, a reason, marks a diverged run."""
        write_json(self.path / RESULTS, results)
        self.write_provenance(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        for passing in (ERROR_LOG, PROGRESS):
            (self.path / passing).unlink(missing_ok=True)
        files: Checksums = checksums(self.path, without=CHANGING)
        write_json(self.path / DONE, {"diverged": results.get("diverged") or "", "files": files})

    def write_progress(self, progress: Progress) -> None:
        """Says how far the run is, for `progress`. Nothing rests on it: it is not forced onto the disk, and what keeps it from being written is passed over."""
        said = {name: getattr(progress, name) for name in ("what", "done", "total", "unit", "note")}
        text = to_json(said | {"seconds_left": progress.seconds_left(), "time": time.time()})
        with contextlib.suppress(Exception), replacing(self.path / PROGRESS, durable=False) as file:  # of a store's driver too
            file.write(text.encode())

    def progress(self) -> dict[str, Any] | None:
        """How far the run in progress said last that it is, as `write_progress` wrote it; None where it has said nothing that can be read."""
        with contextlib.suppress(UserError, OSError):
            return read_json(self.path / PROGRESS)
        return None

    def run(self) -> Run:
        with damaged(self.path / CONFIG):
            return Run.from_dict(self._config_json()["run"])

    def config(self) -> StudyConfig:
        with damaged(self.path / CONFIG):
            return restore_config(self._config_json()["config"])

    def results(self) -> dict[str, Any]:
        return read_json(self.path / RESULTS)

    def _config_json(self) -> dict[str, Any]:
        return read_json(self.path / CONFIG)


def warnings_of(path: AnyPath) -> list[str]:
    """What was passed over while a run was made, oldest first."""
    return [str(text) for text in read_json(path / WARNINGS).get("warnings", [])] if (path / WARNINGS).is_file() else []


def add_warning(path: AnyPath, text: str) -> None:
    """Logs a warning and keeps it with the run, for its page."""
    log.warning("%s: %s", path.name, text)
    write_json(path / WARNINGS, {"warnings": [*warnings_of(path), text]})


def open_run(path: str | AnyPath) -> RunDirectory:
    """Opens a finished run's directory for reading. Raises UserError if it is none, or if a file has changed since (see `differences`)."""
    path = location(path)
    directory = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the directory of a finished run (plasticity status lists them).")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} holds no config.json, so it is not a run directory; give one that plasticity status lists as done.")
    if not directory.done:
        raise UserError(f"{path} is not finished (no DONE in it); run its stage to the end first.")
    directory.check_whole()
    return directory
