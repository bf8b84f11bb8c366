"""How good a model is: generation, answer extraction, grading. Names are imported on first use.

`generate` shares its name with its module: import it from `plasticity_jax.evaluate.generate`.
"""

from typing import TYPE_CHECKING

from plasticity_jax._lazy import attach

if TYPE_CHECKING:
    from plasticity_jax.evaluate.answers import extract_answer, judge, majority_answer, majority_index
    from plasticity_jax.evaluate.grading import Grading
    from plasticity_jax.evaluate.metrics import pass_at_k

__all__ = ["Grading", "extract_answer", "judge", "majority_answer", "majority_index", "pass_at_k"]

__getattr__, __dir__ = attach(
    __name__, {"answers": ["extract_answer", "judge", "majority_answer", "majority_index"], "grading": ["Grading"], "metrics": ["pass_at_k"]}
)
