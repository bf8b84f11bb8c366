"""The stages of a study. Each is one `Stage` declared in a file of this folder, or behind an entry point of the group `plasticity_jax.stages`."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from plasticity_jax.errors import reason
from plasticity_jax.plugins import Discovered, discover
from plasticity_jax.stages.stage import Column, Context, Figure, Knob, Plan, Program, Stage, Table, member_row, number
from plasticity_jax.stages.work import Ahead, Work

__all__ = ["Ahead", "Column", "Context", "Figure", "Knob", "Plan", "Program", "Stage", "Table", "Work", "guarded", "member_row", "number", "stages"]

log = logging.getLogger("plasticity_jax")

T = TypeVar("T")

GROUP = "plasticity_jax.stages"


@functools.cache
def discovered() -> Discovered[Stage]:
    """Every stage that can be read, and why the others cannot."""
    return discover(GROUP, package=__name__, kind=Stage)


def guarded(stage: Stage, what: str, call: Callable[..., T], default: T) -> Callable[..., T]:
    """A function of the report that a stage declares. Where that of a plug-in fails, it gives the default and one warning: the rest is written.

    Args:
      what: the function makes, for the warning, such as "table 'norms'".
    """
    if stage.name in discovered().ours:
        return call

    def guarded_call(*arguments: Any) -> T:
        try:
            return call(*arguments)
        except Exception as error:
            _warn_once(f"{what} of stage {stage.name} is left out of the report: {type(error).__name__}: {reason(error)}")
            return default

    return guarded_call


@functools.cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


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
