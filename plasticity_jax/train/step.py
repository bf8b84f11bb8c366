"""The training step, one pure function of any objective, and its compiled forms: for one model, and for the members of a grid as one program."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from plasticity_jax.config import ModelConfig, TrainConfig
from plasticity_jax.model import cpu
from plasticity_jax.model.loss import LOGIT_BYTES, chunks_that_fit, masked_sum, vocabulary_losses
from plasticity_jax.model.transformer import abstract_params, hidden_states, output_kernel
from plasticity_jax.parallel.batches import row_shards
from plasticity_jax.parallel.sharding import ROWS, batch_sharding, constrain, gather, param_shardings
from plasticity_jax.train.optimizer import OptimizerSettings, Params, make_optimizer, schedule_shape

State = dict[str, Any]  # "params", "optimizer" (optax state), "step" (updates done)
Batch = dict[str, Any]  # arrays of B rows; of the next token: tokens, targets, loss_mask, segment_ids, positions, each [B, T]
Hyper = dict[str, Any]  # see hyper_parameters
Metrics = dict[str, Any]  # loss (nats per token, or whatever the objective counts), tokens, lr, grad_norm, param_norm; with a z-loss, z_loss
Sums = dict[str, Array]  # sums over a batch: "loss" (nats), "count" (what it is divided by), "tokens"; others are divided by the count and logged

CHUNKS_SUMMED_IN_COMPUTE_DTYPE = 8  # of the loss: of more, the output matrix' gradient is summed in its own dtype, which takes more memory

log = logging.getLogger("plasticity_jax")


@dataclass(frozen=True)
class Execution:
    """Settings that change speed, memory and rounding only.

    Attributes:
      grad_accum_steps: gradient accumulation steps per batch; divides its rows, padding included (`batches.padded_batch_size`).
      scan_layers: scan over layers instead of unrolling them.
      remat: what the backward pass recomputes; see `transformer.hidden_states`.
      attention: "xla" or a kernel.
      loss_chunks: parts of a sequence, of which one at a time has logits; see `loss.vocabulary_losses`.
    """

    grad_accum_steps: int
    scan_layers: bool
    remat: str
    attention: str
    loss_chunks: int


@dataclass(frozen=True)
class Objective:
    """What is learned.

    Attributes:
      loss_sum: (settings, mesh, params, batch) → what the gradient is taken of, in nats, a sum over the batch; and the batch's sums.
      abstract_params: shapes of the parameters, for the model's config.
      shardings: (mesh, config) → where the parameters are stored.
    """

    loss_sum: "Callable[[StepSettings, Mesh | None, Params, Batch], tuple[Float[Array, ''], Sums]]"
    abstract_params: Callable[[ModelConfig], Params]
    shardings: Callable[[Mesh, ModelConfig], Params]


def next_token_losses(settings: "StepSettings", mesh: Mesh | None, params: Params, batch: Batch) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Loss in nats and log-normalizer of every target of the batch, masked ones included."""
    x_BxTxD, kernel_DxV = _states_and_kernel(settings, mesh, params, batch)
    dtype, chunks = jnp.dtype(settings.compute_dtype), settings.execution.loss_chunks
    return vocabulary_losses(x_BxTxD, kernel_DxV, batch["targets"], compute_dtype=dtype, chunks=chunks, mesh=mesh)


def _states_and_kernel(
    settings: "StepSettings", mesh: Mesh | None, params: Params, batch: Batch
) -> tuple[Float[Array, "b t d"], Float[Array, "d v"]]:
    execution, dtype = settings.execution, jnp.dtype(settings.compute_dtype)
    x_BxTxD, _ = hidden_states(
        settings.model,
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"] if settings.isolate_documents else None,
        positions=batch["positions"],
        compute_dtype=dtype,
        scan_layers=execution.scan_layers,
        remat=execution.remat,
        attention=execution.attention,
        mesh=mesh,
    )
    name = "embed" if settings.model.tie_embeddings else "head"
    many = execution.loss_chunks > CHUNKS_SUMMED_IN_COMPUTE_DTYPE
    return x_BxTxD, output_kernel(settings.model, gather(mesh, {name: params[name]}, dtype, sums=many))


def _next_token_loss(settings: "StepSettings", mesh: Mesh | None, params: Params, batch: Batch) -> tuple[Float[Array, ""], Sums]:
    if cpu.one_cpu(mesh):
        x_BxTxD, kernel_DxV = _states_and_kernel(settings, mesh, params, batch)
        mask_BxT, chunks = batch["loss_mask"].astype(jnp.float32), math.gcd(settings.execution.loss_chunks, x_BxTxD.shape[1])
        kernel_DxV, tokens = kernel_DxV.astype(x_BxTxD.dtype), jnp.sum(mask_BxT)
        total, loss, z_loss = cpu.summed_losses(x_BxTxD, kernel_DxV, batch["targets"], mask_BxT, z_loss=settings.z_loss, chunks=chunks)
    else:
        losses_BxT, log_sums_BxT = next_token_losses(settings, mesh, params, batch)
        loss, tokens = masked_sum(losses_BxT, batch["loss_mask"])
        z_loss = settings.z_loss * masked_sum(jnp.square(log_sums_BxT), batch["loss_mask"])[0]
        total = loss + z_loss if settings.z_loss else loss  # the compiler takes out what is not used
    sums = {"loss": loss, "count": tokens, "tokens": tokens}
    return total, sums | {"z_loss": z_loss} if settings.z_loss else sums


NEXT_TOKEN = Objective(_next_token_loss, abstract_params, lambda mesh, config: param_shardings(mesh, abstract_params(config)))


@dataclass(frozen=True)
class StepSettings:
    """Everything that a compiled step depends on besides shapes and mesh; equal settings share one compilation.

    Attributes:
      compute_dtype: dtype of the matmuls, "float32" or "bfloat16"; parameters and loss stay in float32.
      z_loss: weight of the squared log of the softmax's normalizer.
      isolate_documents: attention stays within the batch's segments.
      objective: what is learned.
    """

    model: ModelConfig
    optimizer: OptimizerSettings
    compute_dtype: str
    z_loss: float
    isolate_documents: bool
    execution: Execution
    objective: Objective = NEXT_TOKEN


def execution_of(train: TrainConfig, model: ModelConfig, mesh: Mesh, *, batch_size: int, seq_len: int, grad_accum_steps: int) -> Execution:
    """The execution settings of a config on this mesh, with `train.attention` and `train.loss_chunks` resolved.

    Args:
      batch_size, seq_len, grad_accum_steps: of the longest batches to train on.
    Raises:
      UserError: the requested kernel cannot run there.
    """
    kernel = _kernel(train.attention, mesh.devices.flat[0].platform, model.head_dim, train.compute_dtype, train.seq_len)
    rows = -(-batch_size // (grad_accum_steps * row_shards(mesh)))
    vocab_size = -(-model.vocab_size // mesh.shape["tensor"])
    logit_bytes = cpu.logit_bytes(vocab_size) if cpu.one_cpu(mesh) else LOGIT_BYTES
    chunks = chunks_that_fit(train.loss_chunks, rows=rows, seq_len=seq_len, vocab_size=vocab_size, logit_bytes=logit_bytes)
    return Execution(grad_accum_steps, train.scan_layers, train.remat, kernel, chunks)


@functools.lru_cache(maxsize=32)
def _kernel(name: str, platform: str, head_dim: int, compute_dtype: str, seq_len: int) -> str:
    from plasticity_jax.model.kernels import choose_kernel

    kernel = choose_kernel(name, platform=platform, head_dim=head_dim, compute_dtype=compute_dtype, seq_len=seq_len)
    if name == "auto":  # logged once per process, because of the cache
        log.info("train.attention auto → %s on %s", kernel, platform)
    return kernel


def hyper_parameters(*, weight_decay: float, peak_lr: float, warmup: int, total: int) -> Hyper:
    """The traced hyperparameters of a run: scalars of the default float dtype (float32), so that one compiled program serves all values.

    Args:
      weight_decay: λ.
      peak_lr: peak learning rate.
      warmup, total: steps of the warmup and of the run.
    """
    values = {"weight_decay": weight_decay, "peak_lr": peak_lr, "warmup_steps": warmup, "total_steps": total}
    return {name: jnp.asarray(value, float) for name, value in values.items()}


def initial_state(settings: StepSettings, params: Params) -> State:
    """The state before the first update."""
    return {"params": params, "optimizer": make_optimizer(settings.optimizer).init(params), "step": jnp.zeros([], jnp.int32)}


def make_train_step(settings: StepSettings, mesh: Mesh | None = None) -> Callable[[State, Batch, Hyper], tuple[State, Metrics]]:
    """The pure function `train_step(state, batch, hyper) -> (state, metrics)`.

    The loss is a sum over the batch, divided once by what the objective counts (targets that are not masked), so padding and gradient accumulation
    change only rounding.

    Args:
      mesh: where the arrays are sharded; None for one device.
    """
    optimizer = make_optimizer(settings.optimizer)
    grad_accum_steps = settings.execution.grad_accum_steps
    loss_sum = functools.partial(settings.objective.loss_sum, settings, mesh)

    def gradient_and_sums(params: Params, batch: Batch):
        gradient = jax.grad(loss_sum, has_aux=True)
        if grad_accum_steps == 1:
            return gradient(params, batch)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, gradient(params, part)), None

        # Part i takes row i of every `grad_accum_steps` rows, so that rows stay on their device.
        parts = jax.tree.map(lambda x: constrain(mesh, x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), None, ROWS), batch)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts)))
        return jax.lax.scan(add, zero, parts)[0]

    def train_step(state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
        params = state["params"]
        gradient, sums = gradient_and_sums(params, batch)
        count = jnp.maximum(sums["count"], 1.0)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], params, hyper=hyper)
        shape = schedule_shape(state["step"], warmup=hyper["warmup_steps"], total=hyper["total_steps"], schedule=settings.optimizer.schedule)
        metrics = {name: value / count for name, value in sums.items() if name not in ("count", "tokens")} | {
            "tokens": sums["tokens"],
            "lr": hyper["peak_lr"] * shape,
            "grad_norm": optax.tree.norm(gradient),
            "param_norm": optax.tree.norm(params),
        }
        return {"params": optax.apply_updates(params, updates), "optimizer": optimizer_state, "step": state["step"] + 1}, metrics

    return train_step


# ---------------------------------------------------------------------------------------------------------------------- compiled forms


def stack(trees: Sequence[Any]) -> Any:
    """Stacks the members' trees along a leading member axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def state_shardings(settings: StepSettings, mesh: Mesh, *, members: bool) -> State:
    """Shardings of the state; with `members`, every array has a leading axis over the mesh's member axis."""
    abstract = settings.objective.abstract_params(settings.model)
    # The rules check the shapes of one member, before the member axis is added.
    params = settings.objective.shardings(mesh, settings.model)
    if members:
        params = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec("member", *s.spec)), params)
    single = NamedSharding(mesh, PartitionSpec("member") if members else PartitionSpec())
    optimizer = make_optimizer(settings.optimizer)
    moments = optax.tree.map_params(
        optimizer, lambda _, s: s, jax.eval_shape(optimizer.init, abstract), params, transform_non_params=lambda _: single
    )
    return {"params": params, "optimizer": moments, "step": single}


@functools.lru_cache(maxsize=32)
def compile_train_step(settings: StepSettings, mesh: Mesh, *, members: bool) -> Callable[[State, Batch, Hyper], tuple[State, Metrics]]:
    """The jitted step, which donates the old state. Equal arguments give the same function.

    With `members`, state, hyperparameters and metrics have a leading member axis; all members share the batch.
    """
    step = make_train_step(settings, mesh)
    if members:
        step = jax.vmap(step, in_axes=(0, None, 0), spmd_axis_name="member")
    state = state_shardings(settings, mesh, members=members)
    scalars = NamedSharding(mesh, PartitionSpec("member") if members else PartitionSpec())
    options = cpu.compiler_options(mesh, settings.compute_dtype)
    shardings = {"in_shardings": (state, batch_sharding(mesh), scalars), "out_shardings": (state, scalars)}
    return jax.jit(step, donate_argnums=0, compiler_options=options, **shardings)


def lower_train_step(settings: StepSettings, mesh: Mesh, batch: Batch, *, members: int) -> Any:
    """The step of a model, or of `members` models as one program, lowered for the mesh's devices and a batch of `jax.ShapeDtypeStruct`."""
    state, batch, hyper = abstract_arguments(settings, batch)
    if members > 1:
        state, hyper = jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype), (state, hyper))
    return compile_train_step(settings, mesh, members=members > 1).lower(state, batch, hyper)


def state_bytes(settings: StepSettings, mesh: Mesh, *, members: int) -> dict[str, int]:
    """Bytes per device of the "params" and of the "optimizer" state of `members` models that are trained as one program."""
    state, shardings = abstract_arguments(settings, {})[0], state_shardings(settings, mesh, members=members > 1)

    def bytes_of(leaf: Any, sharding: NamedSharding) -> int:
        shape = (members, *leaf.shape) if members > 1 else leaf.shape
        return math.prod(sharding.shard_shape(shape)) * leaf.dtype.itemsize

    return {name: sum(map(bytes_of, jax.tree.leaves(state[name]), jax.tree.leaves(shardings[name]))) for name in ("params", "optimizer")}


def abstract_arguments(settings: StepSettings, batch: Batch) -> tuple[State, Batch, Hyper]:
    """Shapes of the arguments of a compiled step for one model, for a batch of `jax.ShapeDtypeStruct`."""
    params = settings.objective.abstract_params(settings.model)
    state = jax.eval_shape(functools.partial(initial_state, settings), params)
    hyper = jax.eval_shape(lambda: hyper_parameters(weight_decay=0.0, peak_lr=0.0, warmup=1, total=1))
    return state, batch, hyper


def next_token_batch(rows: int, seq_len: int) -> Batch:
    """Shapes of a batch [rows, seq_len] of next tokens."""
    types = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32, "segment_ids": jnp.int32, "positions": jnp.int32}
    return {name: jax.ShapeDtypeStruct((rows, seq_len), dtype) for name, dtype in types.items()}
