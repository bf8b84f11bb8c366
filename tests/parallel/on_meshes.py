"""Run on eight simulated devices by test_invariance.py: the real step, generation and checkpoints on meshes. Writes what came out as .npz files.

Training is in float64, where rounding is nine orders of magnitude below what a wrong program would change: no processor's rounding is mistaken for an error.

Arguments: the folder to write to, and the names of the runs.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from plasticity_jax.config import MeshConfig, ModelConfig
from plasticity_jax.data.loader import as_batch
from plasticity_jax.evaluate.generate import Sampling, generate
from plasticity_jax.model.cache import Layout
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import init_params
from plasticity_jax.parallel import make_mesh, param_paths, param_shardings
from plasticity_jax.parallel.sharding import inference_shardings
from plasticity_jax.train.optimizer import OptimizerSettings, Schedule
from plasticity_jax.train.step import Execution, StepSettings, compile_train_step, hyper_parameters, initial_state, stack, state_shardings

LLAMA = ModelConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=8, n_kv_heads=4, d_ff=48)
OLMO2 = ModelConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=48, norm_position="post", qk_norm=True, tie_embeddings=True)
OPTIMIZER = OptimizerSettings(b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0, schedule=Schedule("cosine", 0.1, 1.0), decay_kind="coupled", decay_mask="all")
PLAIN = {"grad_accum_steps": 1, "scan_layers": False, "remat": "none", "attention": "xla", "loss_chunks": 1}
ONE = {"data": 1}
STEPS, BATCH, LENGTH, DECAYS = 20, 16, 24, (0.1, 3.0)

# name → (network, mesh, changes to the execution settings); a mesh of one device takes the first.
RUNS = {
    "one": (LLAMA, ONE, {}),
    "data8": (LLAMA, {"data": 8}, {}),
    "fsdp8": (LLAMA, {"data": 1, "fsdp": 8}, {}),
    "tensor4-data2": (LLAMA, {"data": 2, "tensor": 4}, {}),
    "fsdp4-tensor2": (LLAMA, {"data": 1, "fsdp": 4, "tensor": 2}, {}),
    "fsdp4-tensor2-scan-full-chunks": (LLAMA, {"data": 1, "fsdp": 4, "tensor": 2}, {"scan_layers": True, "remat": "full", "loss_chunks": 4}),
    "fsdp8-accumulation": (LLAMA, {"data": 1, "fsdp": 4, "tensor": 2}, {"grad_accum_steps": 4, "scan_layers": True}),
    "scan": (LLAMA, ONE, {"scan_layers": True}),
    "remat-full": (LLAMA, ONE, {"remat": "full"}),
    "remat-dots-scan": (LLAMA, ONE, {"remat": "dots", "scan_layers": True}),
    "accumulation": (LLAMA, ONE, {"grad_accum_steps": 4}),
    "olmo2-one": (OLMO2, ONE, {}),
    "olmo2-fsdp4-tensor2": (OLMO2, {"data": 1, "fsdp": 4, "tensor": 2}, {}),
    "olmo2-tensor4-data2-scan": (OLMO2, {"data": 2, "tensor": 4}, {"scan_layers": True, "grad_accum_steps": 2}),
}
MEMBERS = {
    "vmapped": {"member": 1, "data": 1},
    "member2-fsdp4": {"member": 2, "data": 1, "fsdp": 4},
    "member2-data2-tensor2": {"member": 2, "data": 2, "tensor": 2},
}


def mesh_of(sizes):
    n = int(np.prod([size for size in sizes.values()]))
    return make_mesh(MeshConfig(**sizes), jax.devices()[:n])


def settings_of(model, changes):
    return StepSettings(model, OPTIMIZER, "float64", z_loss=1e-4, isolate_documents=False, execution=Execution(**PLAIN | changes))


def hyper(decay):
    return hyper_parameters(weight_decay=decay, peak_lr=1e-2, warmup=2, total=STEPS)


def batch(step):
    made = as_batch(np.random.default_rng(step).integers(0, 96, (BATCH, LENGTH + 1)))
    made["loss_mask"][: BATCH // 4, : LENGTH // 2] = 0  # rows whose targets differ in number, so that a mean of means would show
    return made


def train(settings, mesh, decays):
    """(losses, state) of the run with one decay, or of its members."""
    members = len(decays) > 1
    params = jax.tree.map(lambda x: x.astype(jnp.float64), init_params(settings.model, 0))
    state, numbers = initial_state(settings, params), hyper(decays[0])
    if members:
        state, numbers = stack([state] * len(decays)), stack([hyper(decay) for decay in decays])
    state = jax.device_put(state, state_shardings(settings, mesh, members=members), may_alias=False)
    step, losses = compile_train_step(settings, mesh, members=members), []
    for i in range(STEPS):
        state, metrics = step(state, batch(i), numbers)
        losses.append(np.asarray(metrics["loss"]))
    return np.array(losses), state


def write(path, losses, params):
    np.savez(path, losses=losses, **dict(zip(param_paths(params), map(np.asarray, jax.tree.leaves(params)), strict=True)))


SAMPLINGS = (
    Sampling(n_samples=2, temperature=0.8, seed=3, greedy_first=True),
    Sampling(n_samples=2, temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=3, greedy_first=True),
)


def completions(mesh, params):
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    prompts = [list(np.random.default_rng(i).integers(3, 96, 4 + i)) for i in range(5)]
    placed = jax.device_put(params, inference_shardings(mesh, params))
    return np.array([
        [row + [-1] * (8 - len(row)) for row in of_prompt]
        for sampling in SAMPLINGS
        for of_prompt in generate(
            (LLAMA, placed), [[int(t) for t in p] for p in prompts], sampling=sampling, max_new_tokens=8, buckets=(8, 12), batch_size=24,
            eos_id=1, pad_id=0, compute_dtype="float32", layout=Layout(mesh if mesh.size > 1 else None),
        )
    ])  # fmt: skip


def main(folder: Path, names: list[str]):
    written = {}
    for name in names:
        if name in MEMBERS:
            losses, state = train(settings_of(LLAMA, {}), mesh_of(MEMBERS[name]), DECAYS)
            for i, decay in enumerate(DECAYS):
                write(folder / f"{name}.{decay}.npz", losses[:, i], jax.tree.map(lambda x: x[i], state["params"]))
            continue
        model, sizes, changes = RUNS[name]
        mesh, settings = mesh_of(sizes), settings_of(model, changes)
        losses, state = train(settings, mesh, DECAYS[:1])
        write(folder / f"{name}.npz", losses, state["params"])
        if model is LLAMA and not changes:
            host = jax.device_get(state["params"])
            with jax.enable_x64(False):
                np.savez(folder / f"{name}.tokens.npz", tokens=completions(mesh, host))
            with Checkpoints(folder / name / "checkpoints", asynchronous=False) as checkpoints:
                checkpoints.save(STEPS, state["params"], state["optimizer"])
            written[name] = (mesh, settings, jax.device_get((state["params"], state["optimizer"])))
    losses, state = train(settings_of(LLAMA, {}), mesh_of(ONE), DECAYS[1:])
    write(folder / f"one.{DECAYS[1]}.npz", losses, state["params"])
    unequal = []
    for saved, (_, _, expected) in written.items():
        for restored, (mesh, settings, _) in written.items():
            shapes = jax.eval_shape(lambda: expected)
            shardings = state_shardings(settings, mesh, members=False)
            placed = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, (shardings["params"], shardings["optimizer"])
            )
            with Checkpoints(folder / saved / "checkpoints", read_only=True) as checkpoints:
                actual = checkpoints.restore(STEPS, *placed)
            same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
            lies = all(a.sharding == s for a, s in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(param_shardings(mesh, actual[0]))))
            if not (same and lies):
                unequal.append(f"{saved} → {restored}")
    (folder / "unequal.txt").write_text("\n".join(unequal))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(Path(sys.argv[1]), sys.argv[2:])
