"""Checkpoints of a run: parameters, and the optimizer's state beside them, by step."""

import asyncio
import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import v1
from orbax.checkpoint._src.serialization import ocdbt_utils
from orbax.checkpoint._src.serialization import tensorstore_utils as ts_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from plasticity_jax.errors import UserError, reason
from plasticity_jax.parallel import lanes, processes
from plasticity_jax.runs.storage import AnyPath, check_checkpoint_place, is_local, location, remove_tree

# Bytes of an array that are compressed at once, and that are held before they go into a file, where memory is short.
_PIECE, _FILE = 4 << 20, 16 << 20
# On gs:// Orbax writes it last into a step's folder: a step without it is not whole.
COMMITTED = "commit_success.txt"
_BLOCK = 1 << 20  # elements summed at once
_saving = threading.Lock()  # Orbax counts the saves of a process, and takes no two threads that begin one at once
# What every step holds on a disk. One without them has been deleted in part.
_OF_A_STEP = ("_CHECKPOINT_METADATA", "params/_METADATA", "checksums/metadata")
_DAMAGED = ".damaged"  # ends the name of a step that was set aside
# What says that nothing is known of the files themselves: another try may read them.
_NO_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied", "Input/output error", "Too many open files")

# Orbax counts bytes for its own log at every save and load, by asking tensorstore (0.1.86) for metrics, which never frees what it answers: a megabyte
# for every tiny study.
ts_utils.get_tensorstore_raw_bytes = lambda *direction, **more: 0  # pyright: ignore[reportAttributeAccessIssue]


class Damaged(UserError):
    """A checkpoint whose files are no longer what was saved; `what` says so without the way out."""

    def __init__(self, what: str):
        super().__init__(f"{what}; delete the run's directory and run its stage again.")
        self.what = what


def finished_steps(directory: AnyPath) -> set[int]:
    """The steps below a directory that are whole, as far as their names tell; none where there is no such directory."""
    if not directory.is_dir():
        return set()
    # On a disk a save is renamed to its step's number when it is whole.
    needed = _OF_A_STEP if is_local(directory) else (COMMITTED,)
    return {int(path.name) for path in directory.iterdir() if path.name.isdigit() and all((path / name).is_file() for name in needed)}


def delete_step(directory: AnyPath, step: int) -> None:
    """Removes a step."""
    if not is_local(directory):
        (directory / str(step) / COMMITTED).unlink(missing_ok=True)
    remove_tree(directory / str(step))


def set_aside(directory: AnyPath, step: int) -> None:
    """Makes a step one of those that are not finished. On a disk its files stay until the training is over: who knows why they could not be read."""
    if not is_local(directory):
        delete_step(directory, step)
        return
    aside = directory / f"{step}{_DAMAGED}"
    remove_tree(aside)
    (directory / str(step)).rename(aside)


def remove_leftovers(directory: AnyPath) -> None:
    """Removes what killed saves and deletions have left behind on a disk. Only where no other process saves."""
    if not is_local(directory) or not directory.is_dir():
        return
    whole = finished_steps(directory)
    for path in directory.iterdir():
        if path.is_dir() and not path.name.endswith(_DAMAGED) and not (path.name.isdigit() and int(path.name) in whole):
            remove_tree(path)


def keep_last(directory: AnyPath, keep_steps: Sequence[int]) -> None:
    """Removes all steps but the last and those to keep, and those that were set aside: for a training that is over."""
    steps = finished_steps(directory)
    for step in steps - {max(steps, default=0), *keep_steps}:
        delete_step(directory, step)
    for aside in directory.glob(f"*{_DAMAGED}") if is_local(directory) else ():
        remove_tree(aside)


def drop_optimizer(directory: AnyPath) -> None:
    """Removes the optimizer's state of every step. Only for a run whose training is over: no other can resume without it."""
    for step in directory.iterdir() if directory.is_dir() else ():
        if step.name.isdigit():
            remove_tree(step / "optimizer")


class Checkpoints:
    """The steps saved under one directory, as `<directory>/<step>/{params,optimizer,checksums}`.

    A step is visible only once it is whole: a process killed in the middle of a save leaves the step before it as the latest.
    Args:
      directory: created if missing, unless `read_only`.
      keep: how many of the latest steps to keep.
      keep_steps: steps to keep besides.
      asynchronous: `save` returns once the arrays are copied off the device and writes in the background.
      read_only: only for reading; creates and deletes nothing.
      save_bytes: only for saving: one array after the other, in pieces, so that at most about this much memory is needed beside the arrays; more
        than the largest array has. None saves all at once.
      alone: of several processes, only this one saves; its arrays lie on its own devices. Otherwise all save the same at the same time.
    Raises:
      UserError: a store other than gs://.
    """

    def __init__(
        self,
        directory: AnyPath,
        *,
        keep: int = 1,
        keep_steps: Sequence[int] = (),
        asynchronous: bool = True,
        read_only: bool = False,
        save_bytes: int | None = None,
        alone: bool = False,
    ):
        self._place = location(directory)
        check_checkpoint_place(self._place)
        self.directory = self._place.absolute() if is_local(self._place) else epath.Path(str(self._place))
        absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax warns about what is meant, and prints a trace of every error that it also raises
        self._manager: ocp.CheckpointManager | None = None
        if read_only:
            return
        together = {} if jax.process_count() == 1 else {"multiprocessing_options": _processes(self._place, alone)}
        self._only_here = bool(together) and (alone or processes.count() == 1)
        self._lane = lanes.active() if together else None
        some = self._only_here or self._lane is not None
        if some:
            self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), CustomSteps(keep_steps)]),
            create=not some,
            enable_async_checkpointing=asynchronous,
            # Made in the background, a folder is awaited by the number of saves so far in the process: not the same on all processes where one has saved
            # by itself, and not fixed where lanes save at once.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=not together and lanes.active() is None),
            **together,
        )
        self._frugal = save_bytes is not None
        # Of the two handlers of the one format, the plainer has all the settings that memory depends on.
        handler = (
            functools.partial(ocp.PyTreeCheckpointHandler, save_concurrent_gb=save_bytes / 1e9)  # pyright: ignore[reportArgumentType]
            if save_bytes is not None
            else functools.partial(ocp.PyTreeCheckpointHandler, type_handler_registry=_registry(self._lane.ranks[0]))
            if self._lane is not None
            else ocp.StandardCheckpointHandler
        )
        handlers = {name: handler(**together) for name in ("params", "optimizer")} | {"checksums": ocp.JsonCheckpointHandler(**together)}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=tuple(handlers), item_handlers=handlers)

    def save(self, step: int, params: Any, optimizer: Any | None = None) -> None:
        """Saves both trees as `step`. The arrays may be donated or changed as soon as this returns."""
        trees = {"params": params} if optimizer is None else {"params": params, "optimizer": optimizer}
        sums = {name: checksums(tree) for name, tree in trees.items()}
        items = {name: self._save_args(tree) for name, tree in trees.items()}
        assert self._manager is not None, "opened for reading only"
        with _saving:
            self._manager.save(step, args=ocp.args.Composite(**items, checksums=ocp.args.JsonSave(sums)))

    def _save_args(self, tree: Any) -> Any:
        if not self._frugal:
            # Orbax takes no arrays of one process's own devices where there are several processes.
            save = ocp.args.StandardSave if self._lane is None else ocp.args.PyTreeSave
            return save(jax.tree.map(np.asarray, tree) if self._only_here else tree)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), tree)
        return ocp.args.PyTreeSave(tree, save_args=pieces, ocdbt_target_data_file_size=_FILE)

    def latest(self) -> int | None:
        """The largest step that is whole, or None."""
        return max(finished_steps(self._place), default=None)

    def latest_step(self) -> int:
        """The largest step that is whole. Raises UserError if there is none."""
        step = self.latest()
        if step is None:
            raise UserError(f"{self._place} holds no finished checkpoint; delete the run's directory and run its stage again.")
        return step

    def kept_step(self, step: int) -> int:
        """The step itself. Raises UserError if it is not there."""
        there = sorted(finished_steps(self._place))
        if step not in there:
            raise UserError(f"step={step} is not in {self._place}, which holds {', '.join(map(str, there))}; train.keep_steps keeps more.")
        return step

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters of a step, bit for bit.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct`; each array gets the dtype and sharding (if any) named there.
        Raises:
          Damaged: the step is damaged, or its arrays are not of these names and shapes.
        """
        return self._restore(step, params=abstract)["params"]

    def restore(self, step: int, abstract_params: Any, abstract_optimizer: Any) -> tuple[Any, Any]:
        """Parameters and optimizer state of a step, as `restore_params` does."""
        restored = self._restore(step, params=abstract_params, optimizer=abstract_optimizer)
        return restored["params"], restored["optimizer"]

    def restore_array(self, step: int, abstract: Any, index: int) -> np.ndarray:
        """One array of a step's parameters, read without the others.

        Args:
          abstract: the whole tree, as for `restore_params`.
          index: of the array among the tree's leaves.
        Raises:
          Damaged: as `restore_params`.
        """
        leaves: list[Any] = [v1.PLACEHOLDER] * len(jax.tree.leaves(abstract))
        wanted = jax.tree.leaves(abstract)[index]
        leaves[index] = np.broadcast_to(np.zeros((), wanted.dtype), wanted.shape)  # asks for a NumPy array, and takes no memory
        restored = self._restore(step, params=jax.tree.structure(abstract).unflatten(leaves))
        return jax.tree.leaves(restored["params"])[index]

    def wait(self) -> None:
        """Returns when every save so far is whole."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the threads."""
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self.close()

    def _restore(self, step: int, **abstract: Any) -> Any:
        _silence_abandoned_reads()
        try:
            with _reading():
                restored = v1.load_checkpointables(
                    str(self.directory / str(step)), {name: _placed(tree) for name, tree in abstract.items()} | {"checksums": None}
                )
            for name, tree in abstract.items():
                _check(name, tree, restored[name], restored["checksums"][name])
            return restored
        except MemoryError:
            raise
        except Exception as error:  # Orbax and tensorstore raise many types for a missing file, a bad checksum or another shape
            first: BaseException = error  # Orbax wraps it, and puts the whole tree into its own
            while first.__cause__ is not None:
                first = first.__cause__
            if any(words in str(first) for words in _NO_DAMAGE):
                raise
            raise self._unreadable(step, first) from error

    def _unreadable(self, step: int, error: BaseException) -> Damaged:
        said = reason(error).split(". ")[0]
        return Damaged(f"checkpoint {self._place / str(step)} cannot be read ({said})")


@functools.cache
def _silence_abandoned_reads() -> None:
    """When one array cannot be read, Orbax leaves the reads of the others behind, and each would print a trace when it ends."""
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = show_others


def _check(name: str, asked: Any, restored: Any, expected: list[int]) -> None:
    """Raises ValueError unless what was restored has the shapes asked for and the checksums saved with it."""
    places = [number for number, x in enumerate(jax.tree.leaves(asked)) if x is not v1.PLACEHOLDER]
    shapes, found = jax.tree.leaves(asked), jax.tree.leaves(restored)
    for number in places:
        if found[number].shape != shapes[number].shape:
            raise ValueError(f"an array has shape {found[number].shape} and not {shapes[number].shape}")
    if checksums([found[number] for number in places]) != [expected[number] for number in places]:
        raise ValueError(f"the checksums of its {name} differ from those saved")


def _reading() -> v1.Context:
    """Every process reads its own shards and waits for none: Orbax numbers what a process has read so far, which may differ between them."""
    context = v1.Context()
    if jax.process_count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _processes(directory: AnyPath, alone: bool) -> Any:
    """Which processes Orbax waits for, and under which name: two saves at once, as of two members, would else wait for one another's barriers."""
    name = "_".join(directory.parts[-3:])
    lane = lanes.active()
    if not alone and lane is None:
        return ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
    members = {jax.process_index()} if alone or lane is None else set(lane.ranks)
    first = min(members)
    return ocp.options.MultiprocessingOptions(primary_host=first, active_processes=members, barrier_sync_key_prefix=f"{name}_{first}")


def _registry(first: int) -> Any:
    """Orbax's handlers of arrays for processes without process 0, of which `first` is the first: its own leave to process 0 what one process writes."""
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=first)), (np.ndarray, _WrittenHere())
    )


class _WrittenHere(ocp.type_handlers.NumpyHandler):
    """Writes NumPy arrays on the process that asks for it. Orbax's handler, which this follows, writes them on process 0 only, without a setting."""

    async def _background_serialize(self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[ocp.SaveArgs] | None = None) -> None:
        writes = []
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            await info.await_path_creation()
            spec = ts_utils.build_array_write_spec(
                info=info,
                arg=arg,
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                use_ocdbt=info.is_ocdbt_checkpoint,
                process_index=ocdbt_utils.get_process_index_for_subdir(use_ocdbt=info.is_ocdbt_checkpoint),
            )
            writes.append(self._open_and_write(value, spec.json, info.ts_context))
        await asyncio.gather(*writes)


def checksums(tree: Any) -> list[int]:
    """One 32-bit number per leaf, which changes with any bit of it. Orbax's own format notices missing bytes and not flipped ones."""
    leaves = jax.block_until_ready(jax.tree.leaves(tree))
    elsewhere = iter(_weighted_sums([x for x in leaves if not _on_host(x)]))
    return [_weighted_sum_on_host(_as_numpy(x)) if _on_host(x) else int(next(elsewhere)) for x in leaves]


def _on_host(x: Any) -> bool:
    """Whether the sum is taken by NumPy: compiled for a CPU, it would hold every array a second time."""
    if isinstance(x, np.ndarray):
        return True
    one_cpu = x.is_fully_addressable and [device.platform for device in x.devices()] == ["cpu"]
    return one_cpu and x.dtype.kind in "fiu"  # what dlpack knows


def _as_numpy(x: Any) -> np.ndarray:
    # By dlpack, because np.asarray would be remembered by the array, whose memory could then not be donated.
    return x if isinstance(x, np.ndarray) else np.from_dlpack(x)


def _weighted_sum_on_host(x: np.ndarray) -> int:
    words = x.reshape(-1).view(f"u{x.dtype.itemsize}")
    total, odd = 0, 2 * np.arange(min(words.size, _BLOCK), dtype=np.uint32) + np.uint32(1)
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32, copy=False)
        total += int(np.dot(block, odd[: block.size])) + 2 * start * int(np.sum(block, dtype=np.uint32))
    return total % 2**32


@jax.jit
def _weighted_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def of_leaf(x):
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        # Odd weights have an inverse modulo 2^32, so no change of a single element can cancel. Computed where each shard lies.
        weights, stride = jnp.ones(x.shape, jnp.uint32), 2
        for axis in reversed(range(x.ndim)):
            weights += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(words * weights, dtype=jnp.uint32)

    return [of_leaf(x) for x in leaves]


def _placed(tree: Any) -> Any:
    """A shape without a sharding goes to the first device; without this, Orbax would ask for the devices that saved it."""
    one_device = jax.sharding.SingleDeviceSharding(lanes.local_device())

    def one(x):
        if x is v1.PLACEHOLDER or isinstance(x, np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or one_device)

    return jax.tree.map(one, tree)
