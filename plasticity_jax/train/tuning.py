"""What fine-tuning and verifier training share: AdamW with a cosine schedule to zero, and the traced hyperparameters."""

import math
from typing import Any

from plasticity_jax.config import FinetuneConfig
from plasticity_jax.train.optimizer import OptimizerSettings, Schedule
from plasticity_jax.train.step import Hyper, hyper_parameters

# Source: paper section 4.1.
TO_ZERO = Schedule("cosine", final_fraction=0.0, decay_fraction=1.0)


def tuning_optimizer(recipe: FinetuneConfig, *, decay_mask: str) -> OptimizerSettings:
    """The optimizer of a recipe; the learning rate decays to zero."""
    return OptimizerSettings.of(recipe, schedule=TO_ZERO, decay_kind="coupled", decay_mask=decay_mask)


def tuning_warmup_steps(steps: int, fraction: float) -> int:
    """Steps of the linear warmup: `fraction` of the run rounded up, as in the Hugging Face Trainer; at least one."""
    return max(1, math.ceil(fraction * steps))


def tuning_numbers(recipe: Any, *, steps: int, weight_decay: float = 0.0) -> Hyper:
    """The traced hyperparameters of a run of `steps` updates, from a section with `peak_lr` and `warmup_fraction`."""
    warmup = tuning_warmup_steps(steps, recipe.warmup_fraction)
    return hyper_parameters(weight_decay=weight_decay, peak_lr=recipe.peak_lr, warmup=warmup, total=steps)
