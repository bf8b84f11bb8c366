"""Fine-tune: every base model on every task, with the same recipe."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import Member, StudyConfig, result_fields
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.imported import base_run
from plasticity_jax.stages.prepare import task_run, task_settings
from plasticity_jax.stages.pretrain import training_knobs
from plasticity_jax.stages.stage import BASES, Batched, Context, Plan, Planned, Program, Stage
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True)
class Finetuned:
    """What `train.finetune.finetune` returns; see there."""

    diverged: str | None
    steps: int
    tokens: int
    seconds: float
    train_loss: float | None
    rows: int
    cut_rows: int
    dropped_rows: int
    empty_rows: int
    relative_update: float | None


def finetune_run(config: StudyConfig, base: Run, task: str, seed: int, member: Member | None = None) -> Run:
    """A base model fine-tuned on one task with one seed, with the recipe of `member`; None for a base that belongs to no member."""
    recipe = {k: v for k, v in result_fields(config.finetune).items() if k != "seeds"}
    fields = recipe | {"epochs": task_settings(config, task).epochs, "seed": seed, "compute_dtype": config.train.compute_dtype}
    parents = {"base": base.id, "task": task_run(config, task).id}
    owner, suffix = member.name if member else base.member or base.name, f"-s{seed}" if seed else ""
    of_base = owner if member or base.stage in BASES else base.name
    return STAGE.new_run(config, f"{of_base}-{task}{suffix}", fields, parents, member=owner, task=task, seed=seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    from plasticity_jax.data.tasks import get_task

    for task in (name for name in plan.config.tasks if get_task(name, plan.config.tasks).trained):
        for seed in plan.config.finetune.seeds:
            for own, member in plan.members:
                yield own, finetune_run(own, base_run(own, member), task, seed, member)


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    """Refuses batches and kernels that the devices do not take."""
    from plasticity_jax.train.check import check_devices

    check_devices(config)


def run(context: Context) -> Finetuned | None:
    """Fine-tunes the parent "base" on the training rows of the parent "task"."""
    return run_batch([context])[0]


def run_batch(contexts: Sequence[Context]) -> list[Finetuned | None]:
    """Fine-tunes models of one network and tokenizer as one program."""
    from plasticity_jax.data.tasks import read_task
    from plasticity_jax.data.tasks.files import read_summary
    from plasticity_jax.train.finetune import Tuned, finetune

    task = contexts[0].parents["task"]
    rows, fingerprint = read_task(task).train, read_summary(task)["fingerprint"]
    programs: dict[Any, list[tuple[Context, Tuned]]] = {}
    for context in contexts:
        base = context.model("base", with_tokenizer=True)
        context.directory.provenance["data_fingerprint"] = fingerprint
        tuned = Tuned(base, context.config, context.run.name, context.directory.path)
        programs.setdefault((base.config, base.text_tokenizer.fingerprint), []).append((context, tuned))
    found: dict[str, Finetuned | None] = {}
    for program in programs.values():
        first = program[0][0]
        settings, models = task_settings(first.config, first.task), [tuned for _, tuned in program]
        facts_of = finetune(models, rows, epochs=settings.epochs, seed=first.seed, answer_limit=settings.max_new_tokens)
        for (context, _), facts in zip(program, facts_of, strict=True):
            found[context.run.id] = Finetuned(**facts) if facts else None
    return [found[context.run.id] for context in contexts]


def _program(run: Run) -> str:
    """What runs of one compiled program have in common: task, seed and recipe, but for the traced hyperparameters. The base may be another."""
    fields = {name: value for name, value in run.fields.items() if name not in ("peak_lr", "weight_decay", "warmup_fraction")}
    return to_json([fields, run.parents["task"]])


def _bytes(config: StudyConfig, mesh: "Mesh") -> int:
    from plasticity_jax.train.finetune import step_settings
    from plasticity_jax.train.memory import training_bytes

    return training_bytes(step_settings(config, config.model, mesh), mesh, config.finetune.batch_size, config.finetune.length_buckets[-1])


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.train.finetune import lower_step, step_settings
    from plasticity_jax.train.step import state_bytes

    if config.tasks:
        held = sum(state_bytes(step_settings(config, config.model, mesh), mesh, members=members).values())
        what = f"training step, {config.finetune.batch_size} x {config.finetune.length_buckets[-1]}"
        way_out = "lower the last of finetune.length_buckets"
        yield Program(what, lambda own: lower_step(own, mesh, members), training_knobs(config, mesh, "finetune"), held, way_out=way_out)


def _work(ahead: Ahead) -> Iterable[Work]:
    """Training on every batch as it is padded, in rows and in length."""
    from plasticity_jax.model.flops import flops_per_token
    from plasticity_jax.parallel.batches import padded_batch_size
    from plasticity_jax.train.finetune import schedule

    config, recipe, task = ahead.config, ahead.config.finetune, ahead.task()
    epochs, longest = ahead.run.fields["epochs"], recipe.length_buckets[-1]
    size = padded_batch_size(ahead.mesh, recipe.batch_size, recipe.grad_accum_steps, "finetune")
    lengths = task.row_lengths(max_length=longest, too_long=recipe.too_long)
    if lengths is not None:
        batches, assumes = Counter(length for length, _ in schedule(lengths, recipe, epochs=epochs, seed=ahead.run.seed or 0)), ()
    else:
        batches = {longest: epochs * -(-task.counts["train"] // recipe.batch_size)}
        assumes = (*task.assumes("train"), f"batches of rows of {longest} tokens")
    tokens = {length: n * size * length for length, n in batches.items()}
    yield Work(
        flops=float(sum(n * flops_per_token(config.model, length) for length, n in tokens.items())), tokens=sum(tokens.values()), assumes=assumes
    )


STAGE = Stage(
    name="finetune",
    title="fine-tuned models",
    run=run,
    checkpoints=True,
    record=Finetuned,
    parents={"base": "pretrain", "task": "prepare"},
    plan=_plan,
    check=_check,
    devices="all",
    batched=Batched(_program, run_batch, _bytes),
    programs=_programs,
    work=_work,
)
