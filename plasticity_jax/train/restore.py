"""Where a run resumes: the last step that every model of a program has saved and logged, and its state."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints, Damaged, delete_step, finished_steps, remove_leftovers, set_aside
from plasticity_jax.parallel import arrays, processes
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.directory import CHECKPOINTS, add_warning
from plasticity_jax.runs.logs import METRICS, read_whole_rows
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.loop import TAIL_STEPS
from plasticity_jax.train.optimizer import Params
from plasticity_jax.train.step import State, StepSettings, initial_state, stack, state_shardings


def common_step(runs: Sequence[AnyPath]) -> int:
    """The last step for which all runs have a complete checkpoint; 0 if there is none."""
    return max(_common_steps(runs), default=0)


def _common_steps(runs: Sequence[AnyPath]) -> set[int]:
    return set.intersection(*(finished_steps(run / CHECKPOINTS) for run in runs))


def starting_state(
    settings: StepSettings,
    mesh: Mesh,
    initials: Sequence[Params],
    runs: Sequence[AnyPath | None],
    *,
    steps: int,
    members: bool,
) -> tuple[State, int]:
    """The state from which training continues, on the mesh: the runs' last common checkpoint that is whole, or the step-0 parameters.

    A checkpoint that cannot be read, or whose step the log does not hold, is set aside, and the one before it taken: with a warning that stays with the
    run. Later checkpoints are deleted, because they will be written again.

    Args:
      initials: step-0 parameters of each run; copied.
      runs: their directories; None for a member that has ended and only keeps its place in the program.
      steps: of the whole training. After the last, the optimizer's state is not read, because a run that is nearly done has dropped it.
      members: give the state a leading member axis, in the order of `runs`.
    Returns:
      (state, its step).
    Raises:
      UserError: there are checkpoints, and none from which all runs can go on.
    """
    going = [run for run in runs if run is not None]
    processes.broadcast(lambda: _tidy(going))
    while True:
        step = processes.broadcast(lambda: _next_step(going, steps))
        states, damage = [], None
        for number, (initial, run) in enumerate(zip(initials, runs, strict=True)):
            try:
                states.append(_state_at(settings, mesh, initial, run, step, last=step == steps))
            except Damaged as error:
                damage = number, error.what
                break
        found = next((one for one in processes.gather("checkpoint", damage) if one), None)
        if found is None:
            break
        why, damaged = found[1], runs[found[0]]
        assert damaged is not None, "nothing is read for a member that has ended"
        processes.broadcast(lambda: _pass_over(going, damaged, step, why))
    state = stack(states) if members else states[0]
    # Always a copy: the first update donates its state, and the step-0 parameters are still needed.
    return arrays.copied(state, state_shardings(settings, mesh, members=members)), step


def _tidy(runs: Sequence[AnyPath]) -> None:
    for run in runs:
        remove_leftovers(run / CHECKPOINTS)


def _next_step(runs: Sequence[AnyPath], steps: int) -> int:
    """The last common step up to which every run's log is whole, without those that come after it."""
    step, passed_over = 0, []
    for step in sorted(_common_steps(runs), reverse=True):
        without = next((run for run in runs if step not in _logged_steps(run, steps)), None)
        if without is None:
            break
        passed_over.append((without, step, f"{without / METRICS} does not hold its rows from step 1 to step {step}, at which a checkpoint lies"))
    else:
        if passed_over:  # nothing is set aside, so that all is there once the file is back
            without, _, why = passed_over[-1]
            raise _nothing_before(without, why)
    for without, at, why in passed_over:
        _pass_over(runs, without, at, why)
    for run in runs:
        for later in finished_steps(run / CHECKPOINTS):
            if later > step:
                delete_step(run / CHECKPOINTS, later)
    return step


def _logged_steps(run: AnyPath, steps: int) -> set[int]:
    """The steps of a run's log, up to the first line that is damaged, or that comes after a step which is always logged and is not there."""
    logged: list[int] = []
    for row in read_whole_rows(run / METRICS):
        step, last = row.get("step"), logged[-1] if logged else 0
        if not isinstance(step, int) or step <= last or step > last + 1 and (last == 0 or step > steps - TAIL_STEPS + 1):
            break
        logged.append(step)
    return set(logged)


def _pass_over(runs: Sequence[AnyPath], run: AnyPath, step: int, why: str) -> None:
    """Sets a step of one of the runs aside. Raises UserError if no step is before it."""
    before = max((other for other in _common_steps(runs) if other < step), default=None)
    if before is None:
        raise _nothing_before(run, why)
    set_aside(run / CHECKPOINTS, step)
    add_warning(run, f"{why}; it went on from step {before}, and trained the steps after it again")


def _nothing_before(run: AnyPath, why: str) -> UserError:
    return UserError(f"{why}, and there is no checkpoint before it; put the file back, or delete {run} and run again, which makes it anew.")


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


def _state_at(settings: StepSettings, mesh: Mesh, initial: Params, run: AnyPath | None, step: int, *, last: bool) -> State:
    counter = jax.device_put(jnp.int32(step), NamedSharding(mesh, PartitionSpec()))
    if step == 0 or run is None:
        return _compiled_start(settings)(initial) | {"step": counter}
    abstract = _abstract_state(settings, mesh)
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        if last:
            params = checkpoints.restore_params(step, abstract["params"])
            optimizer = _compiled_start(settings)(params)["optimizer"]
        else:
            params, optimizer = checkpoints.restore(step, abstract["params"], abstract["optimizer"])
    return {"params": params, "optimizer": optimizer, "step": counter}


@functools.lru_cache(maxsize=8)
def _compiled_start(settings: StepSettings):
    return jax.jit(functools.partial(initial_state, settings))


def _abstract_state(settings: StepSettings, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(functools.partial(initial_state, settings), settings.objective.abstract_params(settings.model))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(settings, mesh, members=False))
