"""How good a model is: generation, answer extraction, grading. Names load when they are first used.

`generate` is taken from its module, `plasticity_jax.evaluate.generate`.
"""

import importlib

_HOMES = {
    "Grading": "grading",
    "extract_answer": "answers",
    "judge": "answers",
    "majority_answer": "answers",
    "majority_index": "answers",
    "pass_at_k": "metrics",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
