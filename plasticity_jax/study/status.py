"""The state of every run of the studies in a workdir."""

import time
from collections.abc import Sequence
from typing import Any

from plasticity_jax.config import StudyConfig, restore_config
from plasticity_jax.progress import duration
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.jsonfiles import damaged
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages.prepare import edited_since
from plasticity_jax.study.graph import read_study, runs_beside, study_files

OLD_SECONDS = 180  # after which `how_far` says when a run said how far it is: it compiles, waits, or is paused


def study_status(workdir: AnyPath, *, verify: bool = False) -> list[dict[str, Any]]:
    """One row per run of every study below the workdir, of what a command was asked for by itself, of completions graded again, and of what no study lists
    any more (stale).

    Args:
      verify: read every file of the finished runs; those that are no longer what their run wrote are "damaged".
    """

    def state_of(directory: RunDirectory) -> tuple[str, str]:
        damage = directory.damage(whole=True) if verify and directory.done else None
        if damage:
            return "damaged", damage
        state, reason = directory.state()
        return state, how_far(directory) if state == "running" else reason

    rows = []
    for path in study_files(workdir):
        tree, runs = read_study(path)
        with damaged(path):
            edited = _edited(restore_config(tree.get("config", {})), runs, path.parent)
        for run in runs:
            state, reason = state_of(RunDirectory(path.parent / run.id))
            if state == "done" and run.id in edited:
                state, reason = "stale", edited[run.id]
            rows.append(_row(run, state, reason, path.parent / run.id))
        for other in runs_beside(path):
            state, reason = ("stale", other.stale) if other.stale else state_of(other.directory)
            rows.append(_row(other.run, state, reason, other.directory.path))
    return rows


def how_far(directory: RunDirectory) -> str:
    """How far a run in progress is, and the time that what it shows leaves, without compilation; "" for one that has said nothing yet."""
    said = directory.progress()
    try:
        return "" if said is None else _in_words(said, time.time())
    except (ArithmeticError, LookupError, TypeError, ValueError):  # not a record of ours
        return ""


def _in_words(said: dict[str, Any], now: float) -> str:
    done, total, unit = int(said["done"]), said["total"], str(said["unit"])
    share = f"{done:,} {unit}" if total is None else f"{done:,} of {int(total):,} {unit} ({done / max(int(total), 1):.0%})"
    left = "" if said["seconds_left"] is None else f"{duration(float(said['seconds_left']))} left"
    age = now - float(said["time"])
    text = ", ".join(filter(None, (f"{said['what']}: {share}", str(said["note"]), left, f"{duration(age)} ago" if age > OLD_SECONDS else "")))
    return text.splitlines()[0]


def _edited(config: StudyConfig, runs: Sequence[Run], folder: AnyPath) -> dict[str, str]:
    """Id → reason of the finished runs that rest on a file that was edited since; a study that is started again makes others in their place."""
    reasons: dict[str, str] = {}
    for run in runs:  # parents before children
        done = folder / run.id / DONE
        why = next((reasons[parent] for parent in run.parents.values() if parent in reasons), None)
        if why is None and run.stage == "prepare" and done.is_file():
            why = edited_since(config, run, done.stat().st_mtime)
        if why is not None:
            reasons[run.id] = why
    return reasons


def _row(run: Run, state: str, reason: str, path: AnyPath) -> dict[str, Any]:
    about = {"study": run.study, "stage": run.stage, "member": run.member, "task": run.task, "seed": run.seed}
    return {"id": run.id, **about, "state": state, "reason": reason, "path": str(path)}


def status_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of `study_status` for a terminal: a summary per study, then a line per run."""
    lines, width = [], max(len(row["id"]) for row in rows)
    for study in dict.fromkeys(row["study"] for row in rows):
        mine = [row for row in rows if row["study"] == study]
        counts = {state: sum(row["state"] == state for row in mine) for state in dict.fromkeys(row["state"] for row in mine)}
        lines.append(f"{study}: {len(mine)} runs, " + ", ".join(f"{n} {state}" for state, n in counts.items()))
        lines += [f"  {row['id']:<{width}}  {row['state']:<8}  {row['reason']}".rstrip() for row in mine]
    return lines
