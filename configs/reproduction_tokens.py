"""The reproduction on a CPU, third arm: a Llama of 88,352 parameters at 20 and at 140 tokens per parameter, the latter 1.02 passes over the text.

Command:   plasticity study --config configs/reproduction_tokens.py --workdir work
           plasticity compare --study work/reproduction --study work/reproduction-tokens --out comparison
Plan:      docs/reproduction/plan.md; reported apart from the main arm.
Machine:   2 CPU cores.
"""

from plasticity_jax.config.recipes import CPU_RATES, cpu_reproduction


def get_config():
    config = cpu_reproduction("reproduction-tokens")
    config.model.d_model = 32
    config.model.d_ff = 86
    config.grid.timescales = (None, 0.4, 0.1)
    config.grid.seeds = (10, 11, 12)
    config.grid.fields = (("train.steps", (431, 3020)), *CPU_RATES)
    return config
