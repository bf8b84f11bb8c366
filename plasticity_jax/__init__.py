"""What does a pretraining hyperparameter do to what a language model can still learn?

For notebooks and scripts: `load_model`, `open_study`, `presets`, `count_params`, and the modules `analysis`, `evaluate`, `train`. Everything is imported
on first use, so that `import plasticity_jax` is instant.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {
    "load_model": "plasticity_jax.model.load",
    "count_params": "plasticity_jax.model.transformer",
    "presets": "plasticity_jax.config.presets",
    "open_study": "plasticity_jax.study.open",
    "UserError": "plasticity_jax.errors",
}
_MODULES = ("analysis", "evaluate", "train", "config")

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"plasticity_jax.{name}")
    raise AttributeError(f"module 'plasticity_jax' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
