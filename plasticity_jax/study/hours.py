"""Hours of a whole study on a machine: an estimate from what the runs of its graph compute. Nothing is compiled, and no kernel is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.parallel.deviceless import Target
from plasticity_jax.parallel.hardware import Hardware
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages import Ahead, Plan, Stage, Work, stages
from plasticity_jax.study.graph import study_dir
from plasticity_jax.text import three_digits
from plasticity_jax.train.check import resolved


@dataclass
class StageHours:
    """The estimate of all runs of a stage.

    Attributes:
      runs: their number.
      device_hours: hours of the whole machine times its devices; None where the stage is not estimated.
      problem: why it is not.
      assumes: what is bounded from above, where the estimate is an upper bound.
    """

    stage: str
    runs: int
    device_hours: float | None = 0.0
    problem: str = ""
    assumes: dict[str, None] = field(default_factory=dict)  # in order, each once


def device_seconds(stage: Stage, parts: Sequence[Work], hardware: Hardware, mfu: float, devices: int) -> float:
    """Of a run, summed over the devices that share its work: of each part the longer of computing at `mfu` of the peak and of reading at full bandwidth."""
    seconds = sum(max(part.flops / (mfu * hardware.peak_flops), part.bytes / hardware.bandwidth) for part in parts)
    alone = stage.devices != "all" and devices > hardware.per_host  # a stage of the first process keeps the others waiting
    return seconds * devices if alone else seconds


def study_hours(config: StudyConfig, target: Target, workdir: AnyPath | None = None) -> list[StageHours]:
    """Estimates every stage that has runs in a study, in the order of the graph; also of runs that are done already.

    Args:
      workdir: where the study's prepared data lies, from which rows and their lengths are known; None bounds them.
    """
    config = with_compute_dtype(config, target)
    plan = Plan(config, stages().values())
    found, finished = [], finder(config, workdir)
    for name, stage in stages().items():
        planned, seconds = plan.of(name), 0.0
        if not planned:
            continue
        hours = StageHours(name, len(planned))
        try:
            for own, run in planned:
                own = resolved(own, target)
                parts = parts_of(stage, Ahead(own, run, make_mesh(own.mesh, target.devices), finished))
                seconds += device_seconds(stage, parts, target.hardware, own.launch.mfu, len(target.devices))
                hours.assumes |= {phrase: None for part in parts for phrase in part.assumes}
            hours.device_hours = seconds / 3600
        except UserError as error:
            hours.device_hours, hours.problem = None, str(error)
        found.append(hours)
    return found


def parts_of(stage: Stage, ahead: Ahead) -> list[Work]:
    """What a run of a stage computes. Raises UserError if it is not known."""
    if stage.work is None:
        raise UserError("no declared work")
    return list(stage.work(ahead))


def with_compute_dtype(config: StudyConfig, target: Target) -> StudyConfig:
    """The study's config with its compute dtype chosen, which the runs' hashes hold; hardware rules apply to each member."""
    return replace(config, train=replace(config.train, compute_dtype=resolved(config, target).train.compute_dtype))


def finder(config: StudyConfig, workdir: AnyPath | None) -> Callable[[str], AnyPath | None]:
    """Id of a run → its directory if it is done, and not only here as a record, without its data; for `Ahead`."""

    def finished(run_id: str) -> AnyPath | None:
        if workdir is None:
            return None
        directory = RunDirectory(study_dir(workdir, config) / run_id)
        return directory.path if directory.done and not directory.is_record else None

    return finished


def total(found: list[StageHours]) -> float:
    """Device-hours of the stages that are estimated."""
    return sum(hours.device_hours or 0.0 for hours in found)


def lines(found: list[StageHours], target: Target, mfu: float) -> list[str]:
    """The estimate as a table: a line per stage, the total, what is not estimated, and what is assumed."""
    rows = [(h.stage, f"{h.runs:,} run{'s' if h.runs != 1 else ''}", h.device_hours, bool(h.assumes)) for h in found if h.device_hours is not None]
    rows.append(("total", f"{sum(h.runs for h in found if h.device_hours is not None):,} runs", total(found), any(h.assumes for h in found)))
    text = [f"hours of the whole study at {mfu:.0%} MFU (≤ upper bound):"]
    for name, runs, device_hours, bound in rows:
        text.append(
            f"  {name:<10}{runs:>12}{_hours(device_hours / len(target.devices), bound):>12} hours{_hours(device_hours, bound):>12} device-hours"
        )
    text += [f"  {h.stage} assumes at most {'; '.join(h.assumes)}" for h in found if h.device_hours is not None and h.assumes]
    left_out: dict[str, list[str]] = {}
    for hours in found:
        if hours.device_hours is None:
            left_out.setdefault(hours.problem, []).append(hours.stage)
    return text + [f"  not estimated: {', '.join(names)}: {problem}" for problem, names in left_out.items()]


def _hours(value: float, bound: bool) -> str:
    return ("≤ " if bound else "") + three_digits(value)


def to_record(found: list[StageHours]) -> dict[str, Any]:
    """What `plasticity check --json` prints under "hours"."""
    return {
        "device_hours": total(found),
        "at_most": any(h.assumes for h in found),
        "stages": [
            {
                "stage": h.stage,
                "runs": h.runs,
                "device_hours": h.device_hours,
                "problem": h.problem,
                "at_most": bool(h.assumes),
                "assumes": [*h.assumes],
            }
            for h in found
        ],
    }
