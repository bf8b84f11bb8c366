"""Batches over several processes: the rows that each process holds, and the global arrays made of them."""

import functools
import logging
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int

from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes
from plasticity_jax.parallel.sharding import batch_sharding

Batch = dict[str, np.ndarray]

log = logging.getLogger("plasticity_jax")


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in batch_sharding(mesh).spec[0])


def padded_batch_size(mesh: Mesh | AbstractMesh, batch_size: int, grad_accum_steps: int, name: str) -> int:
    """The rows of a batch as the devices hold it: `batch_size`, and rows without targets that fill it up, so that any batch runs on any mesh.

    Args:
      grad_accum_steps: parts that are computed one after the other; each is split evenly over the mesh.
      name: config section of the two numbers, such as "train".
    Raises:
      UserError: more parts than rows.
    """
    if grad_accum_steps > batch_size:
        raise UserError(f"{name}.grad_accum_steps={grad_accum_steps} is above {name}.batch_size={batch_size}; lower it to at most the batch size.")
    unit = grad_accum_steps * row_shards(mesh)
    padded = -(-batch_size // unit) * unit
    if padded > batch_size:
        _warn_once(
            f"{name}.batch_size={batch_size} in {grad_accum_steps} part(s) on {row_shards(mesh)} row shards: {padded - batch_size} of {padded} rows are "
            "padding, which costs as much time as real rows"
        )
    return padded


def part_counts(mesh: Mesh | AbstractMesh, batch_size: int) -> list[int]:
    """Numbers of parts that a batch can be computed in, ascending, without more padding than in one part."""
    per_shard = -(-batch_size // row_shards(mesh))
    return [parts for parts in range(1, per_shard + 1) if per_shard % parts == 0]


def smaller_batches(mesh: Mesh, batch_size: int, multiple: int = 1) -> tuple[int, ...]:
    """Batch sizes below one, descending, that the row shards share evenly; `multiple` rows stay together."""
    unit = multiple * row_shards(mesh)
    return tuple(range((-(-batch_size // unit) - 1) * unit, 0, -unit))


@functools.lru_cache(maxsize=64)
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Rows of a batch that this process's devices hold, ascending. The process needs to read no others."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def global_batches(batches: Iterable[Batch], mesh: Mesh, rows: Int[np.ndarray, " rows"] | None, padded: int) -> Iterator[Batch]:
    """Yields global batches of `padded` rows from host batches, whose rows come first.

    Args:
      rows: the rows of the padded batch that this process holds, if the host batches contain only the real ones among these; None if they contain
        all real rows.
    """
    sharding = batch_sharding(mesh)

    def whole(mine):
        def part(index):
            start, stop, _ = index[0].indices(padded)
            first = start if rows is None else int(np.searchsorted(rows, start))
            return mine[first : first + stop - start]

        return jax.make_array_from_callback((padded, *mine.shape[1:]), sharding, part)

    held = padded if rows is None else len(rows)
    for batch in batches:
        filled = {name: np.pad(x, [(0, held - len(x))] + [(0, 0)] * (x.ndim - 1)) if len(x) < held else x for name, x in batch.items()}
        # With one process in all, the compiled step places its batch.
        yield filled if processes.total() == 1 else {name: whole(x) for name, x in filled.items()}  # pyright: ignore[reportReturnType]
