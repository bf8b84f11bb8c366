"""The training step as a function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import CONFIG, MODEL

from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.transformer import apply, init_params
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.precision import resolve_compute_dtype
from plasticity_jax.train.pretrain import step_settings
from plasticity_jax.train.step import compile_eval_step, compile_train_step, hyper_parameters, initial_state, make_train_step

SETTINGS = step_settings(CONFIG)
STEP = jax.jit(make_train_step(SETTINGS))
HYPER = hyper_parameters(weight_decay=0.1, peak_lr=1e-2, warmup=2, total=20)


def random_batch(seed: int) -> dict:
    return as_batch(np.random.default_rng(seed).integers(2, MODEL.vocab_size, (4, 17)))


def at_step_one(params) -> dict:
    """A state whose next update has a learning rate above zero."""
    return STEP(initial_state(SETTINGS, params), random_batch(9), HYPER)[0]


@pytest.fixture(scope="module")
def state() -> dict:
    return at_step_one(init_params(MODEL, 0))


def close(a, b, tolerance: float) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.linalg.norm(np.asarray(x) - np.asarray(y)) <= tolerance * max(np.linalg.norm(x), 1e-12) for x, y in pairs)


def mean_loss(params, batch):
    """Mean over the counted targets, by log-softmax and JAX's own gradient."""
    log_probs = jax.nn.log_softmax(apply(MODEL, params, batch["tokens"])[0])
    nats = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def test_metrics_against_numpy(state):
    batch = random_batch(0)
    batch["loss_mask"][:, :5] = 0
    _, metrics = STEP(state, batch, HYPER)
    logits = np.asarray(jax.jit(apply, static_argnums=0)(MODEL, state["params"], batch["tokens"])[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    assert metrics["tokens"] == 4 * 11
    assert metrics["loss"] == pytest.approx(nats[:, 5:].mean(), rel=1e-5)
    assert metrics["lr"] == pytest.approx(0.5e-2)
    gradient = jax.jit(jax.grad(lambda params: mean_loss(params, batch)))(state["params"])
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient))), rel=1e-4)
    assert metrics["param_norm"] == pytest.approx(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(state["params"]))))


def test_microbatches_and_padding_change_nothing(state):
    """Parts of unequal token counts, and padded rows and columns, give the loss and the update of the plain batch."""
    split = jax.jit(make_train_step(dataclasses.replace(SETTINGS, microbatches=2)))
    batch = random_batch(1)
    batch["loss_mask"][0, :9] = 0
    plain, metrics = STEP(state, batch, HYPER)
    rows = {name: np.repeat(value, [1, 1, 1, 0], axis=0) for name, value in batch.items()}
    fewer = {name: np.pad(value, ((0, 1), (0, 0))) for name, value in rows.items()}
    without_last = batch | {"loss_mask": batch["loss_mask"] * np.array([[1], [1], [1], [0]], np.float32)}
    plain_of_fewer, metrics_of_fewer = STEP(state, without_last, HYPER)
    pairs = (
        ((plain, metrics), split(state, batch, HYPER)),
        ((plain_of_fewer, metrics_of_fewer), STEP(state, fewer, HYPER)),
        ((plain_of_fewer, metrics_of_fewer), split(state, fewer, HYPER)),
    )
    assert metrics_of_fewer["tokens"] == 39 and metrics["loss"] != metrics_of_fewer["loss"]
    for (plain, metrics), (other, other_metrics) in pairs:
        assert other_metrics["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)
        assert other_metrics["tokens"] == metrics["tokens"]
        assert close(plain["params"], other["params"], 1e-5)


def test_a_batch_without_targets_is_no_nan(state):
    batch = random_batch(2)
    batch["loss_mask"][:] = 0
    after, metrics = STEP(state, batch, HYPER)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after["params"]))


def test_one_compilation_serves_every_weight_decay():
    mesh = make_mesh(CONFIG.mesh)
    step = compile_train_step(SETTINGS, mesh, members=False)
    assert compile_train_step(step_settings(dataclasses.replace(CONFIG, name="another")), mesh, members=False) is step
    before, results = step._cache_size(), []
    for decay in (0.0, 0.5, 7.0):
        state = at_step_one(init_params(MODEL, 0))
        hyper = hyper_parameters(weight_decay=decay, peak_lr=1e-2, warmup=2, total=20)
        results.append(step(jax.tree.map(jnp.asarray, state), random_batch(3), hyper))
    assert step._cache_size() <= before + 1
    norms = [sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(after["params"])) for after, _ in results]
    assert norms[0] > norms[1] > norms[2]
    assert len({float(metrics["loss"]) for _, metrics in results}) == 1


def test_eval_step_is_per_target(state):
    batch = random_batch(4)
    batch["loss_mask"][1] = 0
    nats = compile_eval_step(MODEL, "float32", make_mesh(CONFIG.mesh))(state["params"], batch)
    assert nats.shape == (4, 16) and (np.asarray(nats[1]) == 0).all()
    _, metrics = STEP(state, batch, HYPER)
    assert float(nats.sum()) / 48 == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_compute_dtype():
    assert resolve_compute_dtype("float32") == "float32" and resolve_compute_dtype("bfloat16") == "bfloat16"
    assert resolve_compute_dtype("auto") in ("float32", "bfloat16")
