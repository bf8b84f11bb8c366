"""The reproduction on a CPU, main arm: Llamas of 0.15M and 0.27M parameters at 20 tokens per parameter, six weight decays, six seeds, five tasks.

Command:   plasticity study --config configs/reproduction.py --workdir work
Plan:      docs/reproduction/plan.md, written before any run of it; results in docs/reproduction/.
Machine:   2 CPU cores; 4,988 runs. Seed by seed with `--config.grid.seeds="(10,)"`, then `"(10,11)"` and so on: runs that are done are kept.
"""

from plasticity_jax.config.recipes import CPU_RATES, cpu_reproduction

LARGER = {"model.d_model": 64, "model.n_layers": 3, "model.d_ff": 172}


def get_config():
    config = cpu_reproduction("reproduction")
    config.grid.timescales = (None, 1.6, 0.8, 0.4, 0.2, 0.1)
    config.grid.seeds = (10, 11, 12, 13, 14, 15)
    config.grid.fields = (("train.steps", (728, 1306)), *CPU_RATES)
    config.grid.changes = (("-steps1306", LARGER),)
    return config
