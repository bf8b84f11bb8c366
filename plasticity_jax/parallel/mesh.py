"""The device mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from plasticity_jax.config import MeshConfig
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import lanes

AXES = ("member", "data", "fsdp", "tensor")


def check_members(mesh: Mesh, members: int) -> None:
    """Raises UserError if the members of one program do not spread evenly over the mesh's member axis. One model alone runs on any mesh."""
    size = mesh.shape["member"]
    if members > 1 and members % size:
        raise UserError(
            f"mesh.member={size} does not divide the {members} members that are trained together; set mesh.member to a divisor of {members}, "
            "or grid.mode='sequential'."
        )


def axis_sizes(mesh_config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every mesh axis over this many devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(mesh_config, axis) for axis in AXES}
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{shown}: every size must be at least 1, and only one may be -1 (the remaining devices); change mesh.*.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % fixed == 0:
        sizes[open_axes[0]] = devices // fixed
    elif open_axes or fixed != devices:
        rule = "divide" if open_axes else "equal"
        raise UserError(f"{shown}: the product of the sizes, {fixed}, must {rule} the number of devices, {devices}; change mesh.*.")
    return sizes


def make_mesh(mesh_config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with axes member, data, fsdp and tensor. The compiler propagates shardings over it.

    Args:
      mesh_config: axis sizes. One may be -1, which uses the remaining devices.
      devices: None means all jax devices, or those of this thread's lane.
    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = lanes.devices() if devices is None else list(devices)
    sizes = axis_sizes(mesh_config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
