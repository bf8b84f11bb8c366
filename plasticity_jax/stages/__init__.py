"""The stages of a study. Each is one `Stage` declared in a file of this folder, or behind an entry point of the group `plasticity_jax.stages`."""

import functools

from plasticity_jax.plugins import Discovered, discover
from plasticity_jax.stages.stage import Column, Context, Figure, Plan, Stage, Table, member_row, number

__all__ = ["Column", "Context", "Figure", "Plan", "Stage", "Table", "member_row", "number", "stages"]

GROUP = "plasticity_jax.stages"


@functools.cache
def discovered() -> Discovered[Stage]:
    """Every stage that can be read, and why the others cannot."""
    return discover(GROUP, package=__name__, kind=Stage)


@functools.cache
def stages() -> dict[str, Stage]:
    """Name → stage, parents before children, otherwise by name."""
    found = discovered().found
    needs = {
        name: {parent for role in stage.parents for parent in stage.parent_stages(role)} & found.keys() - {name} for name, stage in found.items()
    }
    ordered: dict[str, Stage] = {}
    while left := sorted(found.keys() - ordered.keys()):
        name = next((name for name in left if needs[name] <= ordered.keys()), left[0])
        ordered[name] = found[name]
    return ordered
