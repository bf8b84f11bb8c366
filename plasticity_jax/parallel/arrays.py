"""Converts host arrays to arrays sharded over the devices of several processes, and back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from plasticity_jax.parallel import processes


def put(tree: Any, shardings: Any) -> Any:
    """Turns host arrays, equal on every process, into global arrays. Each process copies only its own shards to its devices."""
    if processes.count() == 1:
        return jax.device_put(tree, shardings)

    def one(x, sharding):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x if x.sharding == sharding else _resharder(sharding)(x)  # device_put would compile anew
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(one, tree, _like(tree, shardings))


def _like(tree: Any, shardings: Any) -> Any:
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda _: shardings, tree)
    return shardings


def copied(tree: Any, shardings: Any) -> Any:
    """Copies of arrays, in other shardings, that share no memory with them: they may be donated. (`device_put(may_alias=False)` shares some.)"""
    leaves, structure = jax.tree.flatten(_like(tree, shardings))
    return _copier(structure, tuple(leaves))(put(tree, shardings))


@functools.lru_cache(maxsize=8)
def _copier(structure: Any, shardings: tuple[Any, ...]):
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=structure.unflatten(shardings))


def to_host(tree: Any) -> Any:
    """Returns the whole arrays as NumPy arrays on every process. Every process must call it."""

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        whole = x if x.is_fully_replicated else _resharder(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)  # pyright: ignore[reportAttributeAccessIssue]
        return np.asarray(whole.addressable_data(0))

    return jax.tree.map(one, tree)


@functools.lru_cache(maxsize=64)
def _resharder(sharding: Any):
    return jax.jit(lambda x: x, out_shardings=sharding)
