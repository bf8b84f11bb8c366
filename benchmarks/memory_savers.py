"""What remat, chunked vocabulary losses and grad_accum_steps save in memory and cost in time, side by side in one process.

Command: python benchmarks/memory_savers.py

A model of 12 layers and the vocabulary of Llama-2, small enough for a CPU. Memory is the compiler's count of the step's temporaries, beside
parameters and optimizer state; time is the median of alternating steps, as a ratio to the plain step's.
"""

import dataclasses
import functools
import statistics
import time

import jax
import numpy as np
from side_by_side import finish

from plasticity_jax.config import ModelConfig, StudyConfig, TrainConfig
from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.transformer import init_params
from plasticity_jax.parallel.allocator import keep_freed_memory
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.pretrain import step_settings
from plasticity_jax.train.step import hyper_parameters, initial_state, make_train_step

ROUNDS = 5
MODEL = ModelConfig(vocab_size=32000, d_model=128, n_layers=12, n_heads=4, n_kv_heads=2, d_ff=384)
CONFIG = StudyConfig(model=MODEL, train=TrainConfig(batch_size=8, seq_len=256, compute_dtype="float32", scan_layers=True))
VARIANTS = {
    "plain": {},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "loss in 8 chunks": {"loss_chunks": 8},
    "4 grad_accum_steps": {"grad_accum_steps": 4},
    "remat full, 8 chunks": {"remat": "full", "loss_chunks": 8},
    "remat full, 8 chunks, 4 grad_accum_steps": {"remat": "full", "loss_chunks": 8, "grad_accum_steps": 4},
}


def main() -> None:
    keep_freed_memory()
    plain = step_settings(CONFIG, make_mesh(CONFIG.mesh))
    batch = as_batch(np.random.default_rng(0).integers(0, MODEL.vocab_size, (CONFIG.train.batch_size, CONFIG.train.seq_len + 1)))
    hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-3, warmup=1, total=100)
    steps, temporary = {}, {}
    state = initial_state(plain, init_params(MODEL, 0))
    for name, changes in VARIANTS.items():
        settings = dataclasses.replace(plain, execution=dataclasses.replace(plain.execution, **changes))
        compiled = jax.jit(make_train_step(settings)).lower(state, batch, hyper).compile()
        steps[name], temporary[name] = functools.partial(compiled, state, batch, hyper), compiled.memory_analysis().temp_size_in_bytes
        jax.block_until_ready(steps[name]())
    seconds = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "variant": name,
            "temporaries, MB": temporary[name] / 1e6,
            "seconds": medians[name],
            "times the plain step's": medians[name] / medians["plain"],
        }
        for name in VARIANTS
    ]
    train = CONFIG.train
    finish("Memory savers", {f"A step of {train.batch_size} x {train.seq_len} tokens, vocabulary {MODEL.vocab_size:,}, float32": rows})


if __name__ == "__main__":
    main()
