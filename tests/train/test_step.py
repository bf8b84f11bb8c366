"""The training step as a function."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import CONFIG, MODEL, OF_LOSSES, OF_PARAMS

from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.transformer import abstract_params, apply, init_params
from plasticity_jax.parallel.batches import global_batches, padded_batch_size
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.precision import resolve_compute_dtype
from plasticity_jax.train.pretrain import step_settings
from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, make_train_step, next_token_losses

MESH = make_mesh(CONFIG.mesh)
SETTINGS = step_settings(CONFIG, MESH)
STEP = jax.jit(make_train_step(SETTINGS))
HYPER = hyper_parameters(weight_decay=0.1, peak_lr=1e-2, warmup=2, total=20)


def executed(**changes):
    """SETTINGS with other execution settings."""
    return dataclasses.replace(SETTINGS, execution=dataclasses.replace(SETTINGS.execution, **changes))


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
    assert metrics["grad_norm"] == pytest.approx(
        np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient))), rel=1e-4
    )
    assert metrics["param_norm"] == pytest.approx(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(state["params"]))))


def test_microbatches_and_padding_change_nothing(state):
    """Parts of unequal token counts, and padded rows and columns, give the loss and the update of the plain batch; in float64."""
    batch = random_batch(1)
    batch["loss_mask"][0, :9] = 0
    rows = {name: np.repeat(value, [1, 1, 1, 0], axis=0) for name, value in batch.items()}
    fewer = {name: np.pad(value, ((0, 1), (0, 0))) for name, value in rows.items()}
    without_last = batch | {"loss_mask": batch["loss_mask"] * np.array([[1], [1], [1], [0]], np.float32)}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        whole, split = (jax.jit(make_train_step(dataclasses.replace(s, compute_dtype="float64"))) for s in (SETTINGS, executed(grad_accum_steps=2)))
        hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-2, warmup=2, total=20)
        plain, plain_of_fewer = whole(wide, batch, hyper), whole(wide, without_last, hyper)
        pairs = ((plain, split(wide, batch, hyper)), (plain_of_fewer, whole(wide, fewer, hyper)), (plain_of_fewer, split(wide, fewer, hyper)))
        assert plain_of_fewer[1]["tokens"] == 39 and plain[1]["loss"] != plain_of_fewer[1]["loss"]
        for (expected, metrics), (other, other_metrics) in pairs:
            assert other_metrics["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-12)
            assert other_metrics["tokens"] == metrics["tokens"]
            assert close(expected["params"], other["params"], 1e-10)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_that_do_not_divide_the_batch_are_filled_up_and_change_nothing(state, parts, caplog):
    """Seven rows in parts of equal rows: loss, targets and every tensor of the update are those of the unsplit batch, in float64."""
    batch = as_batch(np.random.default_rng(3).integers(2, MODEL.vocab_size, (7, 17)))
    batch["loss_mask"][6, :9] = 0
    with caplog.at_level(logging.WARNING, "plasticity_jax"):
        padded = [padded_batch_size(MESH, 7, parts, f"seven-{parts}") for _ in range(2)]
    assert padded == [-(-7 // parts) * parts] * 2
    (warned,) = caplog.records
    assert f"{padded[0] - 7} of {padded[0]} rows are padding" in warned.getMessage()
    (filled,) = global_batches([batch], MESH, None, padded[0])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-2, warmup=2, total=20)
        settings = [dataclasses.replace(s, compute_dtype="float64", z_loss=1e-3) for s in (SETTINGS, executed(grad_accum_steps=parts))]
        (expected, metrics), (other, other_metrics) = (jax.jit(make_train_step(s))(wide, b, hyper) for s, b in zip(settings, (batch, filled)))
        for name in ("loss", "tokens", "z_loss", "grad_norm"):
            assert float(other_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-12), name
        for tensor, same in zip(jax.tree.leaves(expected), jax.tree.leaves(other), strict=True):
            assert close(tensor, same, 1e-10)


ALTERNATIVES = (
    {"grad_accum_steps": 4},
    {"scan_layers": True},
    {"remat": "dots", "scan_layers": True},
    {"remat": "full"},
    {"loss_chunks": 4},
    {"grad_accum_steps": 2, "scan_layers": True, "remat": "full", "loss_chunks": 8},
)


@pytest.mark.parametrize("changes", ALTERNATIVES, ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()))
def test_execution_changes_nothing_in_twenty_steps(changes):
    """Per tensor, and in every loss, in float64: what is not rounding differs by far more than 1e-10, and rounding by far less, on any processor."""
    with jax.enable_x64(True):
        (plain, losses), (other, other_losses) = twenty_steps("float64"), twenty_steps("float64", **changes)
        np.testing.assert_allclose(other_losses, losses, rtol=1e-10)
        assert close(plain["params"], other["params"], 1e-10)


@pytest.mark.parametrize("compute_dtype, of_params, of_losses", [("float32", OF_PARAMS, OF_LOSSES), ("bfloat16", 0.06, 0.006)])
def test_twenty_steps_in_a_narrow_dtype_are_those_in_float64(compute_dtype, of_params, of_losses):
    """Per tensor; Adam divides by small numbers, so rounding grows over the steps."""
    with jax.enable_x64(True):
        expected, expected_losses = twenty_steps("float64")
    state, losses = twenty_steps(compute_dtype)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state["params"]))
    assert close(state["params"], expected["params"], of_params)
    np.testing.assert_allclose(losses, expected_losses, rtol=of_losses)


@functools.cache
def twenty_steps(compute_dtype, **changes):
    """State and losses after twenty steps, with a z-loss, and rows of unequal token counts."""
    settings = dataclasses.replace(executed(**changes), z_loss=1e-3, model=dataclasses.replace(MODEL, n_layers=2), compute_dtype=compute_dtype)
    params = init_params(settings.model, 0)
    if compute_dtype == "float64":
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    step, state, losses = jax.jit(make_train_step(settings)), initial_state(settings, params), []
    hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-2, warmup=2, total=20)
    for seed in range(20):
        batch = random_batch(seed)
        batch["loss_mask"][0, : seed % 7] = 0
        state, metrics = step(state, batch, hyper)
        losses.append((metrics["loss"], metrics["z_loss"]))
    return state, losses


def test_z_loss_adds_its_square_to_the_gradient_and_not_to_the_loss(state):
    batch = random_batch(5)
    batch["loss_mask"][1, 3:] = 0
    with_z = jax.jit(make_train_step(dataclasses.replace(SETTINGS, z_loss=0.02)))
    _, plain = STEP(state, batch, HYPER)
    _, metrics = with_z(state, batch, HYPER)

    def mean_square(params):
        log_sums = jax.scipy.special.logsumexp(apply(MODEL, params, batch["tokens"])[0], axis=-1)
        return (jnp.square(log_sums) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    square, of_square = jax.jit(jax.value_and_grad(mean_square))(state["params"])
    gradient = jax.tree.map(lambda a, b: a + 0.02 * b, jax.jit(jax.grad(lambda params: mean_loss(params, batch)))(state["params"]), of_square)
    assert metrics["loss"] == pytest.approx(float(plain["loss"]), rel=1e-6) and "z_loss" not in plain
    assert metrics["z_loss"] == pytest.approx(0.02 * float(square), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(
        np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient))), rel=1e-4
    )


def test_isolated_documents_read_their_segment_only(state):
    """The loss is that of the documents as rows of their own; without isolation, another."""
    batch = random_batch(6)
    batch["segment_ids"][:, 8:] = 2
    isolated = jax.jit(make_train_step(dataclasses.replace(SETTINGS, isolate_documents=True)))(state, batch, HYPER)[1]["loss"]
    # Rotary attention sees differences of positions only, so a document may begin anywhere.
    halves = {name: np.concatenate([value[:, :8], value[:, 8:]]) for name, value in batch.items()}
    assert isolated == pytest.approx(float(STEP(state, halves, HYPER)[1]["loss"]), rel=1e-6)
    assert abs(isolated - float(STEP(state, batch, HYPER)[1]["loss"])) > 1e-3


def test_the_compiled_step_never_holds_all_logits_in_chunks():
    """[tokens, vocab] in float32 is 8.4 MB here: whole it is among the step's temporaries, in 16 parts it is not."""
    model = dataclasses.replace(MODEL, vocab_size=16384)
    batch = as_batch(np.zeros((8, 17), np.int32))

    def temporary(chunks):
        settings = dataclasses.replace(SETTINGS, model=model, execution=dataclasses.replace(SETTINGS.execution, loss_chunks=chunks))
        state = jax.eval_shape(functools.partial(initial_state, settings), abstract_params(model))
        return jax.jit(make_train_step(settings), donate_argnums=0).lower(state, batch, HYPER).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1) - temporary(16) > 0.8 * 8 * 16 * 16384 * 4


def test_a_batch_without_targets_is_no_nan(state):
    batch = random_batch(2)
    batch["loss_mask"][:] = 0
    after, metrics = STEP(state, batch, HYPER)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after["params"]))


def test_one_compilation_serves_every_weight_decay():
    step = compile_train_step(SETTINGS, MESH, members=False)
    assert compile_train_step(step_settings(dataclasses.replace(CONFIG, name="another"), MESH), MESH, members=False) is step
    before, results = step._cache_size(), []
    for decay in (0.0, 0.5, 7.0):
        state = at_step_one(init_params(MODEL, 0))
        hyper = hyper_parameters(weight_decay=decay, peak_lr=1e-2, warmup=2, total=20)
        results.append(step(jax.tree.map(jnp.asarray, state), random_batch(3), hyper))
    assert step._cache_size() <= before + 1
    norms = [sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(after["params"])) for after, _ in results]
    assert norms[0] > norms[1] > norms[2]
    assert len({float(metrics["loss"]) for _, metrics in results}) == 1


def test_the_loss_is_the_mean_over_the_targets_that_count(state):
    batch = random_batch(4)
    batch["loss_mask"][1] = 0
    nats = jax.jit(functools.partial(next_token_losses, SETTINGS, None))(state["params"], batch)[0] * batch["loss_mask"]
    assert nats.shape == (4, 16)
    _, metrics = STEP(state, batch, HYPER)
    assert float(nats.sum()) / 48 == pytest.approx(float(metrics["loss"]), rel=1e-5)


@pytest.mark.parametrize("platform, expected", [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")])
def test_the_platform_decides_the_dtype_of_auto(monkeypatch, platform, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert resolve_compute_dtype("auto") == expected
    assert resolve_compute_dtype("float32") == "float32" and resolve_compute_dtype("bfloat16") == "bfloat16"
