"""Extensions by declaration: objects of one kind in the modules of a folder, and behind the entry points of installed packages."""

import importlib
import importlib.metadata
import logging
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from plasticity_jax.errors import reason

log = logging.getLogger("plasticity_jax")


class Named(Protocol):
    """An extension: it has a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Discovered(Generic[T]):
    """What `discover` found.

    Attributes:
      found: name → extension; ours in the order of their modules, then those of plug-ins in the order of their entry points.
      ours: the names of our own.
      files: name → Python file that declares it, of the others.
      problems: one line each, on every module or plug-in that was left out.
    """

    found: dict[str, T]
    ours: frozenset[str]
    files: dict[str, str]
    problems: tuple[str, ...]


def discover(group: str, *, package: str, kind: type[T]) -> Discovered[T]:
    """Finds extensions. One that cannot be used is left out with a warning, and does not affect the others.

    An entry point names a module (all extensions in it count), an extension, or a list of them. A name that is taken stays with whom it is: ours win
    over those of plug-ins, and where two plug-ins use one name, neither has it.

    Args:
      group: of the entry points.
      package: our own package, whose modules hold extensions.
      kind: the class of an extension, with an attribute `name`.
    """
    found: dict[str, T] = {}
    problems: list[str] = []
    folder = importlib.import_module(package).__path__
    for module in sorted(pkgutil.iter_modules(folder), key=lambda module: module.name):
        try:
            for one in extensions(importlib.import_module(f"{package}.{module.name}"), kind):
                if found.setdefault(one.name, one) is not one:
                    problems.append(f"{package}/{module.name}.py: the name {one.name!r} is taken by another file; give its {kind.__name__} another")
        except (Exception, SystemExit) as error:
            problems.append(f"{package}/{module.name}.py is left out: {type(error).__name__}: {reason(error)}")
    ours = frozenset(found)
    owners: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
        who = f"plug-in {point.name!r} ({point.value})"
        try:
            declared = list(extensions(point.load(), kind))
            if not declared:
                raise TypeError(f"it holds no {kind.__name__}")
        except (Exception, SystemExit) as error:  # a package may call sys.exit() on import
            problems.append(f"{who} is left out: {type(error).__name__}: {reason(error)}")
            continue
        for one in declared:
            if found.get(one.name) is one:  # imported from us, or behind another entry point too
                continue
            if one.name in ours:
                problems.append(f"{who} is left out: the name {one.name!r} is taken by plasticity_jax; give its {kind.__name__} another")
            else:
                owners.setdefault(one.name, []).append(who)
                found[one.name] = one
                files[one.name] = getattr(sys.modules[point.module], "__file__", None) or ""
    for name, claimed in owners.items():
        if len(claimed) > 1:
            del found[name], files[name]
            problems.append(f"{' and '.join(claimed)} both define {name!r}, so neither is used; uninstall one or rename it")
    for problem in problems:
        log.warning("%s", problem)
    return Discovered(found, ours, files, tuple(problems))


def extensions(holder: Any, kind: type[T]) -> Iterator[T]:
    """The extensions in a module, a list, or an object that is one. Objects imported into a module from elsewhere count once, by identity."""
    if isinstance(holder, (list, tuple)):
        values: Iterable[Any] = holder
        for value in holder:
            if not isinstance(value, kind):
                raise TypeError(f"its list holds {value!r}, which is no {kind.__name__}")
    else:
        values = [holder] if isinstance(holder, kind) else [value for value in vars(holder).values() if isinstance(value, kind)]
    found = list({id(value): value for value in values}.values())
    for extension in found:
        if not isinstance(extension.name, str) or not extension.name:
            raise TypeError(f"the name of a {kind.__name__} must be a text, not {extension.name!r}")
    yield from found
