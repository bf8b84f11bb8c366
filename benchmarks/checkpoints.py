"""Checkpoints: how long training stands still for one, how long reading it takes, and how many bytes it has on disk.

Command: python benchmarks/checkpoints.py

As in the training loop: `wait` for the save before, then `save`, which returns once the arrays are copied; the rest is written while the next steps run.
Models are that of configs/default.py, with its batch, and one of 12 million parameters; steps are real ones, and the share is of a run with the config's
steps and cadence.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from side_by_side import finish

from plasticity_jax.config import ModelConfig, load_config
from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import count_params, init_params
from plasticity_jax.parallel.allocator import keep_freed_memory
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.pretrain import step_settings
from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, state_shardings

SAVES, WANTED = 6, 0.02
CONFIG = load_config("configs/default.py", [("train.compute_dtype", "float32")])
# name → model, and rows of its batch
MODELS = {
    "configs/default.py": (CONFIG.model, CONFIG.train.batch_size, 6),
    "12M": (ModelConfig(vocab_size=8192, d_model=320, n_layers=6, n_heads=5, n_kv_heads=5, d_ff=896), 4, 3),
}


def measured(name: str) -> tuple[dict, dict]:
    """Rows about saving, and about the files."""
    model, rows, between = MODELS[name]
    config = dataclasses.replace(CONFIG, model=model, train=dataclasses.replace(CONFIG.train, batch_size=rows))
    mesh = make_mesh(config.mesh)
    settings = step_settings(config, mesh)
    shardings = state_shardings(settings, mesh, members=False)
    state = jax.device_put(initial_state(settings, init_params(model, 0)), shardings)
    step = compile_train_step(settings, mesh, members=False)
    batch = as_batch(np.random.default_rng(0).integers(0, model.vocab_size, (rows, config.train.seq_len + 1)))
    hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-3, warmup=10, total=100)

    def steps(number: int) -> list[float]:
        nonlocal state
        seconds = []
        for _ in range(number):
            start = time.perf_counter()
            state, metrics = step(state, batch, hyper)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        return seconds

    steps(2)  # compiles
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=1, asynchronous=True) as checkpoints:
        stalls, while_written, alone = [], [], []
        for number in range(1, SAVES + 1):
            start = time.perf_counter()
            checkpoints.wait()
            checkpoints.save(number, state["params"], state["optimizer"])
            stalls.append(time.perf_counter() - start)
            while_written += steps(between)
            checkpoints.wait()
            alone += steps(between)
        checkpoints.wait()
        on_disk = sum(path.stat().st_size for path in (Path(folder) / str(SAVES)).rglob("*") if path.is_file())
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            (state["params"], state["optimizer"]),
            (shardings["params"], shardings["optimizer"]),
        )
        restores = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(SAVES, *abstract))
            restores.append(time.perf_counter() - start)
    arrays = sum(x.nbytes for x in jax.tree.leaves((state["params"], state["optimizer"])))
    every, total = config.train.checkpoint_every, config.train.steps
    saves = total // every + bool(total % every)
    stall, one_step = statistics.median(stalls[1:]), statistics.median(alone)
    saving = {
        "model": name,
        "parameters": count_params(model),
        "step, seconds": one_step,
        "loop blocked per save, seconds": stall,
        "most": max(stalls[1:]),
        "first save": stalls[0],
        "steps after it / other steps": statistics.median(while_written) / one_step,
        "share of the run, %": 100 * saves * stall / (total * one_step),
        "wanted": f"under {WANTED:.0%}",
    }
    files = {
        "model": name,
        "arrays, MB": arrays / 1e6,
        "on disk, MB": on_disk / 1e6,
        "on disk / arrays": on_disk / arrays,
        "restore, seconds": statistics.median(restores),
        "restore, MB/s": arrays / 1e6 / statistics.median(restores),
    }
    return saving, files


def main() -> None:
    keep_freed_memory()
    saving, files = zip(*map(measured, MODELS))
    about = f"Asynchronous saves of parameters and moments; a run of {CONFIG.train.steps} steps saves every {CONFIG.train.checkpoint_every} and at its end"
    finish("Checkpoints", {about: saving, "Reading them, checksums included": files})


if __name__ == "__main__":
    main()
