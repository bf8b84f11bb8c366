"""Spectra against NumPy's SVD of the whole products in float64; pseudo-rank against a loop."""

import json
from dataclasses import asdict

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import plasticity_jax.analysis as analysis
from plasticity_jax.analysis.spectra import (
    _triangular,
    attention_products,
    attention_spectra,
    lower_spectra,
    noise_floor,
    noise_variance,
    pseudo_rank,
    spectra_summary,
)
from plasticity_jax.config import ModelConfig, SpectraConfig, StudyConfig
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import abstract_params, init_params
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import spectra as stage
from plasticity_jax.stages.stage import Context

CONFIG = ModelConfig(vocab_size=300, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=32)


def random_blocks(config: ModelConfig, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    layers, d, h, kv, r = config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
    shapes = {"q": (layers, d, h * r), "k": (layers, d, kv * r), "v": (layers, d, kv * r), "o": (layers, h * r, d)}
    attn = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    if config.qk_norm:
        attn |= {f"{name}_norm": {"scale": rng.uniform(0.2, 3.0, size=(layers, shapes[name][2])).astype(np.float32)} for name in ("q", "k")}
    return {"blocks": {"attn": attn, "attn_norm": {"scale": rng.uniform(0.2, 3.0, size=(layers, d)).astype(np.float32)}}}


def full_products(config: ModelConfig, params: dict, layer: int, head: int, fold_norms: bool) -> tuple[np.ndarray, np.ndarray]:
    """W_QK and W_VO of one head as d_model x d_model matrices, from the definition."""
    attn = params["blocks"]["attn"]
    kernel = {name: attn[name]["kernel"][layer].astype(np.float64) for name in ("q", "k", "v", "o")}
    r, group = config.head_dim, head // (config.n_heads // config.n_kv_heads)
    gain = np.diag(params["blocks"]["attn_norm"]["scale"][layer].astype(np.float64)) if fold_norms else np.eye(config.d_model)
    before, after = (gain, np.eye(config.d_model)) if config.norm_position == "pre" else (np.eye(config.d_model), gain)
    if config.qk_norm and fold_norms:
        kernel |= {name: kernel[name] @ np.diag(attn[f"{name}_norm"]["scale"][layer]) for name in ("q", "k")}
    own, shared = slice(head * r, (head + 1) * r), slice(group * r, (group + 1) * r)
    return before @ kernel["q"][:, own] @ (before @ kernel["k"][:, shared]).T, before @ kernel["v"][:, shared] @ kernel["o"][own] @ after


@pytest.mark.parametrize("fold_norms", [False, True])
@pytest.mark.parametrize("olmo2", [False, True])
@pytest.mark.parametrize("n_heads, n_kv_heads", [(6, 2), (4, 4), (1, 1)])
def test_spectra_are_those_of_the_full_products(fold_norms, olmo2, n_heads, n_kv_heads):
    family = {"norm_position": "post", "qk_norm": True} if olmo2 else {}
    config = ModelConfig(vocab_size=300, d_model=24, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=32, **family)
    params = random_blocks(config, seed=n_heads)
    spectra = attention_spectra((config, params), fold_norms=fold_norms)
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            for name, product in zip(("W_QK", "W_VO"), full_products(config, params, layer, head, fold_norms)):
                expected = np.linalg.svd(product, compute_uv=False)[: config.head_dim]
                np.testing.assert_allclose(spectra[name][layer, head], expected, atol=2e-6 * expected[0])
    assert spectra["W_QK"].shape == spectra["W_VO"].shape == (2, n_heads, config.head_dim)


@pytest.mark.parametrize("fold_norms", [False, True])
def test_norms_balancedness_and_the_norm_of_noise_are_those_of_the_definition(fold_norms):
    config = ModelConfig(vocab_size=300, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=32, qk_norm=True)
    params = random_blocks(config, seed=3)
    found, attn, r = attention_products((config, params), fold_norms), params["blocks"]["attn"], config.head_dim
    for layer, head in ((0, 0), (1, 4)):
        own, shared = slice(head * r, (head + 1) * r), slice(head // 3 * r, (head // 3 + 1) * r)
        gain = params["blocks"]["attn_norm"]["scale"][layer][:, None] if fold_norms else 1.0
        scale = [attn[f"{name}_norm"]["scale"][layer][columns] if fold_norms else 1.0 for name, columns in (("q", own), ("k", shared))]
        kernel = {name: attn[name]["kernel"][layer].astype(np.float64) for name in "qkvo"}
        factors = {
            "W_QK": (gain * kernel["q"][:, own] * scale[0], gain * kernel["k"][:, shared] * scale[1]),
            "W_VO": (gain * kernel["v"][:, shared], kernel["o"][own].T),
        }
        rng = np.random.default_rng(0)
        for name, (a, b) in factors.items():
            values = {key: value[layer, head] for key, value in found[name].items()}
            assert values["left_norm"] == pytest.approx(np.linalg.norm(a), rel=1e-5)
            assert values["right_norm"] == pytest.approx(np.linalg.norm(b), rel=1e-5)
            assert values["balancedness"] == pytest.approx(np.linalg.norm(a.T @ a - b.T @ b), rel=1e-4)
            if name == "W_QK":
                of_a, of_b = gain * np.ones_like(a) * scale[0], gain * np.ones_like(b) * scale[1]
            else:
                of_a, of_b = gain * np.ones_like(a), np.ones_like(b)
            drawn = [np.linalg.norm((of_a * rng.normal(size=a.shape)) @ (of_b * rng.normal(size=b.shape)).T) ** 2 for _ in range(2000)]
            assert values["unit_noise_norm"] ** 2 == pytest.approx(np.mean(drawn), rel=6 * np.std(drawn) / np.mean(drawn) / 2000**0.5)


def test_balanced_factors_have_balancedness_zero_and_a_nuclear_norm_of_half_their_squares():
    rng, config = np.random.default_rng(0), ModelConfig(vocab_size=300, d_model=24, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=32)
    u, v = (np.linalg.qr(rng.normal(size=(24, 24)))[0] for _ in range(2))
    root = np.sqrt(rng.uniform(0.1, 3.0, size=24))
    params = random_blocks(config, seed=0)
    for name, kernel in (("q", u * root), ("k", v * root)):
        params["blocks"]["attn"][name]["kernel"] = kernel.astype(np.float32)[None]
    found = {name: value[0, 0] for name, value in attention_products((config, params))["W_QK"].items()}
    assert found["balancedness"] < 1e-4
    nuclear = spectra_summary(found["singular_values"])["nuclear_norm"]
    assert nuclear == pytest.approx((found["left_norm"] ** 2 + found["right_norm"] ** 2) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["noise", "signal"])
def test_a_planted_rank_stands_above_the_floor_and_noise_of_full_rank_does_not(kind):
    """NumPy in float64: rank two of norm 5 each, and independent weights of a deviation of 0.01, whose product has the norm d sigma^2 sqrt(r)."""
    d, r, sigma, rng = 256, 32, 0.01, np.random.default_rng(1)
    a, b = (rng.normal(scale=sigma, size=(d, r)) for _ in range(2))
    if kind == "signal":
        left, right = (np.linalg.qr(rng.normal(size=(d, 2)))[0] for _ in range(2))
        a[:, :2], b[:, :2] = left * 5**0.5, right * 5**0.5
    s = np.linalg.svd(a @ b.T, compute_uv=False)[:r]
    of_noise = d * sigma**2 * r**0.5
    norms = {"left_norm": np.linalg.norm(a), "right_norm": np.linalg.norm(b), "unit_noise_norm": d * r**0.5}
    product = {"singular_values": s[None, None]} | {name: np.full((1, 1), value) for name, value in norms.items()}
    floor, norm = noise_floor(product, sigma**2)[0, 0], float(spectra_summary(s)["frobenius_norm"])
    assert floor == pytest.approx(of_noise)
    if kind == "noise":
        assert norm == pytest.approx(floor, rel=0.05) and pseudo_rank(s) > 0.8
        # What decay leaves of the same weights has the same rank and a norm far below the floor.
        assert pseudo_rank(s * 1e-4) == pseudo_rank(s) and norm * 1e-4 < floor
    else:
        assert norm == pytest.approx((50 + of_noise**2 * (30 / 32)) ** 0.5, rel=0.01) and norm > 10 * floor and pseudo_rank(s) < 0.6
    # Rounding alone: head_dim * 2^-23 * both norms; a zero matrix is at its floor of zero.
    assert noise_floor(product, None)[0, 0] == pytest.approx(r * 2**-23 * norms["left_norm"] * norms["right_norm"])
    assert noise_floor({name: 0 * value for name, value in product.items()}, None)[0, 0] == 0.0


def test_the_variance_of_noise_has_its_closed_forms():
    rate, decay = 3e-3, 0.5
    kept = (1 - rate * decay) ** 2
    assert noise_variance(np.full(400, rate), np.full(400, rate * decay)) == pytest.approx(rate**2 * (1 - kept**400) / (1 - kept))
    assert noise_variance(np.full(100_000, rate), np.full(100_000, rate * decay)) == pytest.approx(rate / (2 * decay), rel=1e-3)
    assert noise_variance(np.full(7, rate), np.zeros(7), start=0.25) == pytest.approx(0.25 + 7 * rate**2)
    assert noise_variance(np.zeros(0), np.zeros(0), start=0.5) == 0.5


def test_adam_on_gradients_of_noise_stays_within_the_variance():
    """AdamW by hand in float64, on white noise whose size differs by weight and falls: steps of learning rate, decay, both moments with bias correction."""
    rng, steps, decay, b1, b2 = np.random.default_rng(0), 600, 4.0, 0.9, 0.95
    rates = 5e-3 * np.minimum(np.arange(steps) / 60, 0.1 + 0.9 * (1 - np.arange(steps) / steps))
    w, m, v, size = np.zeros(4000), np.zeros(4000), np.zeros(4000), 10.0 ** rng.uniform(-4, 1, size=4000)
    for t, rate in enumerate(rates):
        g = size * rng.normal(size=4000) * (1 - t / steps)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = (1 - rate * decay) * w - rate * (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
    assert 0.7 < w.var() / noise_variance(rates, rates * decay) < 1.2


def test_no_two_decompositions_can_run_at_once():
    """Two calls of LAPACK in one program of a CPU can wait for each other's threads forever."""
    factor = jax.ShapeDtypeStruct((5, CONFIG.d_model, CONFIG.head_dim), "float32")
    one_chain = jax.jit(_triangular).lower(factor).compile().as_text()
    program = lower_spectra(CONFIG, abstract_params(CONFIG), False, jax.sharding.Mesh(jax.devices()[:1], ("data",))).compile().as_text()
    assert program.count('"lapack_sgeqrf_ffi"') == one_chain.count('"lapack_sgeqrf_ffi"') > 1
    assert program.count('"lapack_sgesdd_ffi"') == 1


def test_a_loaded_model_and_a_pair_give_the_same():
    params = random_blocks(CONFIG, seed=0)
    model = type("Model", (), {"config": CONFIG, "params": params})()
    for name, values in analysis.attention_spectra(model).items():
        np.testing.assert_array_equal(values, attention_spectra((CONFIG, params))[name])


def test_a_planted_rank_one_head_is_found():
    params = random_blocks(CONFIG, seed=1)
    q = params["blocks"]["attn"]["q"]["kernel"]
    q[1, :, 8:12] = np.outer(q[1, :, 8], [1.0, 2.0, -1.0, 0.5])
    ranks = pseudo_rank(attention_spectra((CONFIG, params))["W_QK"], mass=0.999)
    assert ranks[1, 2] == 0.25
    assert (np.delete(ranks.ravel(), 8) > 0.25).all()


def loop_pseudo_rank(s, mass, power):
    """The definition, one value after the other."""
    values = [float(v) ** power for v in s]
    for count in range(1, len(values) + 1):
        if sum(values[:count]) >= mass * sum(values):
            return count / len(values)
    raise AssertionError


SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=24).map(lambda v: np.sort(v)[::-1])


@given(SPECTRA, st.floats(0.05, 0.999), st.sampled_from([1, 2]), st.floats(1e-6, 1e6))
def test_pseudo_rank_is_the_loop_lies_in_its_bounds_and_ignores_scale(s, mass, power, scale):
    # Where a sum meets the mass exactly, rounding decides; the next test has those cases.
    assume(np.abs(np.cumsum(s**power) / np.sum(s**power) - mass).min() > 1e-9)
    value = float(pseudo_rank(s, mass=mass, power=power))
    assert value == loop_pseudo_rank(s, mass, power)
    assert 1 / len(s) <= value <= 1
    assert value == float(pseudo_rank(s * scale, mass=mass, power=power))


@given(st.integers(1, 64), st.integers(1, 64), st.floats(1e-30, 1e30))
def test_pseudo_rank_of_equal_values_is_the_share_itself(r, k, scale):
    k = min(k, r)
    assert float(pseudo_rank(np.full(r, scale), mass=k / r)) == k / r


def test_pseudo_rank_of_known_spectra():
    assert pseudo_rank(np.ones(20)) == 0.95
    assert pseudo_rank(np.ones(24)) == 23 / 24
    assert pseudo_rank([3.0] + [0.0] * 7) == 1 / 8
    assert pseudo_rank(np.zeros(8)) == 1 / 8
    assert pseudo_rank([3.0, 2.0, 1.0, 0.0], mass=1.0) == 3 / 4
    # 8 of 10 against 64 of 68: squares need fewer.
    assert pseudo_rank([8.0, 2.0], mass=0.9) == 1.0 and pseudo_rank([8.0, 2.0], mass=0.9, power=2) == 0.5
    assert np.isnan(pseudo_rank([[np.inf, 1.0], [1.0, 0.0]])).tolist() == [True, False]
    assert pseudo_rank(np.ones((2, 3, 5))).shape == (2, 3)
    assert pseudo_rank(np.float32([1e-30, 1e-30]), power=2) == 1.0


@pytest.mark.parametrize(
    "s, options",
    [
        ([1.0, 0.5], {"mass": 0.0}),
        ([1.0, 0.5], {"mass": 1.1}),
        ([1.0, 0.5], {"power": 3}),
        ([0.5, 1.0], {}),
        ([1.0, -0.5], {}),
        ([], {}),
    ],
)
def test_pseudo_rank_refuses_in_one_line(s, options):
    with pytest.raises(ValueError) as error:
        pseudo_rank(np.asarray(s, np.float64), **options)
    assert "\n" not in str(error.value)


def test_summary_agrees_with_norms_of_the_matrix():
    matrix = np.random.default_rng(0).normal(size=(9, 6))
    summary = spectra_summary(np.linalg.svd(matrix, compute_uv=False))
    assert summary["nuclear_norm"] == pytest.approx(np.linalg.norm(matrix, "nuc"))
    assert summary["frobenius_norm"] == pytest.approx(np.linalg.norm(matrix))
    assert summary["stable_rank"] == pytest.approx(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
    # Entropy of two thirds and one third.
    assert spectra_summary(np.array([2.0, 1.0]))["effective_rank"] == pytest.approx(3 / 2 ** (2 / 3))


def test_summary_of_flat_rank_one_and_zero_spectra():
    flat, one, zero = (spectra_summary(np.asarray(s)) for s in (np.full(7, 0.3), [4.0, 0.0, 0.0], np.zeros(3)))
    assert flat["stable_rank"] == pytest.approx(7) and flat["effective_rank"] == pytest.approx(7)
    assert one["stable_rank"] == 1 and one["effective_rank"] == pytest.approx(1)
    assert all(float(value) == 0 for value in zero.values())


# The shape that the other stage tests use, so that its initialization compiles once.
STAGE_CONFIG = ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)


def test_the_noise_of_a_model_is_read_from_its_runs(tmp_path):
    """A base with a wsd schedule and independent decay, then a fine-tuning with its own; a loop in float64."""
    config = StudyConfig(model=STAGE_CONFIG)
    train = {"peak_lr": 2e-3, "schedule": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.2, "final_lr_fraction": 0.1}
    pretrain = Run("t", "pretrain", "wd2", {"train": train, "decay": {"kind": "independent"}, "weight_decay": 0.02}, member="wd2", seed=0)
    recipe = {"peak_lr": 1e-3, "warmup_fraction": 0.1, "weight_decay": 0.3}
    base, tuned = RunDirectory(tmp_path / "base"), RunDirectory(tmp_path / "tuned")
    for directory, run, steps in (
        (base, pretrain, 50),
        (tuned, Run("t", "finetune", "x", recipe, {"base": "pretrain/wd2-0123abcd"}, task="topic"), 30),
    ):
        with directory.work(run, config):
            directory.provenance["parent_paths"] = {"base": "../base"}
            directory.finish({"diverged": None, "steps": steps})
    variance = 0.0
    for t in range(50):
        shape = t / 5 if t < 5 else 1.0 if t < 40 else 0.1 + 0.9 * (50 - t) / 10
        variance = (1 - 0.02 * shape) ** 2 * variance + (2e-3 * shape) ** 2
    assert stage._noise_variance(base.path) == pytest.approx(variance, rel=1e-5)
    for t in range(30):
        rate = 1e-3 * (t / 3 if t < 3 else 0.5 + 0.5 * np.cos(np.pi * (t - 3) / 27))
        variance = (1 - 0.3 * rate) ** 2 * variance + rate**2
    assert stage._noise_variance(tuned.path) == pytest.approx(variance, rel=1e-5)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert stage._noise_variance(tuned.path) is None and stage._noise_variance(tmp_path) is None


def test_stage_writes_what_the_functions_give(tmp_path):
    config = StudyConfig(model=STAGE_CONFIG, spectra=SpectraConfig(mass=0.9, power=2, fold_norms=True))
    params = init_params(STAGE_CONFIG, seed=1)
    params["blocks"]["attn_norm"]["scale"] = params["blocks"]["attn_norm"]["scale"].at[1].set(3.0)
    directory = RunDirectory(tmp_path / "model")
    with directory.work(Run("t", "pretrain", "wd0", {}, member="wd0", seed=0), config):
        with Checkpoints(directory.path / "checkpoints", asynchronous=False) as checkpoints:
            checkpoints.save(0, params)
        directory.finish({"diverged": None})
    results = asdict(stage.run(Context(config, Run("t", "spectra", "wd0", {}), RunDirectory(tmp_path / "spectra"), {"model": directory.path})))
    for name, values in attention_spectra((STAGE_CONFIG, params), fold_norms=True).items():
        np.testing.assert_allclose(results[name]["singular_values"], values, rtol=1e-6)
        np.testing.assert_array_equal(results[name]["pseudo_rank"], pseudo_rank(values, mass=0.9, power=2))
        assert {"stable_rank", "effective_rank", "nuclear_norm", "frobenius_norm"} <= set(results[name])
    assert results["norm_gains"] == {"blocks/attn_norm/scale": [1.0, 3.0], "blocks/mlp_norm/scale": [1.0, 1.0], "final_norm/scale": 1.0}
    assert (results["mass"], results["power"], results["fold_norms"]) == (0.9, 2, True)
    json.dumps(results, allow_nan=False)
