"""`plasticity check`: does every stage of a study fit on a machine, and if not, what is the smallest change that does?

Compiles the largest programs of each stage as they will run, for devices that need not be present.
"""

import bisect
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.parallel.deviceless import Target
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.stages import Plan, Program, stages
from plasticity_jax.study.hours import with_compute_dtype
from plasticity_jax.study.together import alike, group_size, say_once, shapes
from plasticity_jax.train import check as training
from plasticity_jax.train.check import Answer, Measured, gib, resolved
from plasticity_jax.train.pretrain import step_settings

log = logging.getLogger("plasticity_jax")

PRETRAIN = "pretrain"
LARGEST_MESH = 2**14  # devices; where fewer do not hold a program, none is named


@dataclass
class Case:
    """Members of the grid whose programs are the same.

    Attributes:
      config: theirs, on the target's devices.
      groups: stage → how many of them it trains as one program.
    """

    config: StudyConfig
    groups: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One program of a stage.

    Attributes:
      stage, what: which program.
      found: what compiling it gave; None if it could not be lowered.
      problem: why it could not; "" otherwise.
      members: models that it trains as one program.
      way_out: what to change if it does not fit.
    """

    stage: str
    what: str
    found: Measured | None
    problem: str = ""
    members: int = 1
    way_out: str = ""

    @property
    def fits(self) -> bool:
        return self.found is None or self.found.fits


@dataclass
class Compiler:
    """Compiles programs for a target, equal ones once."""

    target: Target
    _known: dict[str, Measured] = field(default_factory=dict)

    def __call__(self, program: Program, config: StudyConfig, what: str) -> Measured:
        label = f"compile for {self.target.topology}: {what}"
        return training.measure(lambda: program.lower(config), self.target, label, at_least=program.held, known=self._known)


def cases(config: StudyConfig, target: Target) -> list[Case]:
    """The members of a study's grid on a target, those with the same programs together."""
    config = with_compute_dtype(config, target)
    plan, found = Plan(config, stages().values()), {}
    sizes: dict[tuple[str, str | None], int] = {}  # (stage, member) → runs of its largest group
    choices = []
    for name, stage in stages().items():
        configs = {run.id: resolved(own, target) for own, run in plan.of(name)} if stage.batched is not None else {}
        for group in alike([run for _, run in plan.of(name)], configs) if configs else ():
            own = configs[group[0].id]
            size, choice = group_size(own, group, make_mesh(own.mesh, target.devices))
            choices.append(choice)
            for run in group:
                sizes[name, run.member] = max(sizes.get((name, run.member), 1), size)
    say_once(choices)
    for own, member in plan.members:
        own = resolved(own, target)
        case = found.setdefault(to_json(shapes(own)), Case(own, {}))
        for name in stages():
            size = max(sizes.get((name, member.name), 1), sizes.get((name, member.base), 1))
            case.groups[name] = max(case.groups.get(name, 1), size)
    return list(found.values())


def check_pretraining(found: Sequence[Case], target: Target, *, search: bool = False) -> list[Answer]:
    """Compiles the training steps of the cases, or searches for their settings, which the cases' configs then have.

    Returns:
      One answer per different step; the one that needs most memory comes first.
    """
    answers: dict[Any, Answer] = {}
    for case in found:
        train, mesh = case.config.train, make_mesh(case.config.mesh, target.devices)
        key = step_settings(case.config, mesh), train.batch_size, train.seq_len, mesh, case.groups[PRETRAIN]
        if key not in answers:
            answers[key] = (training.search if search else training.check)(case.config, target, case.groups[PRETRAIN])
        case.config = replace(case.config, train=replace(train, **_searched(answers[key].config)))
    return sorted(answers.values(), key=lambda answer: (answer.fits, -answer.total))


def _searched(config: StudyConfig) -> dict[str, Any]:
    return {name: getattr(config.train, name) for name in ("grad_accum_steps", "remat")}


def check_stages(found: Sequence[Case], target: Target, chosen: Sequence[str]) -> list[Row]:
    """Compiles the programs of the stages after pretraining, and for one that does not fit looks for the smallest change that does.

    Args:
      chosen: names of stages.
    """
    rows: list[Row] = []
    compiler = Compiler(target)
    for name, stage in stages().items():
        seen: list[Measured] = []
        for case in found if name in chosen and name != PRETRAIN else ():
            mesh, members = make_mesh(case.config.mesh, target.devices), case.groups[name]
            programs = iter(stage.programs(case.config, mesh, members))
            while True:
                program = None
                try:
                    program = next(programs, None)
                    if program is None:
                        break
                    measured = compiler(program, case.config, f"{name}, {program.what}")
                except UserError as error:
                    if not any(row.stage == name and row.problem == str(error) for row in rows):
                        rows.append(Row(name, "" if program is None else program.what, None, str(error)))
                    continue
                if any(measured is earlier for earlier in seen):
                    continue
                seen.append(measured)
                way_out = "" if measured.fits else remedy(program, case.config, mesh, measured, compiler, name)
                rows.append(Row(name, program.what, measured, members=members, way_out=way_out))
    return rows


def remedies(answers: Sequence[Answer], target: Target) -> list[str]:
    """What to change about the training steps that do not fit, a line for each."""
    text, compiler = [], Compiler(target)
    for answer in answers:
        if not answer.fits:
            mesh = make_mesh(answer.config.mesh, target.devices)
            [program] = stages()[PRETRAIN].programs(answer.config, mesh, answer.members)
            text.append(_needs(PRETRAIN, answer, remedy(program, answer.config, mesh, answer, compiler, PRETRAIN)))
    return text


# ------------------------------------------------------------------------------------------------------------------- the smallest change


def remedy(program: Program, config: StudyConfig, mesh: Mesh, found: Measured, compiler: Compiler, stage: str) -> str:
    """The smallest change with which a program fits: of its knobs, tried by compiling, or else of the mesh, by bytes."""
    if program.held > found.limit:
        return _larger_mesh(program, config, mesh, found.limit, 0) or program.way_out
    smallest, changes = found, {}
    for tried, answer in _changes(program, config, functools.partial(_measured, program, config, compiler, stage)):
        if answer.fits:
            return f"{_named(tried)} fits ({gib(answer.total)})"
        smallest, changes = min((smallest, changes), (answer, tried), key=lambda pair: pair[0].total)
    larger = _larger_mesh(program, config, mesh, found.limit, max(smallest.total - program.held, 0))
    if not larger:
        return program.way_out
    return larger if not changes else f"with {_named(changes)} it needs {gib(smallest.total)}; then {larger}"


def _measured(program: Program, config: StudyConfig, compiler: Compiler, stage: str, changes: dict[str, Any]) -> Measured:
    return compiler(program, _changed(config, changes), f"{stage}, {program.what}, with {_named(changes)}")


def _changes(program: Program, config: StudyConfig, measure: Callable[[dict[str, Any]], Measured]) -> Iterator[tuple[dict[str, Any], Measured]]:
    """Yields changes and what they give: the first that fits ends the search.

    The values of the first knob are bisected; the others' are gone through one after the other, where the first knob is not enough.
    """
    if not program.knobs:
        return
    first, *others = program.knobs
    for fixed in ({}, *({other.field: value} for other in others for value in other.values)):
        options = [fixed | {first.field: value} for value in first.values]
        options = [fixed, *options] if fixed else options
        if not options:
            continue
        last = measure(options[-1])
        if not last.fits:
            yield options[-1], last
            continue
        place = bisect.bisect_left(options[:-1], True, key=lambda changes: measure(changes).fits)
        yield options[place], measure(options[place])
        return


def _changed(config: StudyConfig, changes: dict[str, Any]) -> StudyConfig:
    for name, value in changes.items():
        section, _, last = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{last: value})})
    return config


def _named(changes: dict[str, Any]) -> str:
    return " and ".join(f"{name}={value!r}" for name, value in changes.items())


def _larger_mesh(program: Program, config: StudyConfig, mesh: Mesh, limit: int, rest: int) -> str:
    """The smallest mesh on which what a program holds, split over its axis, fits beside `rest` bytes; "" if none does, or none divides the parameters."""
    sizes, abstract = dict(mesh.shape), abstract_params(config.model)
    others = mesh.size // sizes[program.axis]
    for size in range(sizes[program.axis] + 1, LARGEST_MESH // others + 1):
        if program.held * sizes[program.axis] / size + rest > limit:
            continue
        try:
            param_shardings(AbstractMesh(tuple((sizes | {program.axis: size}).values()), tuple(sizes)), abstract)
        except UserError:
            continue
        held = f"parameters{' and moments' if program.knobs[1:] else ''} take {gib(program.held)} of it"
        return f"{held}; mesh.{program.axis}={size}, {others * size} devices, fits by bytes"
    return ""


# ------------------------------------------------------------------------------------------------------------------------------ printing


def _needs(stage: str, found: Measured, way_out: str) -> str:
    return f"{stage} needs {gib(found.total)} of {gib(found.limit)}: {way_out}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows as a table, with what to change below it."""
    names = [f"{row.stage}: {row.what}" + (f", {row.members} members as one program" if row.members > 1 else "") for row in rows]
    width = max(map(len, names), default=0)
    text = []
    for name, row in zip(names, rows, strict=True):
        if row.found is None:
            text.append(f"{name.ljust(width)}  not compiled: {row.problem}")
            continue
        found = row.found
        moved = ", ".join(f"{kind} {gib(size)}" for kind, size in found.collectives.items()) or "none"
        size = f"{gib(found.total)} of {gib(found.limit)} per device ({found.total / found.limit:.0%})"
        text.append(
            f"{name.ljust(width)}  {'fits' if found.fits else 'does not fit'}: {size}; collectives: {moved}; compiled in {found.compile_seconds:.0f} s"
        )
    return text + [_needs(row.stage, row.found, row.way_out) for row in rows if row.found and not row.found.fits]


def to_record(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What `plasticity check --json` prints under "stages"."""
    return [
        {
            "stage": row.stage,
            "program": row.what,
            "members": row.members,
            "fits": None if row.found is None else row.found.fits,
            "bytes": None if row.found is None else {"total": row.found.total, "limit": row.found.limit},
            "collectives": {} if row.found is None else row.found.collectives,
            "compile_seconds": None if row.found is None else round(row.found.compile_seconds, 1),
            "problem": row.problem,
            "way_out": row.way_out,
        }
        for row in rows
    ]
