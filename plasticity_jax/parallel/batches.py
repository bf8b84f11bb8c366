"""Batches over several processes: the rows that each process holds, and the global arrays made of them."""

import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes
from plasticity_jax.parallel.sharding import batch_sharding

Batch = dict[str, np.ndarray]


def row_shards(mesh: Mesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in batch_sharding(mesh).spec[0])


def check_batch_size(mesh: Mesh, batch_size: int, grad_accum_steps: int, name: str) -> None:
    """Raises UserError if the batch does not split evenly over the gradient accumulation steps and the mesh.

    Args:
      name: config section of the two numbers, such as "train".
    """
    shards = row_shards(mesh)
    if batch_size % (grad_accum_steps * shards):
        raise UserError(
            f"{name}.batch_size={batch_size} in {name}.grad_accum_steps={grad_accum_steps} part(s) is not divisible by mesh.data x mesh.fsdp = {shards}; "
            f"set the batch to a multiple of {grad_accum_steps * shards}, or change grad_accum_steps or the mesh."
        )


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Rows of a batch that this process's devices hold, ascending. The process needs to read no others."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def global_batches(batches: Iterator[Batch], mesh: Mesh, rows: Int[np.ndarray, " rows"], batch_size: int) -> Iterator[Batch]:
    """Yields global batches of `batch_size` rows from batches of this process's `rows`. With one process, yields them unchanged."""
    if processes.count() == 1:
        yield from batches
        return
    sharding = batch_sharding(mesh)

    def whole(mine):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return mine[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *mine.shape[1:]), sharding, part)

    for batch in batches:
        yield {name: whole(x) for name, x in batch.items()}  # pyright: ignore[reportReturnType]
