"""Where a run resumes: the last step that every model of a program has saved, and its state."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plasticity_jax.model.checkpoint import Checkpoints, delete_step, finished_steps
from plasticity_jax.parallel import arrays, processes
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.optimizer import Params
from plasticity_jax.train.step import State, StepSettings, initial_state, stack, state_shardings


def common_step(runs: Sequence[AnyPath]) -> int:
    """The last step for which all runs have a complete checkpoint; 0 if there is none."""
    return max(set.intersection(*(finished_steps(run / CHECKPOINTS) for run in runs)), default=0)


def starting_state(
    settings: StepSettings, mesh: Mesh, initials: Sequence[Params], runs: Sequence[AnyPath], *, steps: int, members: bool
) -> tuple[State, int]:
    """The state from which training continues, on the mesh: the runs' last common checkpoint, or the step-0 parameters.

    Later checkpoints are deleted, because they will be written again.

    Args:
      initials: step-0 parameters of each run; copied.
      steps: of the whole training. After the last, the optimizer's state is not read, because a run that is nearly done has dropped it.
      members: give the state a leading member axis, in the order of `runs`.
    Returns:
      (state, its step).
    Raises:
      UserError: a damaged checkpoint.
    """
    step = processes.broadcast(lambda: _prepare_step(runs))
    states = [_state_at(settings, mesh, initial, run, step, last=step == steps) for initial, run in zip(initials, runs, strict=True)]
    state = stack(states) if members else states[0]
    # Always a copy: the first update donates its state, and the step-0 parameters are still needed.
    return arrays.copied(state, state_shardings(settings, mesh, members=members)), step


def _prepare_step(runs: Sequence[AnyPath]) -> int:
    step = common_step(runs)
    for run in runs:
        for later in finished_steps(run / CHECKPOINTS):
            if later > step:
                delete_step(run / CHECKPOINTS, later)
    return step


def param_norms(params: Params) -> dict[str, float]:
    """L2 norm of every parameter, all layers together: path → norm."""
    squares = arrays.to_host(_row_squares(params))
    return {path: _total(leaf) ** 0.5 for path, leaf in zip(param_paths(params), jax.tree.leaves(squares), strict=True)}


def relative_update(before: Params, after: Params) -> float:
    """‖after − before‖ / ‖before‖ over all parameters together. Both lie in the same shardings."""
    change, size = arrays.to_host((_row_squares(after, before), _row_squares(before)))
    return (sum(map(_total, jax.tree.leaves(change))) / sum(map(_total, jax.tree.leaves(size)))) ** 0.5


@jax.jit
def _row_squares(tree: Params, less: Params | None = None) -> Params:
    """Sum of squares over the last axis, where the arrays lie; the rest is small enough to be summed in float64."""
    tree = tree if less is None else jax.tree.map(jnp.subtract, tree, less)
    return jax.tree.map(lambda x: jnp.sum(jnp.square(x), axis=-1), tree)


def _total(squares: np.ndarray) -> float:
    return float(squares.sum(dtype=np.float64))


def _state_at(settings: StepSettings, mesh: Mesh, initial: Params, run: AnyPath, step: int, *, last: bool) -> State:
    if step == 0:
        return _compiled_start(settings)(initial)
    abstract = _abstract_state(settings, mesh)
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        if last:
            params = checkpoints.restore_params(step, abstract["params"])
            optimizer = _compiled_start(settings)(params)["optimizer"]
        else:
            params, optimizer = checkpoints.restore(step, abstract["params"], abstract["optimizer"])
    counter = jax.device_put(jnp.int32(step), NamedSharding(mesh, PartitionSpec()))
    return {"params": params, "optimizer": optimizer, "step": counter}


@functools.lru_cache(maxsize=8)
def _compiled_start(settings: StepSettings):
    return jax.jit(functools.partial(initial_state, settings))


def _abstract_state(settings: StepSettings, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(functools.partial(initial_state, settings), settings.objective.abstract_params(settings.model))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(settings, mesh, members=False))
