"""Fine-tuning: finished runs' models, one or several as one program; a task's rows; the study's recipe."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from plasticity_jax.config import FinetuneConfig, ModelConfig, StudyConfig
from plasticity_jax.data.sft import SftRows, encode_examples, plan, plan_packed, sft_batch
from plasticity_jax.data.tasks import Example
from plasticity_jax.data.tokenizer import copy_tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.parallel import arrays, processes
from plasticity_jax.parallel.batches import global_batches, padded_batch_size
from plasticity_jax.parallel.mesh import check_members, make_mesh
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.loop import LoopSettings, Track, train
from plasticity_jax.train.restore import relative_update, starting_state
from plasticity_jax.train.step import Batch, StepSettings, compile_train_step, execution_of, lower_train_step, next_token_batch, stack
from plasticity_jax.train.tuning import tuning_numbers, tuning_optimizer

log = logging.getLogger("plasticity_jax")


def step_settings(config: StudyConfig, model: ModelConfig, mesh: Mesh) -> StepSettings:
    """The settings of a recipe's compiled step: the same for every task, learning rate and weight decay, up to the batch's length.

    The learning rate decays to zero, and norms are not decayed, as in the Hugging Face Trainer. Only packed rows need segments, because padding on the
    right is invisible to causal attention. Source: paper section 4.1.
    """
    recipe = config.finetune
    optimizer = tuning_optimizer(recipe, decay_mask="no-norms")
    execution = execution_of(
        config.train, model, mesh, batch_size=recipe.batch_size, seq_len=recipe.length_buckets[-1], grad_accum_steps=recipe.grad_accum_steps
    )
    return StepSettings(model, optimizer, config.train.compute_dtype, z_loss=0.0, isolate_documents=recipe.packing, execution=execution)


def lower_step(config: StudyConfig, mesh: Mesh, members: int) -> Any:
    """The step of the longest batches, of one model or of `members` models as one program, lowered for the mesh's devices."""
    recipe = config.finetune
    check_members(mesh, members)
    rows = padded_batch_size(mesh, recipe.batch_size, recipe.grad_accum_steps, "finetune")
    batch = next_token_batch(rows, recipe.length_buckets[-1])
    return lower_train_step(step_settings(config, config.model, mesh), mesh, batch, members=members)


@dataclass
class Tuned:
    """One model to fine-tune.

    Attributes:
      base: a model with a tokenizer.
      config: the study's, with the recipe of its member.
      name, path: of the run; checkpoints, tokenizer and metrics are written to its directory.
    """

    base: LoadedModel
    config: StudyConfig
    name: str
    path: AnyPath


def finetune(
    members: Sequence[Tuned], examples: Sequence[Example], *, epochs: int, seed: int, answer_limit: int | None = None
) -> list[dict[str, Any]]:
    """Fine-tunes models on the same examples; resumes at the last checkpoint.

    Loss on the response only. Batches are those of `data.sft`: rows of like length together, or in random order, or packed, where
    `finetune.batch_size` counts packed sequences. A single model is the reference. Several are trained as one program, the step vmapped over a member
    axis; the results agree to rounding.

    Args:
      members: of one network and tokenizer, and equal but for `finetune.peak_lr`, `finetune.weight_decay` and `finetune.warmup_fraction`.
      examples: the training rows of a task.
      seed: of the order of the rows.
      answer_limit: see `encode_examples`.
    Returns:
      Per member, on the first process (empty on the others): diverged (None or the reason), steps, tokens (of responses, over all epochs), seconds (of
      training), train_loss (mean over the last 20 steps, nats per token), rows (trained on), cut_rows (of them, lost a part), dropped_rows (too long),
      empty_rows (without a response), relative_update (‖θ_ft − θ_pt‖/‖θ_pt‖; None if diverged).
    Raises:
      UserError: a base's network is not its config's, no row is left to train on, or the mesh's member axis does not divide the members.
    """
    config, base, vmapped = members[0].config, members[0].base, len(members) > 1
    recipe, what = config.finetune, ", ".join(member.name for member in members)
    for member in members:
        _check_network(member)
        if processes.primary():
            copy_tokenizer(member.base.path, member.path)
    length, how = recipe.length_buckets[-1], {"too_long": recipe.too_long, "answer_limit": answer_limit}
    rows = encode_examples(examples, base.text_tokenizer, max_length=length, **how)
    if not len(rows):
        raise UserError(
            f"{what}: no training row is left, {rows.n_dropped} are longer than {recipe.length_buckets[-1]} tokens and "
            f"{rows.n_empty} have no response; raise the last of finetune.length_buckets or set finetune.too_long='cut'."
        )
    steps = schedule(rows.lengths, recipe, epochs=epochs, seed=seed)
    mesh = make_mesh(config.mesh)
    check_members(mesh, len(members))
    padded = padded_batch_size(mesh, recipe.batch_size, recipe.grad_accum_steps, "finetune")
    settings = step_settings(config, base.config, mesh)
    initials = [arrays.put(member.base.params, param_shardings(mesh, member.base.params)) for member in members]
    tracks = [Track(member.path) for member in members]
    final: dict[int, Any] = {}
    if not all(track.diverged for track in tracks):
        # A member that has diverged stays in the program, whose size decides how the others are rounded.
        paths = [None if track.diverged else track.directory for track in tracks]
        state, start = starting_state(settings, mesh, initials, paths, steps=len(steps), members=vmapped)
        if start:
            log.info("resumes at step %d of %d", start, len(steps))
        recipes = [member.config.finetune for member in members]
        hypers = [tuning_numbers(own, steps=len(steps), weight_decay=own.weight_decay) for own in recipes]
        params = train(
            f"finetune {what}",
            state,
            train_step=compile_train_step(settings, mesh, members=vmapped),
            hyper=stack(hypers) if vmapped else hypers[0],
            batches=global_batches(_batches(rows, steps[start:], recipe, base.text_tokenizer.pad_id), mesh, None, padded),
            tracks=tracks,
            members=vmapped,
            settings=LoopSettings(
                steps=len(steps),
                log_every=recipe.log_every,
                checkpoint_every=recipe.checkpoint_every,
                eval_every=None,
                max_loss=config.train.max_loss,
                total_tokens=_n_targets(rows, steps),
                tracker=config.launch.tracker,
            ),
            held_out=None,
        )["params"]
        final = {i: jax.tree.map(lambda x: x[i], params) if vmapped else params for i, track in enumerate(tracks) if not track.diverged}
    results = []
    for i, track in enumerate(tracks):
        update = None if track.diverged else relative_update(initials[i], arrays.put(final[i], param_shardings(mesh, final[i])))
        if update is not None and not math.isfinite(update):  # the last update is seen by no training loss
            track.stop("parameters not finite after the last step")
        # Only the first process's results are kept, and only it has the log at hand.
        results.append(_facts(track, rows, update) if processes.primary() else {})
    return results


def _check_network(member: Tuned) -> None:
    found, own = member.base.config, member.config.model
    if found != own:
        different = next(f.name for f in dataclasses.fields(ModelConfig) if getattr(found, f.name) != getattr(own, f.name))
        raise UserError(
            f"model.{different}={getattr(own, different)} is {getattr(found, different)} in {member.base.path}; use the base's own config."
        )


def _facts(track: Track, rows: SftRows, update: float | None) -> dict[str, Any]:
    last = track.rows()[-1]
    return {
        "diverged": track.diverged,
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "train_loss": track.train_loss(),
        "rows": len(rows),
        "cut_rows": rows.n_cut,
        "dropped_rows": rows.n_dropped,
        "empty_rows": rows.n_empty,
        "relative_update": None if track.diverged else update,
    }


def schedule(lengths: Sequence[int] | np.ndarray, recipe: FinetuneConfig, *, epochs: int, seed: int) -> list[tuple[int, Any]]:
    """(length, indices of the rows) of every batch of a fine-tuning, for rows of these lengths in tokens."""
    if recipe.packing:
        return plan_packed(lengths, sequence_length=recipe.length_buckets[-1], batch_size=recipe.batch_size, epochs=epochs, seed=seed)
    return plan(
        lengths,
        buckets=recipe.length_buckets,
        batch_size=recipe.batch_size,
        epochs=epochs,
        seed=seed,
        group_by_length=recipe.group_by_length,
    )


def _n_targets(rows: SftRows, schedule: list[tuple[int, Any]]) -> int:
    n_targets = np.subtract(rows.lengths, rows.response_starts)
    return sum(int(n_targets[np.hstack(sequences)].sum()) for _, sequences in schedule)


def _batches(rows: SftRows, schedule: list, recipe: FinetuneConfig, pad_id: int) -> Iterator[Batch]:
    how = {"batch_size": recipe.batch_size, "pad_id": pad_id, "loss_parts": recipe.loss_parts}
    for bucket_length, sequences in schedule:
        yield sft_batch(rows, sequences, bucket_length=bucket_length, **how)
