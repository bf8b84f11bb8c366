"""What does a pretraining hyperparameter do to what a language model can still learn?

For notebooks and scripts: `load_model`, `open_study`, `compare_studies`, `presets`, `count_params`, and the modules `analysis`, `evaluate`, `train`. Everything is imported
on first use, so that `import plasticity_jax` is instant.
"""

from typing import TYPE_CHECKING

from plasticity_jax._lazy import attach

if TYPE_CHECKING:
    from plasticity_jax import analysis, config, evaluate, train
    from plasticity_jax.config.presets import presets
    from plasticity_jax.errors import UserError
    from plasticity_jax.model.load import load_model
    from plasticity_jax.model.param_count import count_params
    from plasticity_jax.study.compare import compare_studies
    from plasticity_jax.study.open import open_study

__version__ = "0.1.0"

__all__ = ["UserError", "analysis", "compare_studies", "config", "count_params", "evaluate", "load_model", "open_study", "presets", "train"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "config.presets": ["presets"],
        "errors": ["UserError"],
        "model.load": ["load_model"],
        "model.param_count": ["count_params"],
        "study.compare": ["compare_studies"],
        "study.open": ["open_study"],
    },
    submodules=["analysis", "config", "evaluate", "train"],
)
