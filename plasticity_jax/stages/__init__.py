"""The stages of a study. Each is one `Stage` declared in a file of this folder, or behind an entry point of the group `plasticity_jax.stages`."""

import functools

from plasticity_jax.plugins import discover
from plasticity_jax.stages.stage import Column, Context, Figure, Plan, Stage, Table, member_row, number

__all__ = ["Column", "Context", "Figure", "Plan", "Stage", "Table", "member_row", "number", "stages"]

GROUP = "plasticity_jax.stages"


@functools.cache
def stages() -> dict[str, Stage]:
    """Name → stage, parents before children, otherwise by name. A stage that cannot be read is left out, and a warning says why."""
    found = discover(GROUP, package="plasticity_jax.stages", kind=Stage).found
    needs = {
        name: {parent for role in stage.parents for parent in stage.parent_stages(role)} & found.keys() - {name} for name, stage in found.items()
    }
    ordered: dict[str, Stage] = {}
    while left := sorted(found.keys() - ordered.keys()):
        name = next((name for name in left if needs[name] <= ordered.keys()), left[0])
        ordered[name] = found[name]
    return ordered
