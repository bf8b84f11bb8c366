"""The training step, one pure function, and its compiled forms: for one model, and for the members of a grid as one program."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.loss import cross_entropy, token_losses
from plasticity_jax.model.transformer import abstract_params, apply
from plasticity_jax.parallel.sharding import batch_sharding, param_shardings
from plasticity_jax.train.optimizer import OptimizerSettings, Params, make_optimizer, schedule_shape

State = dict[str, Any]  # "params", "optimizer" (optax state), "step" (updates done)
Batch = dict[str, Any]  # tokens, targets, loss_mask, segment_ids, positions: [B, T]
Hyper = dict[str, Any]  # see hyper_parameters
Metrics = dict[str, Any]  # loss (nats per token), tokens, lr, grad_norm, param_norm


@dataclass(frozen=True)
class StepSettings:
    """All that a compiled step depends on besides shapes and mesh; equal settings share one compilation.

    Attributes:
      compute_dtype: "float32" or "bfloat16", of the products; parameters and loss stay in float32.
      microbatches: parts a batch is worked through in; divides the batch size. Changes memory and rounding only.
      scan_layers: a loop over layers instead of unrolled ones; changes compile time and speed only.
    """

    model: ModelConfig
    optimizer: OptimizerSettings
    compute_dtype: str
    microbatches: int
    scan_layers: bool


def hyper_parameters(*, weight_decay: float, peak_lr: float, warmup: int, total: int) -> Hyper:
    """The traced numbers of a run: float32 scalars, so that another value needs no other program.

    Args:
      weight_decay: λ.
      peak_lr: peak of the learning rate.
      warmup, total: steps of the warm-up and of the run.
    """
    values = {"weight_decay": weight_decay, "peak_lr": peak_lr, "warmup_steps": warmup, "total_steps": total}
    return {name: jnp.float32(value) for name, value in values.items()}


def initial_state(settings: StepSettings, params: Params) -> State:
    """The state before the first update."""
    return {"params": params, "optimizer": make_optimizer(settings.optimizer).init(params), "step": jnp.zeros([], jnp.int32)}


def make_train_step(settings: StepSettings) -> Callable[[State, Batch, Hyper], tuple[State, Metrics]]:
    """The pure function `train_step(state, batch, hyper) -> (state, metrics)`.

    The loss is a sum over the targets that count, divided once by their number, so padding and microbatches change nothing but rounding.
    """
    optimizer = make_optimizer(settings.optimizer)

    def loss_sum(params: Params, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return cross_entropy(_logits(settings, params, batch), batch["targets"], batch["loss_mask"])

    def sums_and_gradient(params: Params, batch: Batch):
        if settings.microbatches == 1:
            return jax.value_and_grad(loss_sum, has_aux=True)(params, batch)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_sum, has_aux=True)(params, part)), None

        parts = jax.tree.map(lambda x: x.reshape(settings.microbatches, -1, *x.shape[1:]), batch)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(jax.value_and_grad(loss_sum, has_aux=True), params, jax.tree.map(lambda x: x[0], parts)))
        return jax.lax.scan(add, zero, parts)[0]

    def train_step(state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
        params = state["params"]
        (total, tokens), gradient = sums_and_gradient(params, batch)
        count = jnp.maximum(tokens, 1.0)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], params, hyper=hyper)
        shape = schedule_shape(
            state["step"], warmup=hyper["warmup_steps"], total=hyper["total_steps"], final_share=settings.optimizer.final_lr_share
        )
        metrics = {
            "loss": total / count,
            "tokens": tokens,
            "lr": hyper["peak_lr"] * shape,
            "grad_norm": optax.tree.norm(gradient),
            "param_norm": optax.tree.norm(params),
        }
        return {"params": optax.apply_updates(params, updates), "optimizer": optimizer_state, "step": state["step"] + 1}, metrics

    return train_step


def _logits(settings: StepSettings, params: Params, batch: Batch) -> Float[Array, "b t vocab"]:
    logits, _ = apply(
        settings.model,
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        compute_dtype=jnp.dtype(settings.compute_dtype),
        scan_layers=settings.scan_layers,
    )
    return logits


# ---------------------------------------------------------------------------------------------------------------------- compiled forms


def stack(trees: Sequence[Any]) -> Any:
    """Trees of the members → one tree with a leading member axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def state_shardings(settings: StepSettings, mesh: Mesh, *, members: bool) -> State:
    """Where each array of the state lies on the mesh; with `members`, each has a leading axis on the mesh's member axis."""
    abstract = abstract_params(settings.model)
    # Shapes here are those of one member: the rules check them before the member axis is put in front.
    params = param_shardings(mesh, abstract)
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
    """The step under jit, with the old state's memory given to the new one. Equal arguments give the same function.

    With `members`, state, hyper-parameters and metrics have a leading member axis; the batch is one, seen by all.
    """
    step = make_train_step(settings)
    if members:
        step = jax.vmap(step, in_axes=(0, None, 0), spmd_axis_name="member")
    state = state_shardings(settings, mesh, members=members)
    numbers = NamedSharding(mesh, PartitionSpec("member") if members else PartitionSpec())
    return jax.jit(step, in_shardings=(state, batch_sharding(mesh), numbers), out_shardings=(state, numbers), donate_argnums=0)


@functools.lru_cache(maxsize=32)
def compile_eval_step(model: ModelConfig, compute_dtype: str, mesh: Mesh) -> Callable[[Params, Batch], Float[Array, "b t"]]:
    """`eval_step(params, batch)` → nats of every target [B, T], 0 where the loss mask is 0. For one model, also in a grid."""

    def eval_step(params: Params, batch: Batch) -> Float[Array, "b t"]:
        logits, _ = apply(
            model,
            params,
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            compute_dtype=jnp.dtype(compute_dtype),
        )
        return token_losses(logits, batch["targets"]) * batch["loss_mask"]

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(eval_step, in_shardings=(param_shardings(mesh, abstract_params(model)), batch_sharding(mesh)), out_shardings=everywhere)
