"""The graph of a study: every run, its parents and its hash, as the stages plan them; and how it lies on disk. Pure, and without jax."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plasticity_jax.config import StudyConfig, grid_members, member_config, to_dict
from plasticity_jax.errors import StudyRefused, UserError
from plasticity_jax.runs.directory import ASKED, CONFIG, LOCK, STUDY, RunDirectory
from plasticity_jax.runs.jsonfiles import damaged, read_json, write_json
from plasticity_jax.runs.locks import is_locked
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, make_folder
from plasticity_jax.stages import Plan, stages
from plasticity_jax.stages.evaluate import is_regraded
from plasticity_jax.stages.stage import IMPORTED

log = logging.getLogger("plasticity_jax")


def build_graph(config: StudyConfig) -> list[Run]:
    """Every run of the study, parents before children, stage by stage."""
    return Plan(config, stages().values()).runs


def run_configs(config: StudyConfig, runs: Sequence[Run]) -> dict[str, StudyConfig]:
    """Id → the config to carry a run out with: that of its member, or of the first that needs it; the study's own for what belongs to no member."""
    planned = Plan(config, stages().values()).configs
    grid = [(member_config(config, member), member) for member in grid_members(config)]
    members = {member.base: own for own, member in reversed(grid)} | {member.name: own for own, member in grid}
    return {run.id: planned.get(run.id) or members.get(run.member or "", config) for run in runs}


def finished_runs(runs: Sequence[Run], path_of: Callable[[str], AnyPath]) -> set[str]:
    """Ids of the finished runs, without records that another run, which is not among them, descends from."""
    there = {run.id for run in runs if RunDirectory(path_of(run.id)).done}
    return there - records_needed(runs, there, path_of)


def records_needed(runs: Sequence[Run], finished: set[str], path_of: Callable[[str], AnyPath]) -> set[str]:
    """Those of the finished runs that are here as records only, and that a run which is not finished descends from."""
    is_record = functools.cache(lambda run_id: RunDirectory(path_of(run_id)).is_record)
    needed: set[str] = set()
    for run in reversed(runs):
        if run.id not in finished or run.id in needed:
            needed |= {parent for parent in run.parents.values() if parent in finished and is_record(parent)}
    return needed


# ---------------------------------------------------------------------------------------------------------------------- study on disk


def study_dir(workdir: AnyPath, config: StudyConfig) -> AnyPath:
    return workdir / config.name


def save_study(workdir: AnyPath, config: StudyConfig, runs: list[Run]) -> None:
    """Writes study.json: the config with what `auto` came to, and every run with its parents and hash.

    Raises:
      StudyRefused: a process works on a run of the study that this config does not have, so it would report another study than it carries out.
    """
    folder = study_dir(workdir, config)
    make_folder(folder)
    resolved = {"compute_dtype": config.train.compute_dtype}
    found = {"study": config.name, "config": to_dict(config), "resolved": resolved, "runs": [run.to_dict() for run in runs]}
    if (folder / STUDY).is_file():
        ours = {run.id for run in runs}
        for run in read_study(folder / STUDY)[1]:
            if run.id not in ours and is_locked(folder / run.id / LOCK):
                raise StudyRefused(f"{folder} is being worked on with another config ({run.id}); wait for it, or give this study another name.")
    write_json(folder / STUDY, found)


def study_files(workdir: AnyPath) -> list[AnyPath]:
    """The study.json files below a workdir. Raises UserError if there is none."""
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; give the one that plasticity study wrote to.")
    found = sorted(workdir.glob(f"*/{STUDY}"))
    if not found:
        raise UserError(f"--workdir={workdir} holds no study (no <study>/study.json); run plasticity study first.")
    return found


@dataclass(frozen=True)
class Beside:
    """A run in a study's folder that is not in its study.json.

    Attributes:
      run, directory: of it.
      stale: why it is of no use any more; "" for what a command was asked for by itself, and for completions that were graded again.
    """

    run: Run
    directory: RunDirectory
    stale: str


def runs_beside(path: AnyPath) -> list[Beside]:
    """The runs in the folder of a study.json that it does not list; without those whose config.json cannot be read, of which a warning tells."""
    tree, runs = read_study(path)
    folder, listed = path.parent, {run.id for run in runs}
    with damaged(path):
        imports = not tree.get("config", {}).get("grid", {}).get("models")  # whose imports are in the graph; elsewhere they were asked for
    others: dict[str, tuple[Run, RunDirectory]] = {}
    for file in sorted(folder.glob(f"*/*/{CONFIG}")):
        run_id, directory = f"{file.parent.parent.name}/{file.parent.name}", RunDirectory(file.parent)
        if run_id not in listed:
            try:
                others[run_id] = directory.run(), directory
            except UserError as error:
                log.warning("%s", error)

    def alone(run_id: str) -> bool:
        run, directory = others[run_id]
        return (directory.path / ASKED).is_file() or is_regraded(run) or (imports and of_import(run_id))

    def of_import(run_id: str) -> bool:
        run, _ = others[run_id]
        return run.stage == IMPORTED or any(parent in others and of_import(parent) for parent in run.parents.values())

    def stale(run_id: str) -> str:
        if not alone(run_id):
            return "not in study.json: its config, code version or a parent has changed"
        gone = [parent for parent in others[run_id][0].parents.values() if parent in others and stale(parent)]
        return f"its parent {gone[0]} is not in study.json any more" if gone else ""

    return [Beside(run, directory, stale(run_id)) for run_id, (run, directory) in others.items()]


def read_study(path: AnyPath) -> tuple[dict, list[Run]]:
    """The contents of a study.json and its runs."""
    tree = read_json(path)
    try:
        return tree, [Run.from_dict(row) for row in tree["runs"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a study of this version ({error!r} is missing); run plasticity study again.") from error
