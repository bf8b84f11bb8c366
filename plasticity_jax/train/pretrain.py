"""Pretraining: one member of the grid, or several that differ only in traced hyperparameters, as one program."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from plasticity_jax.config import StudyConfig
from plasticity_jax.data.loader import TokenRecords, batches
from plasticity_jax.data.tokenizer import Tokenizer, copy_tokenizer
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.flops import flops_per_token
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.transformer import abstract_params, count_params
from plasticity_jax.parallel import arrays, hardware, processes
from plasticity_jax.parallel.batches import global_batches, local_rows, padded_batch_size
from plasticity_jax.parallel.mesh import check_members, make_mesh
from plasticity_jax.parallel.sharding import format_sharding_table, param_shardings, sharding_table
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.text import three_digits
from plasticity_jax.train.held_out import HeldOutBlocks, first_blocks, held_out_loss
from plasticity_jax.train.initial import params_sha256
from plasticity_jax.train.loop import LoopSettings, Track, train, utilization
from plasticity_jax.train.optimizer import OptimizerSettings, Params, Schedule, decay_table, timescale_steps, warmup_steps
from plasticity_jax.train.restore import param_norms, starting_state
from plasticity_jax.train.step import StepSettings, compile_train_step, execution_of, hyper_parameters, stack

log = logging.getLogger("plasticity_jax")


def step_settings(config: StudyConfig, mesh: Mesh) -> StepSettings:
    """The settings of a config's compiled step, which do not include λ."""
    train_config = config.train
    schedule = Schedule(train_config.schedule, final_fraction=train_config.final_lr_fraction, decay_fraction=train_config.decay_fraction)
    optimizer = OptimizerSettings.of(train_config, schedule=schedule, decay_kind=config.decay.kind, decay_mask=config.decay.mask)
    return StepSettings(
        config.model,
        optimizer,
        train_config.compute_dtype,
        z_loss=train_config.z_loss,
        isolate_documents=config.data.isolate_documents,
        execution=execution_of(
            train_config,
            config.model,
            mesh,
            batch_size=train_config.batch_size,
            seq_len=train_config.seq_len,
            grad_accum_steps=train_config.grad_accum_steps,
        ),
    )


@dataclass
class MemberRun:
    """One member of the grid to pretrain.

    Attributes:
      name: of its run.
      path: directory of its run, for checkpoints and the metrics log.
      config: the member's own.
      weight_decay: λ.
      provenance: what its result rests on is added here.
    """

    name: str
    path: AnyPath
    config: StudyConfig
    weight_decay: float
    provenance: dict[str, Any]


def pretrain(members: Sequence[MemberRun], *, seed: int, corpus: AnyPath, init: AnyPath) -> list[dict[str, Any]]:
    """Trains members of one seed from their common step-0 parameters, on the same batches in the same order.

    A single member is the reference. Several are trained as one program, the step vmapped over a member axis; the results agree to rounding.
    Resumes at the last checkpoint (of several members: at the last one that all of them have).

    Args:
      members: equal but for their weight decay and, in their configs, `train.peak_lr` and `train.warmup_fraction`.
      seed: of the order of the batches.
      corpus, init: directories of the finished prepare and init runs.
    Returns:
      Per member, on the first process (empty on the others): diverged (None or the reason), steps, tokens, seconds (of training), tokens_per_second, mfu (model FLOPs
      utilization; None on devices of unknown peak), parameters, weight_decay, peak_lr,
      lr_times_decay, timescale_steps and timescale_share (None without decay), decay_table, compute_dtype, train_loss (mean over the last 20
      steps, nats per token), held_out (see `held_out.held_out_loss`; None if diverged), norms (L2 norm of every parameter; empty if diverged).
    """
    config, vmapped = members[0].config, len(members) > 1
    mesh = make_mesh(config.mesh)
    log.info("mesh of %d devices: %s", mesh.size, ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    padded = padded_batch_size(mesh, config.train.batch_size, config.train.grad_accum_steps, "train")
    check_members(mesh, len(members))
    settings = step_settings(config, mesh)
    tokenizer = Tokenizer.load(corpus)
    records, held_out_records = TokenRecords(corpus / "tokens", "train"), TokenRecords(corpus / "tokens", "held_out")
    initial = _initial_params(config, init, mesh)
    step_0_sha256 = params_sha256(initial)
    for member in members:
        if processes.primary():
            copy_tokenizer(corpus, member.path)
        _record_provenance(member, initial, step_0_sha256, records, mesh)

    isolate = tokenizer.eos_id if config.data.isolate_documents else None
    execution = settings.execution
    forward = Forward(settings.compute_dtype, execution.attention, execution.scan_layers, mesh if mesh.size > 1 else None)
    shardings = param_shardings(mesh, abstract_params(config.model))

    def score(params: Params, blocks: HeldOutBlocks) -> dict[str, Any]:
        return held_out_loss(
            forward,
            config.model,
            arrays.put(params, shardings),
            blocks,
            token_bytes=tokenizer.token_bytes,
            batch_size=config.train.batch_size // config.train.grad_accum_steps,  # what fits one part of a training batch fits here
            isolate=isolate,
            loss_chunks=config.train.loss_chunks,
        )

    loop = _loop_settings(config, mesh)
    curve_blocks = first_blocks(held_out_records, tokens_per_domain=config.train.eval_tokens)
    tracks = [Track(member.path) for member in members]
    final: dict[int, Params] = {}
    if not all(track.diverged for track in tracks):
        # A member that has diverged stays in the program, whose size decides how the others are rounded.
        paths = [None if track.diverged else track.directory for track in tracks]
        state, start = starting_state(settings, mesh, [initial] * len(members), paths, steps=config.train.steps, members=vmapped)
        if start:
            log.info("resumes at step %d of %d", start, config.train.steps)
        hypers = [_hyper(member) for member in members]
        rows = local_rows(mesh, padded) if processes.count() > 1 else None
        state = train(
            "pretrain " + ", ".join(member.name for member in members),
            state,
            train_step=compile_train_step(settings, mesh, members=vmapped),
            hyper=stack(hypers) if vmapped else hypers[0],
            batches=global_batches(
                batches(
                    records,
                    seed=seed,
                    batch_size=config.train.batch_size,
                    start_step=start,
                    steps=config.train.steps - start,
                    isolate=isolate,
                    rows=None if rows is None else rows[rows < config.train.batch_size],
                ),
                mesh,
                rows,
                padded,
            ),
            tracks=tracks,
            members=vmapped,
            settings=loop,
            held_out=lambda params: score(params, curve_blocks),
        )
        params = state["params"]
        final = {i: jax.tree.map(lambda x: x[i], params) if vmapped else params for i, track in enumerate(tracks) if not track.diverged}
    blocks = first_blocks(held_out_records, tokens_per_domain=config.train.held_out_tokens)
    results = []
    for i, (member, track) in enumerate(zip(members, tracks, strict=True)):
        held_out = None if track.diverged else score(final[i], blocks)
        if held_out and blocks.domains and not math.isfinite(held_out["loss"]):  # the last update is seen by no training loss
            track.stop(f"held-out loss {held_out['loss']} after the last step")
        norms = {} if track.diverged else param_norms(final[i])
        if processes.primary():  # only its results are kept, and only it has the log at hand
            results.append(_facts(member, track, loop) | {"held_out": None if track.diverged else held_out, "norms": norms})
        else:
            results.append({})
    return results


def _initial_params(config: StudyConfig, init: AnyPath, mesh: Mesh) -> Params:
    abstract = abstract_params(config.model)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, param_shardings(mesh, abstract))
    with Checkpoints(init / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.restore_params(0, placed)


def _hyper(member: MemberRun) -> dict[str, Any]:
    train_config = member.config.train
    return hyper_parameters(
        weight_decay=member.weight_decay,
        peak_lr=train_config.peak_lr,
        warmup=warmup_steps(train_config.steps, train_config.warmup_fraction),
        total=train_config.steps,
    )


def _loop_settings(config: StudyConfig, mesh: Mesh) -> LoopSettings:
    train_config, known = config.train, hardware.of_kind(mesh.devices.flat[0].device_kind)
    peak = known and known.peak_flops * mesh.size / flops_per_token(config.model, train_config.seq_len)
    return LoopSettings(
        steps=train_config.steps,
        log_every=train_config.log_every,
        checkpoint_every=train_config.checkpoint_every,
        eval_every=train_config.eval_every,
        max_loss=train_config.max_loss,
        total_tokens=train_config.steps * train_config.batch_size * train_config.seq_len,
        tracker=config.launch.tracker,
        keep_steps=train_config.kept_steps,
        profile_steps=train_config.profile_steps,
        peak_tokens_per_second=peak,
    )


def _record_provenance(member: MemberRun, initial: Params, step_0_sha256: str, records: TokenRecords, mesh: Mesh) -> None:
    """Says once what this member's decay means, and stores what its result rests on."""
    config, weight_decay = member.config, member.weight_decay
    table = decay_table(initial, config.decay.mask)
    timescale = timescale_steps(weight_decay, config.train.peak_lr, config.decay.kind)
    meaning = "no decay" if timescale is None else f"timescale {timescale:,.1f} steps = {three_digits(timescale / config.train.steps)} of the run"
    log.info("%s: λ = %.6g, peak lr·λ = %.4g (%s), %s", member.name, weight_decay, config.train.peak_lr * weight_decay, config.decay.kind, meaning)
    log.info("decayed: %s", ", ".join(path for path, decayed in table.items() if decayed) or "none")
    log.info("not decayed: %s", ", ".join(path for path, decayed in table.items() if not decayed) or "none")
    placed = sharding_table(mesh, initial)
    if mesh.size > 1:
        for line in format_sharding_table(placed):
            log.info("%s", line)
    member.provenance |= {
        "decay_table": table,
        "sharding_table": placed,
        "step_0_sha256": step_0_sha256,
        "data_fingerprint": records.fingerprint,
        "mesh": dict(mesh.shape),
        "device_kind": mesh.devices.flat[0].device_kind,
    }


def _facts(member: MemberRun, track: Track, loop: LoopSettings) -> dict[str, Any]:
    config, weight_decay = member.config, member.weight_decay
    timescale = timescale_steps(weight_decay, config.train.peak_lr, config.decay.kind)
    last = track.rows()[-1]
    return {
        "diverged": track.diverged,
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"] if last["seconds"] else None,
        "mfu": utilization(track, loop),
        "parameters": count_params(config.model),
        "weight_decay": weight_decay,
        "peak_lr": config.train.peak_lr,
        "lr_times_decay": config.train.peak_lr * weight_decay,
        "timescale_steps": timescale,
        "timescale_share": None if timescale is None else timescale / config.train.steps,
        "decay_table": member.provenance["decay_table"],
        "compute_dtype": config.train.compute_dtype,
        "train_loss": track.train_loss(),
    }
