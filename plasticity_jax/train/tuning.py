"""What fine-tuning and verifier training share: AdamW with a cosine schedule to zero, and the traced hyperparameters."""

import math
from typing import Any

from plasticity_jax.config import FinetuneConfig
from plasticity_jax.train.optimizer import OptimizerSettings, Schedule
from plasticity_jax.train.step import Hyper, hyper_parameters


def tuning_optimizer(recipe: FinetuneConfig, *, decay_mask: str) -> OptimizerSettings:
    """The optimizer of a recipe; the learning rate decays to zero. Source: paper section 4.1."""
    schedule = Schedule("cosine", final_fraction=0.0, decay_fraction=1.0)
    return OptimizerSettings.of(recipe, schedule=schedule, decay_kind="coupled", decay_mask=decay_mask)


def tuning_numbers(recipe: Any, *, steps: int, weight_decay: float = 0.0) -> Hyper:
    """The traced hyperparameters of a run of `steps` updates, from a section with `peak_lr` and `warmup_fraction`. Warmup is rounded up to whole steps, as in the Hugging Face Trainer."""
    warmup = max(1, math.ceil(recipe.warmup_fraction * steps))
    return hyper_parameters(weight_decay=weight_decay, peak_lr=recipe.peak_lr, warmup=warmup, total=steps)
