"""Which mesh axis holds which axis of a parameter, an activation or a batch.

Storage and compute layouts differ. Parameters, moments and gradients are stored sharded over fsdp; a layer's matrices are gathered over fsdp just
before their matmuls. Otherwise the compiler may shard the matmuls instead and sum activations over fsdp, which are far larger.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from plasticity_jax.errors import UserError
from plasticity_jax.parallel.rules import match_rules, param_paths

# fsdp splits the d_model side of every matrix, tensor splits heads, d_ff and vocabulary; the layer axis comes first in a block.
SHARDING_RULES = (
    (r"^embed/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"^blocks/attn/[qkv]/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"^blocks/attn/o/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"^blocks/mlp/(gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"^blocks/mlp/down/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"scale$", PartitionSpec()),
    (r"^head/kernel$", PartitionSpec("fsdp", "tensor"), True),  # absent if the embedding is tied
)

ROWS = ("data", "fsdp")  # mesh axes that shard the rows of a batch
GATHERED = "gathered"  # checkpoint name of the arrays that `gather` returns


def param_shardings(mesh: Mesh | AbstractMesh, abstract: Any, *, members: bool = False) -> Any:
    """Returns a tree of NamedSharding for a parameter tree (arrays or shapes).

    Args:
      members: the arrays have a leading member axis, which is sharded over the mesh axis `member`.
    Raises:
      UserError: a mesh axis does not divide the parameter axis that it shards.
    """
    table = match_rules(SHARDING_RULES, abstract)
    shardings = []
    for (path, spec), leaf in zip(table.items(), jax.tree.leaves(abstract), strict=True):
        if members:
            spec = PartitionSpec("member", *spec)
        for axis, (size, name) in enumerate(zip(leaf.shape, spec)):
            if name is not None and size % mesh.shape[name]:
                raise UserError(
                    f"mesh.{name}={mesh.shape[name]} does not divide axis {axis} of {path} (size {size}); set mesh.{name} to a divisor of {size}, "
                    f"such as {math.gcd(size, mesh.shape[name])}."
                )
        shardings.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(jax.tree.structure(abstract), shardings)


def inference_shardings(mesh: Mesh | AbstractMesh, abstract: Any) -> Any:
    """Like `param_shardings`, but replicated over fsdp, because decoding would otherwise gather all parameters for every token."""
    return jax.tree.map(lambda s: NamedSharding(mesh, _without_fsdp(s.spec)), param_shardings(mesh, abstract))


def device_bytes(placed: Any) -> int:
    """Bytes per device of a tree of arrays, or of their shapes, with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(placed))


def sharding_table(mesh: Mesh | AbstractMesh, abstract: Any) -> dict[str, dict[str, Any]]:
    """Maps each parameter path to its `shape`, its `spec` (mesh axis of every axis, or None) and `per_device`, the shape of its shards."""
    leaves, shardings = jax.tree.leaves(abstract), jax.tree.leaves(param_shardings(mesh, abstract))
    return {
        path: {"shape": list(leaf.shape), "spec": [*s.spec, *[None] * (leaf.ndim - len(s.spec))], "per_device": list(s.shard_shape(leaf.shape))}
        for path, leaf, s in zip(param_paths(abstract), leaves, shardings, strict=True)
    }


def format_sharding_table(table: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Yields one line for each parameter of a `sharding_table`."""
    width = max(map(len, table))
    for path, row in table.items():
        shape, spec, part = (", ".join("-" if x is None else str(x) for x in row[name]) for name in ("shape", "spec", "per_device"))
        yield f"{path:<{width}}  [{shape}]  over [{spec}]  →  [{part}] per device"


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of batch arrays [B, T]: rows over data and fsdp together. All members share the batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


# ----------------------------------------------------------------------------------------------------------------- inside a computation


def gather(mesh: Mesh | None, params: Any, dtype: DTypeLike, *, prefix: str = "", of_layer: bool = False, sums: bool = False) -> Any:
    """Converts parameters to the compute layout: matrices in `dtype`, replicated over fsdp, sharded over tensor. Gradients get the storage layout.

    The all-gather moves values of `dtype`. Each result has the checkpoint name GATHERED, so a remat policy can gather it again instead of saving it.

    Args:
      mesh: None or a mesh of one device returns `params` unchanged.
      params: a subtree of the parameters.
      prefix: path of the subtree, such as "blocks".
      of_layer: the arrays belong to one layer and have no layer axis.
      sums: the arrays' gradients are sums of many terms, as those of a table of which rows are looked up. The results have the values of `dtype` and the
        parameters' own dtype, and so do the gradients: summed in bfloat16, a term is lost once the sum is 512 times as large.
    """
    if mesh is None or mesh.size == 1:
        return params
    paths = [f"{prefix}/{path}".strip("/") for path in param_paths(params)]
    table = match_rules([(pattern, spec, True) for pattern, spec, *_ in SHARDING_RULES], paths)
    leaves = []
    for leaf, (path, spec) in zip(jax.tree.leaves(params), table.items(), strict=True):
        if any(spec):
            stored = NamedSharding(mesh, PartitionSpec(*spec[1:]) if of_layer else spec)
            computed = NamedSharding(mesh, _without_fsdp(stored.spec))
            gathered = _relayout_summed(leaf, dtype, stored, computed) if sums else _relayout(leaf.astype(dtype), stored, computed)
            leaf = checkpoint_name(gathered, GATHERED)
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def constrain(mesh: Mesh | None, x: Array, *axes: Any) -> Array:
    """Constrains the axes of `x` to these mesh axes (None: replicated). Returns `x` unchanged on one device or if an axis does not divide."""
    if mesh is None or mesh.size == 1:
        return x
    for size, names in zip(x.shape, axes):
        shards = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        if size % shards:
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relayout(x: Array, stored: NamedSharding, computed: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, computed)


def _relayout_forward(x: Array, stored: NamedSharding, computed: NamedSharding) -> tuple[Array, None]:
    return _relayout(x, stored, computed), None


def _relayout_backward(stored: NamedSharding, computed: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    # The plain transpose of the constraint would replicate the gradient: an all-reduce instead of a reduce-scatter.
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_relayout.defvjp(_relayout_forward, _relayout_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _relayout_summed(x: Array, dtype: DTypeLike, stored: NamedSharding, computed: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x.astype(dtype), computed).astype(x.dtype)


def _relayout_summed_forward(x: Array, dtype: DTypeLike, stored: NamedSharding, computed: NamedSharding) -> tuple[Array, None]:
    return _relayout_summed(x, dtype, stored, computed), None


def _relayout_summed_backward(dtype: DTypeLike, stored: NamedSharding, computed: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_relayout_summed.defvjp(_relayout_summed_forward, _relayout_summed_backward)
