"""Fine-tuning and evaluating several models of the tiny study: one by one against one vmapped program, on eight simulated devices.

Command: python benchmarks/members_together.py

Models that differ in their parameters only are fine-tuned on the same made-up rows by the real step, and answer the same made-up prompts by the real
decoder: one after the other, each on a mesh of eight devices over data; and together, on a mesh of four over members and two over data. The two take
turns. The table has the median wall-clock of each, without compilation, and the number of compiled programs.
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from side_by_side import finish

from plasticity_jax.config import FinetuneConfig, MeshConfig, ModelConfig, StudyConfig, TrainConfig
from plasticity_jax.data.loader import as_batch
from plasticity_jax.evaluate.complete import count_programs
from plasticity_jax.evaluate.generate import Sampling, completions, completions_of_members, placed, stacked
from plasticity_jax.model.cache import Layout
from plasticity_jax.model.transformer import init_params
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.train.finetune import step_settings
from plasticity_jax.train.step import compile_train_step, initial_state, stack, state_shardings
from plasticity_jax.train.tuning import tuning_numbers

MEMBERS, STEPS, PROMPTS, ROUNDS = 4, 8, 16, 5
MODEL = ModelConfig(vocab_size=512, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64)  # of configs/tiny.py
CONFIG = StudyConfig(model=MODEL, train=TrainConfig(compute_dtype="float32"), finetune=FinetuneConfig(batch_size=16, length_buckets=(192,)))
RANDOM = np.random.default_rng(0)
BATCH = as_batch(RANDOM.integers(0, MODEL.vocab_size, (16, 193)))
TEXTS = [row.tolist() for row in RANDOM.integers(3, MODEL.vocab_size, (PROMPTS, 150))]
MODELS = [jax.device_get(init_params(MODEL, seed)) for seed in range(MEMBERS)]
ALONE, TOGETHER = MeshConfig(data=8), MeshConfig(member=4, data=2)

Round = Callable[[], None]


def finetuning(mesh_config: MeshConfig, together: bool) -> tuple[Round, Callable[[], int]]:
    """A round of STEPS steps of every member, and the number of programs compiled for it."""
    mesh = make_mesh(mesh_config)
    settings = step_settings(CONFIG, MODEL, mesh)
    shardings = state_shardings(settings, mesh, members=together)
    hyper = tuning_numbers(CONFIG.finetune, steps=STEPS)
    states = [initial_state(settings, params) for params in MODELS]
    if together:
        states, hyper = [stack(states)], stack([hyper] * MEMBERS)
    states = jax.device_get(states)
    step = compile_train_step(settings, mesh, members=together)

    def one_round() -> None:
        for state in states:
            state = jax.device_put(state, shardings)
            for _ in range(STEPS):
                state, metrics = step(state, BATCH, hyper)
            jax.block_until_ready(metrics)

    return one_round, step._cache_size


def evaluation(mesh_config: MeshConfig, together: bool) -> tuple[Round, Callable[[], int]]:
    """A round of the greedy completion and two samples of every prompt by every member."""
    mesh, before = make_mesh(mesh_config), count_programs()
    layout = Layout(mesh, sharded=False, scan_layers=True)
    models = [jax.device_put(params, param_shardings(mesh, params)) for params in MODELS]
    how = dict(sampling=Sampling(2, greedy_first=True), max_new_tokens=24, buckets=(192,), batch_size=48, eos_id=1, pad_id=0, compute_dtype="float32")
    members = stacked(models, layout) if together else None
    programs = 0

    def one_round() -> None:
        nonlocal programs
        if together:
            list(completions_of_members(MODEL, members, MEMBERS, TEXTS, layout=layout, **how))
        else:
            for params in models:
                list(completions((MODEL, placed(params, layout)), TEXTS, layout=layout, **how))
        programs = programs or count_programs() - before

    return one_round, lambda: programs


def measured(work: Callable[[MeshConfig, bool], tuple[Round, Callable[[], int]]]) -> dict:
    sides = {}
    for name, mesh, together in (("one by one", ALONE, False), ("together", TOGETHER, True)):
        sides[name] = work(mesh, together)
        sides[name][0]()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, (one_round, _) in sides.items():
            start = time.perf_counter()
            one_round()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"seconds": statistics.median(seconds[name]), "programs": programs()} for name, (_, programs) in sides.items()}


def main() -> None:
    rows = []
    for what, work in (("fine-tuning", finetuning), ("evaluation", evaluation)):
        sides = measured(work)
        for name, side in sides.items():
            rows.append({"work": f"{what}, {name}", **side, "times as fast": sides["one by one"]["seconds"] / side["seconds"]})
    finish("Members together", {f"{MEMBERS} members of the tiny model, eight simulated devices": rows})


if __name__ == "__main__":
    main()
