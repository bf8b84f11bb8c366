"""temporary"""

import dataclasses
import importlib
import pkgutil


@dataclasses.dataclass
class Found:
    found: dict
    problems: dict


def discover(group, package, kind):
    found = {}
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        for value in vars(importlib.import_module(f"{package}.{info.name}")).values():
            if isinstance(value, kind):
                found[value.name] = value
    return Found(found, {})
