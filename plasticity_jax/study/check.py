"""`plasticity check`: does every stage of a study fit on a machine? Compiles each stage's largest programs, also for devices that are not present."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax.errors import UserError
from plasticity_jax.parallel.deviceless import Target
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.stages import stages
from plasticity_jax.train import check as training
from plasticity_jax.train.check import Answer, Measured, gib


@dataclass(frozen=True)
class Row:
    """One program of a stage.

    Attributes:
      stage, what: which program.
      way_out: what to change if it does not fit.
      found: what compiling it gave; None if it could not be lowered.
      problem: why it could not; "" otherwise.
    """

    stage: str
    what: str
    way_out: str
    found: Measured | None
    problem: str = ""

    @property
    def fits(self) -> bool:
        return self.found is None or self.found.fits


def check_stages(answer: Answer, target: Target, chosen: Sequence[str]) -> list[Row]:
    """Compiles the programs of the stages after pretraining.

    Args:
      answer: what was found for pretraining, with the config to check.
      chosen: names of stages.
    """
    mesh, rows = make_mesh(answer.config.mesh, target.devices), []
    for name, stage in stages().items():
        for program in stage.programs(answer.config, mesh) if name in chosen else ():
            try:
                found = training.measure(program.lower, target, f"compile for {target.topology}: {name}, {program.what}")
                rows.append(Row(name, program.what, program.way_out, found))
            except UserError as error:
                rows.append(Row(name, program.what, program.way_out, None, str(error)))
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows as a table, with what to change below it."""
    width = max((len(f"{row.stage}: {row.what}") for row in rows), default=0)
    text = []
    for row in rows:
        name = f"{row.stage}: {row.what}".ljust(width)
        if row.found is None:
            text.append(f"{name}  not compiled: {row.problem}")
            continue
        found = row.found
        moved = ", ".join(f"{kind} {gib(size)}" for kind, size in found.collectives.items()) or "none"
        size = f"{gib(found.total)} of {gib(found.limit)} per device ({found.total / found.limit:.0%})"
        text.append(f"{name}  {'fits' if found.fits else 'does not fit'}: {size}; collectives: {moved}; compiled in {found.compile_seconds:.0f} s")
    text += [f"{row.stage} needs {gib(row.found.total)} of {gib(row.found.limit)}: {row.way_out}" for row in rows if row.found and not row.found.fits]
    return text


def to_record(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What `plasticity check --json` prints under "stages"."""
    return [
        {
            "stage": row.stage,
            "program": row.what,
            "fits": None if row.found is None else row.found.fits,
            "bytes": None if row.found is None else {"total": row.found.total, "limit": row.found.limit},
            "collectives": {} if row.found is None else row.found.collectives,
            "compile_seconds": None if row.found is None else round(row.found.compile_seconds, 1),
            "problem": row.problem,
        }
        for row in rows
    ]
