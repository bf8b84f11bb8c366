"""Names of a package that are imported on first use, so that `import plasticity_jax` and `--help` never wait for jax."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
      package: the package's `__name__`.
      homes: name → the module that defines it, relative to the package; "" if the name is itself a submodule.
    """

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name) if homes[name] else importlib.import_module(f"{package}.{name}")

    return getattr_, lambda: sorted(homes)
