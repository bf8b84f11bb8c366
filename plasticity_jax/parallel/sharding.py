"""Which mesh axis holds which axis of a parameter or a batch."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plasticity_jax.errors import UserError
from plasticity_jax.parallel.rules import match_rules

# fsdp splits the d_model side of every matrix, tensor splits heads, d_ff and vocabulary; the layer axis comes first in a block.
SHARDING_RULES = (
    (r"^embed/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"^blocks/attn/[qkv]/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"^blocks/attn/o/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"^blocks/mlp/(gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"^blocks/mlp/down/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"scale$", PartitionSpec()),
    (r"^head/kernel$", PartitionSpec("fsdp", "tensor"), True),  # absent where the embedding is tied
)


def param_shardings(mesh: Mesh, abstract: Any, *, members: bool = False) -> Any:
    """A tree of NamedSharding for a parameter tree (arrays or shapes).

    Args:
      members: the arrays carry a leading member axis, which lies on the mesh axis of that name.
    Raises:
      UserError: an axis of a parameter that the mesh axis on it does not divide.
    """
    table = match_rules(SHARDING_RULES, abstract)
    shardings = []
    for (path, spec), leaf in zip(table.items(), jax.tree.leaves(abstract), strict=True):
        if members:
            spec = PartitionSpec("member", *spec)
        for axis, (size, name) in enumerate(zip(leaf.shape, spec)):
            if name is not None and size % mesh.shape[name]:
                raise UserError(f"mesh.{name}={mesh.shape[name]} does not divide axis {axis} of {path} (size {size}); change mesh.{name}.")
        shardings.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(jax.tree.structure(abstract), shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batch arrays [B, T]: rows over data and fsdp together; all members see the same batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
