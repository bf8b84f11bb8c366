"""The outcome verifier: a fine-tuned model with a scalar head learns from graded samples to predict which completions are right."""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from plasticity_jax.config import ModelConfig, StudyConfig, VerifierConfig
from plasticity_jax.data.batching import pad_rows
from plasticity_jax.data.completions import Completion
from plasticity_jax.data.sft import plan
from plasticity_jax.data.tokenizer import copy_tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.model.scalar_head import (
    Execution,
    ScalarModel,
    abstract_scalar_params,
    encode_answers,
    execution_of,
    length_buckets,
    scalar_shardings,
    score_rows,
    scores,
    with_head,
)
from plasticity_jax.parallel import arrays, processes
from plasticity_jax.parallel.batches import check_batch_size
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.parallel.sharding import batch_sharding
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.loop import LoopSettings, Track, train
from plasticity_jax.train.optimizer import OptimizerSettings, make_optimizer, schedule_shape
from plasticity_jax.train.restore import common_step
from plasticity_jax.train.step import Batch, Hyper, Metrics, State
from plasticity_jax.train.tuning import tuning_numbers, tuning_optimizer

log = logging.getLogger("plasticity_jax")


@dataclass(frozen=True)
class VerifierStep:
    """Everything that the compiled step depends on besides shapes; equal settings share one compilation.

    Attributes:
      model: the decoder, without output matrix.
      optimizer: as in fine-tuning.
      execution, remat: how to run the forward and backward passes.
    """

    model: ModelConfig
    optimizer: OptimizerSettings
    execution: Execution
    remat: str


def train_verifier(base: LoadedModel, samples: Sequence[Completion], config: StudyConfig, *, name: str, path: AnyPath) -> dict[str, Any]:
    """Trains a verifier from a model on graded completions; resumes at the last checkpoint.

    All parameters learn, by binary cross-entropy on whether a completion is right. A text that several members wrote for the same problem counts
    once. Some of the problems, by hash of their id, are held out with all their completions. Where all completions to learn from are right, or all
    wrong, nothing is learned and the head stays zero, so that every reward is 0.

    Args:
      base: a model with a tokenizer.
      samples: completions of all members on the rows kept for the verifier.
      name, path: of the run; checkpoints, tokenizer and metrics are written to its directory.
    Returns:
      On the first process (empty on the others): auc (on the held-out completions; None where it is not defined), reason (why it is None, else ""), accuracy (share of them on whose side of 0
      the logit lies), share_right (of them), counts (completions read, and of train and held_out: problems, completions, right), cut (texts
      that lost their beginning), diverged (None or the reason), steps, tokens (read, over all epochs), seconds (of training), train_loss (nats per
      completion, mean over the last 20 steps; None without training).
    Raises:
      UserError: the base has another network than the config's, or the samples are of fewer than two problems.
    """
    recipe = config.verifier
    if base.config != config.model:
        raise UserError(f"{base.path} is of another network than the study's model; use the base's own config.")
    if processes.primary():
        copy_tokenizer(base.path, path)
    completions = list({(completion.id, completion.text): completion for completion in samples}.values())
    split = held_out_problems([completion.id for completion in completions], recipe.held_out_fraction)
    rows, n_cut = encode_answers(
        base.text_tokenizer, [c.prompt for c in completions], [c.text for c in completions], max_length=config.reward.max_length, bos=config.faithful
    )
    right = np.array([completion.correct for completion in completions])
    is_held_out = np.array([completion.id in split for completion in completions])
    execution = execution_of(config, base.config)
    model = with_head(base.config, base.params, jnp.zeros(base.config.d_model, jnp.float32))
    buckets = length_buckets(config.reward.max_length, config.finetune.length_buckets)
    learned = np.flatnonzero(~is_held_out)
    track = Track(path, keep=1)
    if len(set(right[learned].tolist())) == 2:
        model = _train(name, config, track, model, execution, [rows[i] for i in learned], right[learned], buckets)
        reason = ""
    else:
        reason = f"all completions to learn from are {'right' if right[learned].all() else 'wrong'}"
        _save_untrained(path, model)
    held_out = np.flatnonzero(is_held_out)
    logits = np.zeros(len(held_out), np.float32)
    if not track.diverged and not reason:
        logits = score_rows(
            model,
            [rows[i] for i in held_out],
            buckets=buckets,
            batch_size=recipe.batch_size,
            execution=execution,
            what=f"verifier {name}, held out",
        )
        if not np.isfinite(logits).all():  # the last update is seen by no training loss
            track.stop("logits not finite after the last step")
    if not processes.primary():
        return {}
    measured = not track.diverged and not reason
    if measured and len(set(right[held_out].tolist())) < 2:
        reason = f"all held-out completions are {'right' if right[held_out].all() else 'wrong'}"
    last = track.rows()[-1] if track.rows() else {"step": 0, "tokens": 0, "seconds": 0.0}
    return {
        "auc": area_under_curve(logits, right[held_out]) if measured and not reason else None,
        "reason": reason,
        "accuracy": float(np.mean((logits > 0) == right[held_out])) if measured else None,
        "share_right": float(right[held_out].mean()),
        "counts": {
            "read": len(samples),
            **{name: _counts(completions, indices) for name, indices in (("train", learned), ("held_out", held_out))},
        },
        "cut": n_cut,
        "diverged": track.diverged,
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "train_loss": track.train_loss(),
    }


def _counts(completions: Sequence[Completion], indices: np.ndarray) -> dict[str, int]:
    chosen = [completions[i] for i in indices]
    return {"problems": len({c.id for c in chosen}), "completions": len(chosen), "right": sum(c.correct for c in chosen)}


def held_out_problems(ids: Sequence[str], share: float) -> set[str]:
    """The held-out problems: those with the smallest hashes, so that the choice does not depend on the order of the problems.

    Args:
      share: fraction of the distinct ids; at least one is held out and one is not.
    Raises:
      UserError: fewer than two problems.
    """
    ordered = sorted(set(ids), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(ordered) < 2:
        raise UserError(
            f"the verifier's samples cover {len(ordered)} problem(s), and at least one must be held out; raise tasks.<name>.verifier_rows."
        )
    return set(ordered[: min(max(1, round(share * len(ordered))), len(ordered) - 1)])


def area_under_curve(logits: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    """The area under the ROC curve: the probability that a right completion has a higher logit than a wrong one, ties counted as one half.

    Raises:
      ValueError: one class only.
    """
    from scipy.stats import mannwhitneyu  # scipy.stats takes a second to import

    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        raise ValueError(f"{n_right} right and {n_wrong} wrong completions; both must be at least 1.")
    return float(mannwhitneyu(logits[right], logits[~right], method="asymptotic").statistic) / (n_right * n_wrong)


# ----------------------------------------------------------------------------------------------------------------------------- training


def _train(
    name: str,
    config: StudyConfig,
    track: Track,
    model: ScalarModel,
    execution: Execution,
    rows: list[list[int]],
    right: Bool[np.ndarray, " n"],
    buckets: Sequence[int],
) -> ScalarModel:
    """The model after training, or as it was where it had diverged before."""
    recipe = config.verifier
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, recipe.batch_size, 1, "verifier")
    # `plan` counts the inputs of a row that is predicted token by token: one fewer than its tokens.
    schedule = plan([len(row) + 1 for row in rows], buckets=buckets, batch_size=recipe.batch_size, epochs=recipe.epochs, seed=recipe.seed)
    if track.diverged:
        return model
    settings = VerifierStep(model.config, tuning_optimizer(config.finetune, decay_mask="all"), execution, config.train.remat)
    state, start = _starting_state(settings, mesh, model, track.directory, steps=len(schedule))
    if start:
        log.info("resumes at step %d of %d", start, len(schedule))
    params = train(
        f"verifier {name}",
        state,
        train_step=compile_verifier_step(settings, mesh),
        hyper=tuning_numbers(recipe, steps=len(schedule)),
        batches=_batches(rows, right, schedule[start:], recipe, mesh),
        tracks=[track],
        members=False,
        settings=LoopSettings(
            steps=len(schedule),
            log_every=config.finetune.log_every,
            checkpoint_every=min(config.finetune.checkpoint_every, len(schedule) // recipe.epochs),
            eval_every=None,
            max_loss=config.train.max_loss,
            total_tokens=recipe.epochs * sum(map(len, rows)),
        ),
        held_out=None,
    )["params"]
    return ScalarModel(model.config, params)


def _batches(rows: list[list[int]], right: np.ndarray, schedule: list, recipe: VerifierConfig, mesh: Mesh) -> Iterator[Batch]:
    for length, indices in schedule:
        tokens, lengths = pad_rows([rows[i] for i in indices], length=length, batch_size=recipe.batch_size)
        labels = np.zeros(recipe.batch_size, np.float32)
        labels[: len(indices)] = right[indices]
        batch = {"tokens": tokens, "lengths": lengths, "labels": labels}
        yield batch if processes.count() == 1 else arrays.put(batch, batch_sharding(mesh))


def make_verifier_step(settings: VerifierStep) -> Callable[[State, Batch, Hyper], tuple[State, Metrics]]:
    """The pure function `step(state, batch, hyper) -> (state, metrics)`.

    The batch has tokens [B, T], lengths [B] (0 for rows that fill up the batch) and labels [B] (1 right, 0 wrong). The loss is the mean binary
    cross-entropy, in nats per completion.
    """
    optimizer, execution = make_optimizer(settings.optimizer), settings.execution

    def loss(params: Any, batch: Batch) -> Float[Array, ""]:
        logits_B = scores(
            settings.model,
            params,
            batch["tokens"],
            batch["lengths"],
            compute_dtype=jnp.dtype(execution.compute_dtype),
            attention=execution.attention,
            scan_layers=execution.scan_layers,
            remat=settings.remat,
            mesh=execution.mesh,
        )
        counts_B = (batch["lengths"] > 0).astype(jnp.float32)
        return jnp.sum(optax.sigmoid_binary_cross_entropy(logits_B, batch["labels"]) * counts_B) / jnp.maximum(counts_B.sum(), 1.0)

    def step(state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
        value, gradient = jax.value_and_grad(loss)(state["params"], batch)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"], hyper=hyper)
        shape = schedule_shape(state["step"], warmup=hyper["warmup_steps"], total=hyper["total_steps"], schedule=settings.optimizer.schedule)
        metrics = {"loss": value, "tokens": batch["lengths"].sum(), "lr": hyper["peak_lr"] * shape, "grad_norm": optax.tree.norm(gradient)}
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state, "step": state["step"] + 1}, metrics

    return step


@functools.lru_cache(maxsize=8)
def compile_verifier_step(settings: VerifierStep, mesh: Mesh) -> Callable[[State, Batch, Hyper], tuple[State, Metrics]]:
    """The jitted step, which donates the old state. Equal arguments give the same function."""
    state, single = _state_shardings(settings, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(make_verifier_step(settings), in_shardings=(state, batch_sharding(mesh), single), out_shardings=(state, single), donate_argnums=0)


def _state_shardings(settings: VerifierStep, mesh: Mesh) -> State:
    optimizer, params = make_optimizer(settings.optimizer), scalar_shardings(mesh, settings.model)
    single = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        jax.eval_shape(optimizer.init, abstract_scalar_params(settings.model)),
        params,
        transform_non_params=lambda _: single,
    )
    return {"params": params, "optimizer": moments, "step": single}


def _starting_state(settings: VerifierStep, mesh: Mesh, model: ScalarModel, run: AnyPath, *, steps: int) -> tuple[State, int]:
    """The state of the run's last checkpoint, or before the first update, and its step. After the last of `steps` the optimizer's state is not read."""
    optimizer, shardings = make_optimizer(settings.optimizer), _state_shardings(settings, mesh)
    step = processes.broadcast(lambda: common_step([run]))
    if step == 0:
        params = arrays.put(model.params, shardings["params"])
        state = {"params": params, "optimizer": jax.jit(optimizer.init)(params), "step": jnp.zeros([], jnp.int32)}
    else:
        shapes = jax.eval_shape(lambda params: (params, optimizer.init(params)), abstract_scalar_params(settings.model))
        placed = [
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings[name])
            for name, tree in zip(("params", "optimizer"), shapes)
        ]
        with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
            if step == steps:
                params = checkpoints.restore_params(step, placed[0])
                moments = jax.jit(optimizer.init)(params)
            else:
                params, moments = checkpoints.restore(step, *placed)
        state = {"params": params, "optimizer": moments, "step": jnp.int32(step)}
    # Always a copy: the first update donates its state.
    return jax.device_put(state, shardings, may_alias=False), step


def _save_untrained(run: AnyPath, model: ScalarModel) -> None:
    with Checkpoints(run / CHECKPOINTS, asynchronous=False) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(0, model.params)
