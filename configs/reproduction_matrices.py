"""The reproduction on a CPU, second arm: as configs/reproduction.py with 0.15M parameters, but norms and embeddings are not decayed.

Command:   plasticity study --config configs/reproduction_matrices.py --workdir work
Plan:      docs/reproduction/plan.md; reported apart from the main arm.
Machine:   2 CPU cores.
"""

from plasticity_jax.config.recipes import cpu_reproduction


def get_config():
    config = cpu_reproduction("reproduction-matrices")
    config.decay.mask = "matrices-only"
    config.grid.timescales = (None, 0.8, 0.4, 0.2)
    config.grid.seeds = (10, 11, 12)
    return config
