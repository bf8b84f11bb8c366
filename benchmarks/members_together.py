"""Fine-tuning several bases: one by one against one vmapped program, on eight simulated devices.

Command: python benchmarks/members_together.py

Bases that differ in their parameters only are fine-tuned on the same made-up rows by the real step: one after the other, each on a mesh of eight devices
over data; and together, on a mesh of four over members and two over data. Prints the wall-clock of each, steps and compilation apart, and the compiles.
"""

import json
import os
import statistics
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from plasticity_jax.config import FinetuneConfig, MeshConfig, ModelConfig, StudyConfig, TrainConfig
from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.transformer import init_params
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.finetune import step_settings
from plasticity_jax.train.step import compile_train_step, initial_state, stack, state_shardings
from plasticity_jax.train.tuning import tuning_numbers

MEMBERS, STEPS, ROUNDS = 4, 10, 3
MODEL = ModelConfig(vocab_size=1024, d_model=96, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=256)
CONFIG = StudyConfig(model=MODEL, train=TrainConfig(compute_dtype="float32"), finetune=FinetuneConfig(batch_size=16, length_buckets=(128,)))
BATCH = as_batch(np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, 129)))


def run(mesh_config: MeshConfig, together: bool) -> dict:
    """Seconds to compile, and median seconds of STEPS steps of every member."""
    mesh = make_mesh(mesh_config)
    settings = step_settings(CONFIG, MODEL, mesh)
    shardings = state_shardings(settings, mesh, members=together)
    hyper = tuning_numbers(CONFIG.finetune, steps=STEPS)
    states = [initial_state(settings, jax.device_get(init_params(MODEL, seed))) for seed in range(MEMBERS)]
    if together:
        states, hyper = [stack(states)], stack([hyper] * MEMBERS)
    step = compile_train_step(settings, mesh, members=together)
    start = time.perf_counter()
    jax.block_until_ready(step(jax.device_put(jax.device_get(states[0]), shardings), BATCH, hyper))
    compile_seconds, rounds = time.perf_counter() - start, []
    for _ in range(ROUNDS):
        placed = [jax.device_put(jax.device_get(state), shardings) for state in states]
        start = time.perf_counter()
        for state in placed:
            for _ in range(STEPS):
                state, metrics = step(state, BATCH, hyper)
            jax.block_until_ready(metrics)
        rounds.append(time.perf_counter() - start)
    return {"compiles": step._cache_size(), "compile_seconds": compile_seconds, "seconds": statistics.median(rounds)}


def main() -> None:
    alone = run(MeshConfig(data=8), together=False)
    together = run(MeshConfig(member=4, data=2), together=True)
    print(f"{MEMBERS} members, {STEPS} steps of 16 x 128 each: one by one {alone['seconds']:.2f} s, together {together['seconds']:.2f} s")
    print(f"together takes {together['seconds'] / alone['seconds']:.2f} times as long; compiles {alone['compiles']} and {together['compiles']}")
    print(json.dumps({"one by one": alone, "together": together}))


if __name__ == "__main__":
    main()
