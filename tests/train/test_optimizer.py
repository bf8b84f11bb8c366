"""AdamW against a NumPy step in float64; the schedule against its closed form; the decay table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import MODEL

from plasticity_jax.errors import UserError
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.train.optimizer import (
    DECAY_PRESETS,
    OptimizerSettings,
    Schedule,
    decay_table,
    make_optimizer,
    schedule_shape,
    timescale_steps,
    warmup_steps,
)
from plasticity_jax.train.step import hyper_parameters

STEPS, WARMUP, PEAK, FINAL = 25, 5, 3e-2, 0.1
COSINE = Schedule("cosine", final_fraction=FINAL, decay_fraction=1.0)


def lr_at(step: int) -> float:
    """The study's `get_lr`, in Python floats."""
    if step < WARMUP:
        return PEAK * step / WARMUP
    low = FINAL * PEAK
    return low + 0.5 * (1 + np.cos(np.pi * (step - WARMUP) / (STEPS - WARMUP))) * (PEAK - low)


def numpy_adamw(params: dict, gradients: list[dict], *, decay: float, kind: str, clip: float, decayed: set[str]) -> dict:
    """Written from the definition (Loshchilov & Hutter; PyTorch's order: first shrink, then step)."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    params = {k: v.astype(np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        lr = lr_at(t)
        for k in params:
            g = gradient[k].astype(np.float64) * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            shrink = (lr if kind == "coupled" else lr / PEAK) * decay if k in decayed else 0.0
            params[k] = (1 - shrink) * params[k]
            params[k] -= lr * (m[k] / (1 - b1 ** (t + 1))) / (np.sqrt(v[k] / (1 - b2 ** (t + 1))) + eps)
    return params


def tiny_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"embed/embedding": (5, 3), "blocks/attn/q/kernel": (2, 3, 4), "blocks/attn_norm/scale": (2, 3), "head/kernel": (3, 5)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def nest(flat: dict) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(leaf)
    return tree


def flat_of(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("kind", ["coupled", "independent"])
@pytest.mark.parametrize("mask", ["all", "olmo", "matrices-only", "no-norms"])
def test_adamw_equals_numpy_in_float64(kind, mask):
    """25 steps, λ = 0 and two others, gradients on both sides of the clipping limit; the state tree is the same for each λ."""
    chosen = OptimizerSettings(b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0, schedule=COSINE, decay_kind=kind, decay_mask=mask)
    optimizer = make_optimizer(chosen)
    params = tiny_tree(0)
    gradients = [{k: v * (0.05 if t % 2 else 1.0) for k, v in tiny_tree(100 + t).items()} for t in range(STEPS)]
    decayed = {
        "all": set(params),
        "olmo": set(params) - {"embed/embedding"},
        "matrices-only": {"blocks/attn/q/kernel", "head/kernel"},
        "no-norms": set(params) - {"blocks/attn_norm/scale"},
    }[mask]

    @jax.jit
    def step(params, state, gradient, hyper):
        updates, state = optimizer.update(gradient, state, params, hyper=hyper)
        return optax.apply_updates(params, updates), state

    trees = set()
    for decay in (0.0, 0.3, 2.0):
        ours, state = nest(params), optimizer.init(nest(params))
        hyper = hyper_parameters(weight_decay=decay, peak_lr=PEAK, warmup=WARMUP, total=STEPS)
        for gradient in gradients:
            ours, state = step(ours, state, nest(gradient), hyper)
        expected = numpy_adamw(params, gradients, decay=decay, kind=kind, clip=1.0, decayed=decayed)
        for path, value in flat_of(ours).items():
            assert np.linalg.norm(value - expected[path]) <= 2e-6 * np.linalg.norm(expected[path]), (path, decay)
        trees.add(jax.tree.structure(state))
    assert len(trees) == 1 and step._cache_size() == 1


def test_schedule_equals_its_closed_form():
    ours = PEAK * schedule_shape(jnp.arange(STEPS + 1), warmup=jnp.float32(WARMUP), total=jnp.float32(STEPS), schedule=COSINE)
    np.testing.assert_allclose(ours, [lr_at(s) for s in range(STEPS + 1)], rtol=1e-5, atol=1e-9)
    assert ours[0] == 0 and ours[WARMUP] == np.float32(PEAK) and ours[-1] == pytest.approx(FINAL * PEAK)


def test_wsd_equals_its_closed_form():
    """Up in a straight line, level until the last fifth, down in a straight line that meets the final share just after the last update."""
    shape = schedule_shape(jnp.arange(101), warmup=jnp.float32(10), total=jnp.float32(100), schedule=Schedule("wsd", 0.0, 0.2))
    np.testing.assert_allclose(shape, np.interp(np.arange(101), [0, 10, 80, 100], [0, 1, 1, 0]), atol=1e-6)
    late = schedule_shape(jnp.arange(101), warmup=jnp.float32(50), total=jnp.float32(100), schedule=Schedule("wsd", 0.25, 0.9))
    np.testing.assert_allclose(late, np.interp(np.arange(101), [0, 50, 100], [0, 1, 0.25]), atol=1e-6)


@given(kind=st.sampled_from(["cosine", "wsd"]), steps=st.integers(1, 10_000), share=st.floats(0, 1), decay=st.floats(0, 1), final=st.floats(0, 1))
def test_schedule_stays_between_zero_and_the_peak(kind, steps, share, decay, final):
    warmup = warmup_steps(steps, share)
    assert 1 <= warmup <= steps
    at = jnp.asarray([0, warmup - 1, warmup, (warmup + steps) // 2, steps - 1, steps])
    shape = np.asarray(schedule_shape(at, warmup=jnp.float32(warmup), total=jnp.float32(steps), schedule=Schedule(kind, final, decay)))
    assert np.isfinite(shape).all() and shape.min() >= 0 and shape.max() <= 1 + 1e-6


def test_decay_tables_cover_every_parameter():
    params = abstract_params(MODEL)
    tables = {preset: decay_table(params, preset) for preset in DECAY_PRESETS}
    norms = {"blocks/attn_norm/scale", "blocks/mlp_norm/scale", "final_norm/scale"}
    assert len(tables["all"]) == len(jax.tree.leaves(params))
    left_out = {preset: {path for path, decayed in table.items() if not decayed} for preset, table in tables.items()}
    assert left_out == {"all": set(), "olmo": {"embed/embedding"}, "matrices-only": norms | {"embed/embedding"}, "no-norms": norms}


def test_decay_table_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="'some' is unknown; use one of all, olmo"):
        decay_table(abstract_params(MODEL), "some")
    with pytest.raises(ValueError, match="embed/embedding"):
        decay_table({"head": {"kernel": jnp.ones(2)}}, "olmo")


def test_timescale():
    assert timescale_steps(0.5, 2e-3, "coupled") == pytest.approx(1000)
    assert timescale_steps(0.5, 2e-3, "independent") == 2
    assert timescale_steps(0.0, 2e-3, "coupled") is None
