"""How weights change: optimizer, step, loop, pretraining, fine-tuning. Heavy parts load when they are first used."""

import importlib

_HOMES = {"decay_table": "optimizer"}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
