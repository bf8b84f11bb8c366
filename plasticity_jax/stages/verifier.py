"""Samples and verifier: graded samples of the fine-tuned models, and the outcome verifier that learns from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plasticity_jax.config import StudyConfig, result_fields
from plasticity_jax.config.schema import Epochs, Fraction, PositiveFloat, PositiveInt, ProperFraction, Samples, Seed, execution, result
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import evaluate
from plasticity_jax.stages.prepare import task_settings
from plasticity_jax.stages.pretrain import training_knobs
from plasticity_jax.stages.stage import Context, Plan, Planned, Program, Stage, batch_fields
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh

SAMPLES_ROLE = "samples-"  # roles of a verifier's parents with graded samples begin with it


@dataclass(frozen=True)
class VerifierConfig:
    """The outcome verifier: per task, a fine-tuned model with a scalar head, trained on graded samples of rows kept for it (`tasks.<name>.verifier_rows`)."""

    n_samples: Samples = result(4, "samples per row and member")
    epochs: Epochs = result(3, "passes over the samples")
    peak_lr: PositiveFloat = result(1e-3, "learning rate after the warm-up")
    batch_size: PositiveInt = result(64, "samples per step")
    grad_accum_steps: PositiveInt = execution(1, "parts of a batch computed one after the other, to save memory")
    warmup_fraction: Fraction = result(0.1, "fraction of the steps")
    held_out_fraction: ProperFraction = result(0.2, "fraction of the rows, for the AUC that is reported; 0.2 is usual")
    seed: Seed = result(0, "seed of the split, the scalar head and the order of the samples")


@dataclass(frozen=True)
class Verified:
    """What `train.verifier.train_verifier` returns; see there."""

    diverged: str | None
    auc: float | None
    reason: str
    accuracy: float | None
    share_right: float
    counts: dict[str, int | dict[str, int]]
    cut: int
    steps: int
    tokens: int
    seconds: float
    train_loss: float | None


def samples_run(config: StudyConfig, tuned: Run) -> Run:
    """Graded samples of a fine-tuned model on the rows that its task keeps for the verifier."""
    fields = result_fields(config.evaluate) | {
        "split": "verifier",
        "n_samples": config.verifier.n_samples,
        "faithful": config.faithful,
        "max_new_tokens": task_settings(config, tuned.task_name).max_new_tokens,
        "compute_dtype": config.train.compute_dtype,
    }
    fields |= batch_fields(config.train.compute_dtype, config.evaluate.batch_size) | evaluate.of_grading(config, tuned.task_name)
    parents = {"model": tuned.id, "task": tuned.parents["task"]}
    return SAMPLES.new_run(config, tuned.name, fields, parents, member=tuned.member, task=tuned.task, seed=tuned.seed)


def verifier_run(config: StudyConfig, tuned: Sequence[Run], samples: Sequence[Run]) -> Run:
    """The outcome verifier of a task: begins as the first of the fine-tuned models, and learns from the samples of all."""
    first = tuned[0]
    fields = result_fields(config.verifier) | {
        **{name: getattr(config.finetune, name) for name in ("b1", "b2", "eps", "clip_norm", "length_buckets")},
        "max_length": config.reward.max_length,
        "faithful": config.faithful,
        "compute_dtype": config.train.compute_dtype,
    }
    parents = {"base": first.id, "task": first.parents["task"]} | {f"{SAMPLES_ROLE}{run.member}": run.id for run in samples}
    return STAGE.new_run(config, first.task_name, fields, parents, task=first.task, seed=config.verifier.seed)


def _sampled(plan: Plan, task: str) -> list[Planned]:
    """The models that the verifier of a task learns from: those of the first fine-tuning seed."""
    return [(own, run) for own, run in plan.of("finetune") if run.task == task and run.seed == plan.config.finetune.seeds[0]]


def _tasks(config: StudyConfig) -> list[str]:
    return [task for task in config.tasks if config.reward.scorer == "verifier" and not evaluate.by_likelihood(config, task)]


def _plan_samples(plan: Plan) -> Iterable[Planned]:
    return ((plan.config, samples_run(plan.config, run)) for task in _tasks(plan.config) for _, run in _sampled(plan, task))


def _plan(plan: Plan) -> Iterable[Planned]:
    """One verifier per task for all members, so that their rewards compare."""
    for task in _tasks(plan.config):
        samples = [run for _, run in plan.of("samples") if run.task == task]
        yield plan.config, verifier_run(plan.config, [run for _, run in _sampled(plan, task)], samples)


def run(context: Context) -> Verified | None:
    """Trains a verifier from the parent "base" on the completions of the parents "samples-..."; those that diverged are left out."""
    from plasticity_jax.data.completions import read_completions
    from plasticity_jax.data.tasks.files import read_summary
    from plasticity_jax.train.verifier import train_verifier

    roles = sorted(role for role in context.parents if role.startswith(SAMPLES_ROLE))
    if not roles:
        raise UserError(f"verifier {context.run.name} has no graded samples to learn from; give it a parent whose role begins with {SAMPLES_ROLE!r}.")
    left = [context.parents[role] for role in roles if RunDirectory(context.parents[role]).state()[0] != "diverged"]
    context.directory.provenance["data_fingerprint"] = read_summary(context.parents["task"])["fingerprint"]
    facts = train_verifier(
        context.model("base", with_tokenizer=True),
        [completion for path in left for completion in read_completions(path)],
        context.config,
        name=context.run.name,
        path=context.directory.path,
    )
    return Verified(**facts) if facts else None


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.model.scalar_head import without_output
    from plasticity_jax.train.step import state_bytes
    from plasticity_jax.train.verifier import lower_step, step_settings

    if config.reward.scorer == "verifier" and config.tasks:
        what = f"training step, {config.verifier.batch_size} x {config.reward.max_length}"
        held = sum(state_bytes(step_settings(config, without_output(config.model), mesh), mesh, members=1).values())
        knobs = training_knobs(config, mesh, "verifier")
        yield Program(what, lambda own: lower_step(own, mesh), knobs, held, way_out="lower reward.max_length")


def _work(ahead: Ahead) -> Iterable[Work]:
    """Training on the samples of all members, as if no two were alike, and scoring those held out."""
    from plasticity_jax.data.batching import length_buckets
    from plasticity_jax.model.flops import forward_flops

    config, task, recipe = ahead.config, ahead.task(), ahead.config.verifier
    samplers = sum(role.startswith(SAMPLES_ROLE) for role in ahead.run.parents)
    n = task.counts["verifier"] * (recipe.n_samples + 1) * samplers
    buckets = length_buckets(config.reward.max_length, config.finetune.length_buckets)
    length = next((bucket for bucket in buckets if bucket >= config.evaluate.max_length), config.reward.max_length)
    trained, held_out = recipe.epochs * (1 - recipe.held_out_fraction), recipe.held_out_fraction
    assumes = (*task.assumes("verifier"), f"texts of {length} tokens")
    flops = (3 * trained + held_out) * forward_flops(config.model, n, length, outputs=0)
    yield Work(flops=flops, tokens=round((trained + held_out) * n * length), assumes=assumes)


SAMPLES = Stage(
    name="samples",
    title="graded samples for the verifier",
    version=2,
    run=evaluate.run,
    batched=evaluate.STAGE.batched,
    record=evaluate.Evaluated,
    parents={"model": "finetune", "task": "prepare"},
    plan=_plan_samples,
    devices="all",
    work=evaluate.work,
    job="rewards",
)

STAGE = Stage(
    name="verifier",
    title="outcome verifiers",
    run=run,
    checkpoints=True,
    record=Verified,
    config=VerifierConfig,
    parents={"base": "finetune", "task": "prepare", SAMPLES_ROLE: "samples"},
    plan=_plan,
    devices="all",
    programs=_programs,
    work=_work,
    may_diverge=SAMPLES_ROLE,
    job="rewards",
)
