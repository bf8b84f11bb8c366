"""Converts host arrays to arrays sharded over the devices of several processes, and back."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from plasticity_jax.parallel import processes


def put(tree: Any, shardings: Any) -> Any:
    """Turns host arrays, equal on every process, into global arrays. Each process copies only its own shards to its devices."""
    if processes.count() == 1:
        return jax.device_put(tree, shardings)

    def one(x, sharding):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(one, tree, _like(tree, shardings))


def _like(tree: Any, shardings: Any) -> Any:
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda _: shardings, tree)
    return shardings


def to_host(tree: Any) -> Any:
    """Returns the whole arrays as NumPy arrays on every process. Every process must call it."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # pyright: ignore[reportAttributeAccessIssue]
            x = jax.jit(lambda y: y, out_shardings=everywhere)(x)
        return np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)

    return jax.tree.map(one, tree)
