"""How weights change: optimizer, step, loop, pretraining, fine-tuning. Names are imported on first use."""

from typing import TYPE_CHECKING

from plasticity_jax._lazy import attach

if TYPE_CHECKING:
    from plasticity_jax.train.optimizer import decay_table

__all__ = ["decay_table"]

__getattr__, __dir__ = attach(__name__, {"optimizer": ["decay_table"]})
