"""Reward: rates the completions of fine-tuned models, and lets the highest reward choose among the samples of a problem.

Under `faithful`, those of base models too.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from plasticity_jax.config import StudyConfig, result_fields
from plasticity_jax.config.schema import PositiveInt, execution, result
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import is_local, location
from plasticity_jax.stages.evaluate import by_likelihood, is_trained
from plasticity_jax.stages.stage import Context, Knob, Plan, Planned, Program, Stage
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True)
class RewardConfig:
    """What chooses among sampled completions (RM@n) and rates them (ORM score); the report names it."""

    scorer: Literal["none", "log-probability", "verifier", "sequence-classification"] = result(
        "none", "none | log-probability (per token) | verifier (trained by this study) | sequence-classification (a Hugging Face reward model)"
    )
    model: str | None = result(None, "log-probability: a run or Hugging Face folder, None: the model that wrote; sequence-classification: a folder")
    max_length: PositiveInt = result(
        2048, "tokens of problem and completion; longer ones lose their beginning (faithful: a sequence-classification model reads them whole)"
    )
    batch_size: PositiveInt = execution(64, "completions scored at once")

    def check(self, config: StudyConfig) -> None:
        if self.model is not None and self.scorer not in ("log-probability", "sequence-classification"):
            raise UserError(f"reward.model={self.model} has no effect with reward.scorer={self.scorer!r}; leave it out.")
        if self.model is None and self.scorer == "sequence-classification":
            raise UserError("reward.scorer='sequence-classification' needs reward.model, the folder of a Hugging Face reward model.")
        for name, settings in config.tasks.items():
            if self.scorer == "verifier" and not settings.verifier_rows and is_trained(config, name) and not by_likelihood(config, name):
                raise UserError(f"reward.scorer='verifier' needs rows of its own in every task; set tasks.{name}.verifier_rows, such as 200.")


@dataclass(frozen=True)
class Rewarded:
    """What `evaluate.reward.rate` returns, see there; and seconds of wall time."""

    scorer: str
    metrics: dict[str, float]
    per_problem: dict[str, list[float]]
    cut: int
    seconds: float


def reward_run(config: StudyConfig, scored: Run, verifier: Run | None) -> Run:
    """Rewards of the completions of a model."""
    reward = config.reward
    fields = result_fields(reward) | {"faithful": config.faithful, "compute_dtype": config.train.compute_dtype}
    parents = {"completions": scored.id, "task": scored.parents["task"]}
    if reward.model is not None:
        fields["model"] = model_content(reward.model)
    else:
        parents["scorer"] = verifier.id if verifier is not None else scored.parents["model"]
    return STAGE.new_run(config, scored.name, fields, parents, member=scored.member, task=scored.task, seed=scored.seed)


def model_content(place: str) -> dict[str, Any]:
    """What identifies a model from outside of the study: the run that it is, or the names and sizes of a Hugging Face folder's files, not its place."""
    path = location(place)
    if not path.is_dir():
        return {"place": place}
    if RunDirectory(path).done:
        return {"run": RunDirectory(path).run().hash}
    files = sorted((file.name, file.stat().st_size) for file in path.iterdir() if file.is_file())
    return {"names_and_sizes": hashlib.sha256(to_json(files).encode()).hexdigest()}


def _plan(plan: Plan) -> Iterable[Planned]:
    if plan.config.reward.scorer == "none":
        return
    verifiers = {run.task: run for _, run in plan.of("verifier")}
    for own, scored in plan.of("evaluate"):
        wanted = scored.fields["when"] in (("before", "after") if own.faithful else ("after",))
        if wanted and is_trained(plan.config, scored.task_name) and not by_likelihood(plan.config, scored.task_name):
            yield own, reward_run(own, scored, verifiers.get(scored.task))


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    """Refuses a reward model that is not there."""
    reward = config.reward
    if reward.model is None:
        return
    if reward.scorer == "sequence-classification":
        from plasticity_jax.evaluate.reward_model import check_folder

        check_folder(location(reward.model))
    elif not location(reward.model).is_dir():
        raise UserError(
            f"reward.model={reward.model}: no such directory; give a finished run, a Hugging Face folder, or None for the model that wrote."
        )


def run(context: Context) -> Rewarded | None:
    """Rates every completion of the parent "completions", an evaluate run, with `reward.model` or, without one, with the parent "scorer"."""
    from plasticity_jax.data.completions import read_completions
    from plasticity_jax.evaluate.reward import open_scorer, rate
    from plasticity_jax.evaluate.reward_model import fingerprint

    start, reward = time.monotonic(), context.config.reward
    scorer_path = context.parents["scorer"] if reward.model is None else location(reward.model)
    scorer = open_scorer(context.config, scorer_path, context.mesh, f"reward {context.run.name}")
    if reward.scorer == "sequence-classification" and is_local(scorer_path):
        context.directory.provenance["reward_model"] = fingerprint(scorer_path)
    results = rate(scorer, read_completions(context.parents["completions"]), context.directory.path)
    return Rewarded(**results, seconds=time.monotonic() - start) if results else None


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.evaluate.reward import abstract_scorer, lower_scores
    from plasticity_jax.parallel.batches import smaller_batches
    from plasticity_jax.parallel.sharding import device_bytes

    if config.reward.scorer != "none" and config.tasks:
        name = f"{config.reward.scorer}, {config.reward.batch_size} x {config.reward.max_length}"
        knob = Knob("reward.batch_size", smaller_batches(mesh, config.reward.batch_size))
        held = device_bytes(abstract_scorer(config, mesh))
        yield Program(name, lambda own: lower_scores(own, mesh), (knob,), held, way_out="lower reward.max_length")


def _work(ahead: Ahead) -> Iterable[Work]:
    """Reading every completion with its problem, as if no two were alike."""
    from plasticity_jax.data.batching import length_buckets
    from plasticity_jax.evaluate.reward import network
    from plasticity_jax.model.flops import forward_flops

    config, task, reward = ahead.config, ahead.task(), ahead.config.reward
    n = task.counts["test"] * (config.evaluate.n_samples + 1)
    length = next((bucket for bucket in length_buckets(reward.max_length) if bucket >= config.evaluate.max_length), reward.max_length)
    outputs = None if reward.scorer == "log-probability" else 0
    assumes = (*task.assumes("test"), f"texts of {length} tokens")
    yield Work(flops=forward_flops(network(config), n, length, outputs=outputs), tokens=n * length, assumes=assumes)


STAGE = Stage(
    name="reward",
    title="rewards of the completions",
    run=run,
    record=Rewarded,
    config=RewardConfig,
    parents={"completions": "evaluate", "task": "prepare", "scorer": ("verifier", "finetune", "pretrain")},
    plan=_plan,
    check=_check,
    devices="all",
    programs=_programs,
    work=_work,
    job="rewards",
)
