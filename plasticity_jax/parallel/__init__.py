"""Where it runs: the device mesh, and the one by-name mechanism that places parameters on it."""

import importlib

_EXPORTS = {
    "make_mesh": "mesh",
    "match_rules": "rules",
    "param_paths": "rules",
    "SHARDING_RULES": "sharding",
    "param_shardings": "sharding",
    "batch_sharding": "sharding",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
