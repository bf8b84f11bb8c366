"""A training step of the default model with and without `keep_freed_memory`, in alternating processes; prints medians and their ratio.

Command: python benchmarks/allocator.py
"""

import json
import statistics
import subprocess
import sys

CHILD = """
import json, resource, statistics, sys, time
from plasticity_jax.parallel.allocator import keep_freed_memory
if sys.argv[1] == "keep":
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
seconds = []
for repeat in range(23):
    if repeat == 3:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    state, metrics = step(state, batch, hyper)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / 20
print(json.dumps({"seconds": seconds[3:], "faults": faults}))
"""


def main():
    found = {"default": [], "keep": []}
    faults = {}
    for _ in range(3):
        for kind in found:
            child = json.loads(subprocess.run([sys.executable, "-c", CHILD, kind], check=True, capture_output=True, text=True).stdout)
            found[kind] += child["seconds"]
            faults[kind] = child["faults"]
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    for kind, median in medians.items():
        print(f"{kind:8s} median {median * 1e3:7.1f} ms a step, {faults[kind]:,.0f} page faults a step")
    ratio = medians["default"] / medians["keep"]
    print(f"keeping freed memory: {ratio:.2f} times as fast")
    print(json.dumps({"milliseconds": {k: v * 1e3 for k, v in medians.items()}, "page_faults": faults, "ratio": ratio}))


if __name__ == "__main__":
    main()
