"""Names of a package that are imported on first use, so that `import plasticity_jax` and `--help` never wait for jax."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(package: str, names: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
      package: the package's `__name__`.
      names: module, relative to the package → the names that it defines.
      submodules: submodules that are attributes themselves.
    """
    homes = {name: module for module, defined in names.items() for name in defined}

    def getattr_(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return getattr_, lambda: sorted([*homes, *submodules])
