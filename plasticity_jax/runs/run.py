from plasticity_jax.runs.records import Run  # noqa
