"""Run on eight simulated devices by test_gradients.py: bf16 gradients of the real step on meshes, per tensor, against float32 on one device.

Arguments: "every" for all cases; without, those of make test. Prints one JSON object: network → case → tensor → relative error.
"""

import json
import sys

import jax
import numpy as np
import optax
from on_meshes import OPTIMIZER, PLAIN, mesh_of

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.transformer import init_params
from plasticity_jax.parallel import param_paths
from plasticity_jax.train.step import Execution, StepSettings, compile_train_step, hyper_parameters, initial_state, stack, state_shardings

SHAPE = dict(vocab_size=256, d_model=64, n_layers=2, n_heads=8, n_kv_heads=4, d_ff=96)
NETWORKS = {
    "llama": ModelConfig(**SHAPE),
    "olmo2": ModelConfig(**SHAPE, norm_position="post", qk_norm=True, tie_embeddings=True),
}
SAVING = {"scan_layers": True, "remat": "full", "loss_chunks": 8, "grad_accum_steps": 4}
CASES = {
    "one": ({"data": 1}, {}),
    "one, saving memory": ({"data": 1}, SAVING),
    "data": ({"data": 8}, {}),
    "data, saving memory": ({"data": 8}, SAVING),
    "fsdp": ({"data": 1, "fsdp": 8}, {}),
    "fsdp, many chunks": ({"data": 1, "fsdp": 8}, {"loss_chunks": 64}),
    "tensor": ({"data": 2, "tensor": 4}, {"remat": "dots"}),
    "fsdp and tensor, saving memory": ({"data": 1, "fsdp": 4, "tensor": 2}, SAVING),
    "members": ({"member": 2, "data": 1, "fsdp": 4}, {}),
    "members, saving memory": ({"member": 2, "data": 2, "tensor": 2}, SAVING),
}
# Network → its cases, and which of them make test runs: those between them split every axis and save memory in every way.
EVERY = {"llama": tuple(CASES), "olmo2": ("one", "data", "fsdp and tensor, saving memory", "members")}
ALWAYS = {
    "llama": ("one", "data", "fsdp, many chunks", "tensor", "members, saving memory"),
    "olmo2": ("one", "fsdp and tensor, saving memory"),
}
BATCH, LENGTH = 32, 256  # 8,192 tokens; a Zipf law, so that a few rows of the embedding sum thousands of gradients


def gradient(model, dtype, sizes, changes):
    """Path → the gradient in float64: what the optimizer's first moment holds after the first step, times a constant."""
    settings = StepSettings(model, OPTIMIZER, dtype, z_loss=1e-4, isolate_documents=False, execution=Execution(**PLAIN | changes))
    mesh, members = mesh_of(sizes), "member" in sizes
    state = initial_state(settings, jax.device_get(init_params(model, 0)))
    hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-3, warmup=2, total=20)
    if members:
        state, hyper = stack([state] * 2), stack([hyper] * 2)
    state = jax.device_put(state, state_shardings(settings, mesh, members=members))
    tokens = np.minimum(np.random.default_rng(0).zipf(1.3, (BATCH, LENGTH + 1)), model.vocab_size) - 1
    state, _ = compile_train_step(settings, mesh, members=members)(state, as_batch(tokens), hyper)
    moments = optax.tree.get(state["optimizer"], "mu")
    leaves = [np.asarray(x, np.float64)[-1 if members else ...] for x in jax.tree.leaves(moments)]
    return dict(zip(param_paths(moments), leaves, strict=True))


def main():
    found = {}
    for name, model in NETWORKS.items():
        exact = gradient(model, "float32", {"data": 1}, {})
        for case in (EVERY if sys.argv[1:] == ["every"] else ALWAYS)[name]:
            sizes, changes = CASES[case]
            actual = gradient(model, "bfloat16", sizes, changes)
            errors = {path: np.linalg.norm(actual[path] - exact[path]) / np.linalg.norm(exact[path]) for path in exact}
            found.setdefault(name, {})[case] = errors
    print(json.dumps(found))


if __name__ == "__main__":
    main()
