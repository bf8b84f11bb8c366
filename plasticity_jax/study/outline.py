"""What a study will do, stage by stage, as one table: runs, tokens, model FLOPs, checkpoints, and hours where the peak of this machine's devices is known."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import Member, StudyConfig, for_device, grid_members, member_config
from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages import Ahead, Stage, stages
from plasticity_jax.stages.init import STAGE as INIT
from plasticity_jax.stages.stage import IMPORTED, PRETRAINED
from plasticity_jax.study.graph import finished_runs, run_configs, study_dir
from plasticity_jax.study.time_left import Declared, TimeLeft
from plasticity_jax.text import three_digits

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

    from plasticity_jax.parallel.hardware import Hardware

LONG_NAMES = 40  # characters from which two members are not named: sweeps of several fields have them in their names


@dataclass
class StageOutline:
    """The runs of a stage.

    Attributes:
      done: how many are done already. Everything else is about those that are not.
      work: id of a run → its declared work in model FLOPs; None where it is not known.
      tokens: that the networks read or write, padding included.
      checkpoints: bytes that the finished runs hold.
      hours: of this machine; None where they are not known.
      bounded: work, tokens and hours are upper bounds.
      problem: why the work is not known.
    """

    stage: str
    done: int = 0
    work: dict[str, float | None] = field(default_factory=dict)
    tokens: int = 0
    checkpoints: int = 0
    hours: float | None = None
    bounded: bool = False
    problem: str = ""

    @property
    def runs(self) -> int:
        """How many are to be carried out."""
        return len(self.work)

    @property
    def flops(self) -> float:
        return sum(work or 0.0 for work in self.work.values())


@dataclass(frozen=True)
class Machine:
    """What is known of the devices that the command sees.

    Attributes:
      kind: jax's name of the devices; "" where they are not looked at.
      devices: their number.
      part: the devices that one run gets.
      hardware: None where their peak is not known. It is never measured for an outline.
    """

    kind: str = ""
    devices: int = 1
    part: Sequence[Any] = ()
    hardware: "Hardware | None" = None


@dataclass(frozen=True)
class Outline:
    """What a study will do.

    Attributes:
      name: of the study.
      stages: those that have runs, in the order of the graph.
    """

    name: str
    stages: list[StageOutline]
    machine: Machine

    def time_left(self) -> TimeLeft:
        """The clock of the runs that are to be carried out."""
        known = stages()
        return TimeLeft(
            {run: Declared(found.stage, work, known[found.stage].devices == "all") for found in self.stages for run, work in found.work.items()}
        )


def outline(config: StudyConfig, workdir: AnyPath, runs: Sequence[Run]) -> Outline:
    """Looks at the runs of a study, and at the rows that are prepared.

    Args:
      config: with its compute dtype resolved, which the runs' hashes hold.
    """
    from plasticity_jax.study.hours import device_seconds, finder, parts_of  # here, because it imports jax, and worker processes import this

    known, folder = stages(), study_dir(workdir, config)
    done = finished_runs(runs, lambda run_id: folder / run_id)
    todo = [run for run in runs if run.id not in done]
    machine = _machine(config) if any(known[run.stage].work for run in todo) else Machine()
    configs = run_configs(for_device(config, machine.kind) if machine.kind else config, todo)
    found, finished = {}, finder(config, workdir)
    for run in runs:
        stage = known[run.stage]
        row = found.setdefault(run.stage, StageOutline(run.stage))
        if run.id in done:
            row.done += 1
            continue
        own = configs[run.id]
        row.checkpoints += _checkpoint_bytes(own, stage)
        row.work[run.id] = None
        try:
            parts = parts_of(stage, Ahead(own, run, _mesh(own, machine), finished))
        except Exception as error:  # of a plug-in too: what is only said keeps nothing from running
            row.problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason(error)}"
            continue
        row.work[run.id] = float(sum(part.flops for part in parts))
        row.tokens += sum(part.tokens for part in parts)
        row.bounded |= any(part.assumes for part in parts)
        if machine.hardware is not None:
            seconds = device_seconds(stage, parts, machine.hardware, own.launch.mfu, machine.devices)
            row.hours = (row.hours or 0.0) + seconds / 3600 / machine.devices
    return Outline(config.name, list(found.values()), machine)


def _machine(config: StudyConfig) -> Machine:
    """The devices of this machine. A host of several that is asked alone, as by a dry run, does not look at its own: they would wait for the others'."""
    import jax

    from plasticity_jax.parallel import hardware, processes
    from plasticity_jax.parallel.lanes import divided
    from plasticity_jax.parallel.workers import number_of_workers

    if processes.total() == 1 and processes.detected():
        return Machine()
    try:
        devices = jax.devices()
    except RuntimeError:  # another process has them
        return Machine()
    kind = devices[0].device_kind
    parallel_runs = for_device(config, kind).launch.parallel_runs
    try:
        parts = divided(devices, 1 if number_of_workers(parallel_runs) is not None else parallel_runs or 1)
    except UserError:  # which a study refuses
        parts = [devices]
    return Machine(kind, len(devices), parts[0], hardware.of_kind(kind))


def _mesh(config: StudyConfig, machine: Machine) -> "Mesh | AbstractMesh":
    """The devices of a run as its config lays them out; a single one where they are others than the config's."""
    from jax.sharding import AbstractMesh

    from plasticity_jax.parallel.mesh import AXES, make_mesh

    if machine.part:
        try:
            return make_mesh(config.mesh, machine.part)
        except UserError:
            pass
    return AbstractMesh((1,) * len(AXES), AXES)


def _checkpoint_bytes(config: StudyConfig, stage: Stage) -> int:
    """About what the checkpoints of a finished run hold: float32 parameters, and moments where they are kept."""
    from plasticity_jax.model.param_count import count_params

    if not stage.checkpoints:
        return 0
    steps = {config.train.steps, *config.train.kept_steps} if stage.name == PRETRAINED else {0}
    trains = stage.name not in (INIT.name, IMPORTED)
    return 4 * count_params(config.model) * len(steps) * (3 if trains and config.train.keep_optimizer else 1)


# ------------------------------------------------------------------------------------------------------------------------------ printing


def outline_lines(found: Outline) -> list[str]:
    """The outline as a table with a line per stage, and below it what is bounded or not known."""
    total = StageOutline(
        "total",
        done=sum(row.done for row in found.stages),
        work={run: work for row in found.stages for run, work in row.work.items()},
        tokens=sum(row.tokens for row in found.stages),
        checkpoints=sum(row.checkpoints for row in found.stages),
        hours=None if found.machine.hardware is None else sum(row.hours or 0.0 for row in found.stages),
        bounded=any(row.bounded for row in found.stages),
    )
    heading = ["stage", "to do", "done", "tokens", "model FLOPs", "checkpoints", *(["hours"] if found.machine.hardware is not None else [])]
    rows = [heading, *([*_cells(row)][: len(heading)] for row in (*found.stages, total))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [f"{found.name}: {total.runs:,} runs to do, {total.done:,} done"]
    for row in rows:
        cells = [cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))]
        text.append("  " + "  ".join(cells).rstrip())
    return text + [f"  {note}" for note in _notes(found, total)]


def _cells(row: StageOutline) -> tuple[str, ...]:
    most = "≤ " if row.bounded else ""
    return (
        row.stage,
        f"{row.runs:,}",
        f"{row.done:,}",
        most + scaled(row.tokens, ("", "k", "M", "B", "T")) if row.tokens else "",
        most + f"{row.flops:.1e}".replace("e+0", "e").replace("e+", "e") if row.flops else "",
        scaled(row.checkpoints, (" B", " kB", " MB", " GB", " TB")) if row.checkpoints else "",
        most + three_digits(row.hours) if row.hours is not None else "",
    )


def _notes(found: Outline, total: StageOutline) -> list[str]:
    notes = []
    if total.bounded:
        notes.append("≤ at most: rows and their lengths are known once prepare is done, and completions may end before their limit")
    unknown: dict[str, list[str]] = {}
    for row in found.stages:
        if row.problem and row.runs:
            unknown.setdefault(row.problem, []).append(row.stage)
    notes += [f"not counted: {', '.join(names)}: {problem}" for problem, names in unknown.items()]
    if total.flops and found.machine.hardware is None:
        which = f"the peak of {found.machine.kind} is not known" if found.machine.kind else "the devices are not known here"
        notes.append(f"no hours: {which}; a study tells its time left once runs have finished")
    return notes


def scaled(value: float, units: Sequence[str]) -> str:
    """A number in three digits with the unit that suits it: each is a thousand of the one before."""
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return three_digits(value) + units[place]


def member_lines(config: StudyConfig) -> list[str]:
    """The members of the grid: one line for those that decay alike, with the values in which they differ."""
    groups: dict[str, list[Member]] = {}
    for member in grid_members(config):
        groups.setdefault(_decay(config, member), []).append(member)
    lines = []
    for said, members in groups.items():
        values: dict[str, dict[str, None]] = {}  # field → its values, in order, each once
        for member in members:
            for name, value in (*member.overrides, *member.changes):
                values.setdefault(name, {})[str(value)] = None
        first, last = members[0].name, members[-1].name
        names = first if len(members) == 1 else f"{len(members)} members" + (f", {first} … {last}" if len(first + last) < LONG_NAMES else "")
        seeds = dict.fromkeys(member.seed for member in members)
        fields = [f"{name} = {', '.join(each)}" for name, each in values.items()]
        fields += [f"seeds {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
        lines.append(f"{names}: {', '.join([said, *fields])}")
    return lines


def every_member(config: StudyConfig) -> list[str]:
    """The members of the grid, a line for each."""
    return [
        f"{member.name}: {', '.join([_decay(config, member), *(f'{name} = {value}' for name, value in (*member.overrides, *member.changes))])}"
        for member in grid_members(config)
    ]


def _decay(config: StudyConfig, member: Member) -> str:
    """What a member is besides the fields that are swept with it: its decay, or the model that exists in its place."""
    if member.model is not None:
        said = {name: value for name, value in member.values.items() if value is not None and name not in dict(member.overrides)}
        return ", ".join([*(f"{name} = {value}" for name, value in said.items()), str(member.model)])
    timescale = "no decay" if member.timescale is None else f"timescale {three_digits(member.timescale)} of the run"
    decay = member.weight_decay or 0.0
    return f"λ = {decay:.6g}, peak lr·λ = {member_config(config, member).train.peak_lr * decay:.4g}, {timescale}"


def run_lines(workdir: AnyPath, config: StudyConfig, runs: Sequence[Run]) -> list[str]:
    """Every run with its state and parents, a line for each."""
    lines = []
    for run in runs:
        state, why = RunDirectory(study_dir(workdir, config) / run.id).state()
        parents = ", ".join(run.parents.values())
        lines.append(f"{run.id}  {state}{f' ({why})' if why else ''}" + (f"  ← {parents}" if parents else ""))
    return lines
