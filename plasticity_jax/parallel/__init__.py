"""The device mesh, and the rules that place parameters on it by name."""

from typing import TYPE_CHECKING

from plasticity_jax._lazy import attach

if TYPE_CHECKING:
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.parallel.rules import match_rules, param_paths
    from plasticity_jax.parallel.sharding import SHARDING_RULES, batch_sharding, param_shardings

__all__ = ["SHARDING_RULES", "batch_sharding", "make_mesh", "match_rules", "param_paths", "param_shardings"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "mesh": ["make_mesh"],
        "rules": ["match_rules", "param_paths"],
        "sharding": ["SHARDING_RULES", "batch_sharding", "param_shardings"],
    },
)
