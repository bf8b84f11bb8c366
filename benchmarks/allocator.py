"""A training step of the default model with and without `keep_freed_memory`, in turns, with page faults beside seconds.

Command: python benchmarks/allocator.py
"""

import resource
from typing import Any

from side_by_side import Round, Side, finish, measure, serve

STEPS = 10  # of a round


def steps(keep: bool) -> Round:
    """Rounds of training steps of configs/default.py, in float32."""
    from plasticity_jax.parallel.allocator import keep_freed_memory

    if keep:
        assert keep_freed_memory()
    import jax
    import numpy as np

    from plasticity_jax.config import load_config
    from plasticity_jax.data.loader import as_batch
    from plasticity_jax.model.transformer import init_params
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.pretrain import step_settings
    from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, state_shardings

    config = load_config("configs/default.py", [("train.compute_dtype", "float32")])
    mesh = make_mesh(config.mesh)
    settings = step_settings(config, mesh)
    state = jax.device_put(initial_state(settings, init_params(config.model, 0)), state_shardings(settings, mesh, members=False))
    step = compile_train_step(settings, mesh, members=False)
    shape = (config.train.batch_size, config.train.seq_len + 1)
    batch = as_batch(np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32))
    hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-3, warmup=10, total=100)

    def one_round() -> dict[str, float]:
        nonlocal state
        metrics: Any = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(STEPS):
            state, metrics = step(state, batch, hyper)
            jax.block_until_ready(metrics)
        return {"page faults a step": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / STEPS}

    return one_round


SIDES = {"glibc's default": Side(lambda: steps(False)), "keep_freed_memory": Side(lambda: steps(True))}


def main() -> None:
    found = measure(SIDES, rounds=5)
    rows = [one.row(side, found["glibc's default"]) for side, one in found.items()]
    finish("Keeping freed memory", {f"{STEPS} training steps of configs/default.py, float32": rows})


if __name__ == "__main__":
    serve(SIDES)
    main()
