"""The outcome verifier: a fine-tuned model with a scalar head learns from graded samples to predict which completions are right."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from plasticity_jax.config import ModelConfig, StudyConfig, VerifierConfig
from plasticity_jax.data.batching import pad_rows
from plasticity_jax.data.completions import Completion
from plasticity_jax.data.sft import plan
from plasticity_jax.data.tokenizer import copy_tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.model.loss import masked_sum
from plasticity_jax.model.scalar_head import (
    ScalarModel,
    abstract_scalar_params,
    encode_answers,
    length_buckets,
    scalar_shardings,
    score_rows,
    scores,
    with_head,
    without_output,
)
from plasticity_jax.model.transformer import hidden_states
from plasticity_jax.parallel import arrays, processes
from plasticity_jax.parallel.batches import global_batches, padded_batch_size
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.loop import LoopSettings, Track, train
from plasticity_jax.train.restore import starting_state
from plasticity_jax.train.step import Batch, Objective, StepSettings, Sums, compile_train_step, execution_of, lower_train_step
from plasticity_jax.train.tuning import tuning_numbers, tuning_optimizer

log = logging.getLogger("plasticity_jax")


def _verdict_loss(settings: StepSettings, mesh: Mesh | None, params: Any, batch: Batch) -> tuple[Float[Array, ""], Sums]:
    """Binary cross-entropy, in nats per completion. The batch has tokens [B, T], lengths [B] (0: no completion) and labels [B] (1 right, 0 wrong)."""
    execution = settings.execution
    x_BxTxD, _ = hidden_states(
        settings.model,
        params["decoder"],
        batch["tokens"],
        compute_dtype=jnp.dtype(settings.compute_dtype),
        attention=execution.attention,
        scan_layers=execution.scan_layers,
        remat=execution.remat,
        mesh=mesh,
    )
    losses_B = optax.sigmoid_binary_cross_entropy(scores(params, x_BxTxD, batch["lengths"]), batch["labels"])
    total, count = masked_sum(losses_B, batch["lengths"] > 0)
    return total, {"loss": total, "count": count, "tokens": batch["lengths"].sum()}


VERDICT = Objective(_verdict_loss, abstract_scalar_params, scalar_shardings)


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
    mesh = make_mesh(config.mesh)
    model = with_head(base.config, base.params, jnp.zeros(base.config.d_model, jnp.float32))
    model = ScalarModel(model.config, arrays.put(model.params, scalar_shardings(mesh, model.config)))
    buckets = length_buckets(config.reward.max_length, config.finetune.length_buckets)
    learned = np.flatnonzero(~is_held_out)
    track = Track(path)
    if len(set(right[learned].tolist())) == 2:
        model = _train(name, config, track, model, mesh, [rows[i] for i in learned], right[learned], buckets)
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
            forward=Forward.of(config, model.config, mesh if mesh.size > 1 else None),
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
    mesh: Mesh,
    rows: list[list[int]],
    right: Bool[np.ndarray, " n"],
    buckets: Sequence[int],
) -> ScalarModel:
    """The model after training, or as it was where it had diverged before."""
    recipe = config.verifier
    padded = padded_batch_size(mesh, recipe.batch_size, recipe.grad_accum_steps, "verifier")
    # `plan` counts the inputs of a row that is predicted token by token: one fewer than its tokens.
    schedule = plan([len(row) + 1 for row in rows], buckets=buckets, batch_size=recipe.batch_size, epochs=recipe.epochs, seed=recipe.seed)
    if track.diverged:
        return model
    settings = step_settings(config, model.config, mesh)
    state, start = starting_state(settings, mesh, [model.params], [track.directory], steps=len(schedule), members=False)
    if start:
        log.info("resumes at step %d of %d", start, len(schedule))
    params = train(
        f"verifier {name}",
        state,
        train_step=compile_train_step(settings, mesh, members=False),
        hyper=tuning_numbers(recipe, steps=len(schedule)),
        batches=global_batches(_batches(rows, right, schedule[start:], recipe), mesh, None, padded),
        tracks=[track],
        members=False,
        settings=LoopSettings(
            steps=len(schedule),
            log_every=config.finetune.log_every,
            checkpoint_every=min(config.finetune.checkpoint_every, len(schedule) // recipe.epochs),
            eval_every=None,
            max_loss=config.train.max_loss,
            total_tokens=recipe.epochs * sum(map(len, rows)),
            tracker=config.launch.tracker,
        ),
        held_out=None,
    )["params"]
    return ScalarModel(model.config, params)


def step_settings(config: StudyConfig, model: ModelConfig, mesh: Mesh) -> StepSettings:
    """The settings of a verifier's compiled step; the optimizer is as in fine-tuning.

    Args:
      model: the decoder, without output matrix.
    """
    execution = execution_of(
        config.train,
        model,
        mesh,
        batch_size=config.verifier.batch_size,
        seq_len=config.reward.max_length,
        grad_accum_steps=config.verifier.grad_accum_steps,
    )
    optimizer = tuning_optimizer(config.finetune, decay_mask="all")
    return StepSettings(model, optimizer, config.train.compute_dtype, z_loss=0.0, isolate_documents=False, execution=execution, objective=VERDICT)


def lower_step(config: StudyConfig, mesh: Mesh) -> Any:
    """The training step for the longest texts, lowered for the mesh's devices."""
    recipe = config.verifier
    settings = step_settings(config, without_output(config.model), mesh)
    rows = padded_batch_size(mesh, recipe.batch_size, recipe.grad_accum_steps, "verifier")
    shapes = {"tokens": ((rows, config.reward.max_length), jnp.int32), "lengths": ((rows,), jnp.int32), "labels": ((rows,), jnp.float32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    return lower_train_step(settings, mesh, batch, members=1)


def _batches(rows: list[list[int]], right: np.ndarray, schedule: list, recipe: VerifierConfig) -> Iterator[Batch]:
    for length, indices in schedule:
        tokens, lengths = pad_rows([rows[i] for i in indices], length=length, batch_size=recipe.batch_size)
        labels = np.zeros(recipe.batch_size, np.float32)
        labels[: len(indices)] = right[indices]
        yield {"tokens": tokens, "lengths": lengths, "labels": labels}


def _save_untrained(run: AnyPath, model: ScalarModel) -> None:
    with Checkpoints(run / CHECKPOINTS, asynchronous=False) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(0, model.params)
