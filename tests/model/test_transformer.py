import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from plasticity_jax.config import ModelConfig, RopeScaling
from plasticity_jax.config.presets import presets
from plasticity_jax.model import abstract_params, count_params, init_params, transformer
from plasticity_jax.model.param_count import count_matmul_params
from plasticity_jax.parallel import param_paths

CONFIG = ModelConfig(vocab_size=50, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=20)
OLMO2 = dataclasses.replace(CONFIG, norm_position="post", qk_norm=True, norm_eps=1e-6, rope_theta=500000.0, init="truncated")
# Of wavelengths 6.3 to 63,000 tokens: kept, interpolated and stretched ones.
LLAMA3 = dataclasses.replace(CONFIG, d_head=10, tie_embeddings=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))
apply = functools.partial(jax.jit, static_argnums=0, static_argnames=("capture", "compute_dtype", "scan_layers", "remat"))(transformer.apply)
EVERYTHING = ("embed", "block_out", "final_norm", "mlp_act", "attn_probs")


def perturbed(config):
    """Initial parameters with norm gains away from 1, so that a forgotten gain shows."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(generator.normal(0, 0.1, x.shape), jnp.float32), init_params(config, 3))


@pytest.fixture(scope="module")
def params():
    return perturbed(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 9))


def frequencies(config):
    """Rotary frequencies; with scaling, as Hugging Face's "llama3" rope type describes them, wavelength by wavelength."""
    half = config.head_dim // 2
    plain = [1 / config.rope_theta ** (2 * i / config.head_dim) for i in range(half)]
    if config.rope_scaling is None:
        return plain
    scaling, scaled = config.rope_scaling, []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength > scaling.original_length / scaling.low_freq_factor:
            scaled.append(frequency / scaling.factor)
        elif wavelength < scaling.original_length / scaling.high_freq_factor:
            scaled.append(frequency)
        else:
            smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return scaled


def reference(config, params, tokens_T, positions_T, may_read):
    """The decoder of the paper for one sequence, token by token and head by head, in NumPy float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, dim, half = len(tokens_T), config.head_dim, config.head_dim // 2
    pre, frequency = config.norm_position == "pre", frequencies(config)

    def rms_norm(x, gain):
        return gain * x / np.sqrt(np.mean(x**2) + config.norm_eps)

    def rotate(x, position):
        y = np.empty(dim)
        for i in range(half):
            angle = position * frequency[i]
            y[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            y[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return y

    x = [p["embed"]["embedding"][t] for t in tokens_T]
    captured = {"embed": np.array(x), "block_out": [], "mlp_act": [], "attn_probs": []}
    for layer in range(config.n_layers):
        b = jax.tree.map(lambda w: w[layer], p["blocks"])
        read = [rms_norm(v, b["attn_norm"]["scale"]) if pre else v for v in x]
        q, k, v = ([n @ b["attn"][name]["kernel"] for n in read] for name in "qkv")
        if config.qk_norm:
            q, k = ([rms_norm(n, b["attn"][f"{name}_norm"]["scale"]) for n in rows] for name, rows in (("q", q), ("k", k)))
        q, k, v = ([n.reshape(-1, dim) for n in rows] for rows in (q, k, v))
        probs = np.zeros((config.n_heads, length, length))
        for t in range(length):
            heads = []
            for head in range(config.n_heads):
                shared = head // (config.n_heads // config.n_kv_heads)
                readable = [s for s in range(t + 1) if may_read(t, s)]
                query = rotate(q[t][head], positions_T[t])
                scores = np.array([query @ rotate(k[s][shared], positions_T[s]) / np.sqrt(dim) for s in readable])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                probs[head, t, readable] = weights
                heads.append(sum(w * v[s][shared] for w, s in zip(weights, readable)))
            out = np.concatenate(heads) @ b["attn"]["o"]["kernel"]
            x[t] = x[t] + (out if pre else rms_norm(out, b["attn_norm"]["scale"]))
        acts = []
        for t in range(length):
            read_t = rms_norm(x[t], b["mlp_norm"]["scale"]) if pre else x[t]
            gate = read_t @ b["mlp"]["gate"]["kernel"]
            acts.append(gate / (1 + np.exp(-gate)) * (read_t @ b["mlp"]["up"]["kernel"]))
            out = acts[t] @ b["mlp"]["down"]["kernel"]
            x[t] = x[t] + (out if pre else rms_norm(out, b["mlp_norm"]["scale"]))
        captured["block_out"].append(np.array(x))
        captured["mlp_act"].append(np.array(acts))
        captured["attn_probs"].append(probs)
    captured["final_norm"] = np.array([rms_norm(v, p["final_norm"]["scale"]) for v in x])
    return captured["final_norm"] @ (p["embed"]["embedding"].T if config.tie_embeddings else p["head"]["kernel"]), captured


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("config", [CONFIG, OLMO2, LLAMA3], ids=["llama", "olmo2", "llama3"])
def test_forward_and_captures_equal_a_float64_reference(config, tokens, scan_layers):
    params, positions = perturbed(config), np.arange(9) * 11
    logits, activations = apply(config, params, tokens, positions=np.tile(positions, (3, 1)), capture=EVERYTHING, scan_layers=scan_layers)
    assert logits.dtype == jnp.float32
    for row in range(len(tokens)):
        expected, captured = reference(config, params, tokens[row], positions, lambda t, s: True)
        np.testing.assert_allclose(logits[row], expected, atol=2e-5)
        for name in ("embed", "final_norm"):
            np.testing.assert_allclose(activations[name][row], captured[name], atol=2e-5, err_msg=name)
        for name in ("block_out", "mlp_act", "attn_probs"):
            np.testing.assert_allclose(activations[name][:, row], np.array(captured[name]), atol=2e-5, err_msg=name)


def test_segments_and_positions_equal_a_float64_reference(params, tokens):
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]] * 3)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]] * 3)
    logits, _ = apply(CONFIG, params, tokens, segment_ids=segments, positions=positions)
    expected, _ = reference(CONFIG, params, tokens[0], positions[0], lambda t, s: segments[0][t] == segments[0][s])
    np.testing.assert_allclose(logits[0], expected, atol=2e-5)


def test_a_segment_is_a_sequence_of_its_own(params, tokens):
    tokens = tokens[:, :8]
    together, _ = apply(CONFIG, params, tokens, segment_ids=np.array([[1] * 4 + [2] * 4] * 3), positions=np.array([[*range(4), *range(4)]] * 3))
    np.testing.assert_allclose(together[:, :4], apply(CONFIG, params, tokens[:, :4])[0], atol=1e-5)
    np.testing.assert_allclose(together[:, 4:], apply(CONFIG, params, tokens[:, 4:])[0], atol=1e-5)


def test_padding_is_never_read(params, tokens):
    segments = np.array([[1] * 6 + [0] * 3] * 3)
    logits, _ = apply(CONFIG, params, tokens, segment_ids=segments)
    changed, _ = apply(CONFIG, params, np.where(segments == 0, 7, tokens), segment_ids=segments)
    np.testing.assert_array_equal(logits[:, :6], changed[:, :6])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("compute_dtype", [jnp.float32, jnp.bfloat16])
def test_changing_a_token_leaves_logits_before_it_bit_equal(params, tokens, compute_dtype):
    forward = functools.partial(apply, CONFIG, params, compute_dtype=compute_dtype)
    logits, _ = forward(tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % CONFIG.vocab_size
        after, _ = forward(changed)
        np.testing.assert_array_equal(logits[:, :t], after[:, :t])
        assert (logits[:, t:] != after[:, t:]).any(axis=(0, 2)).all()  # and every later position reads it


def test_bfloat16_stays_near_float32_and_returns_float32_logits(params, tokens):
    exact, _ = apply(CONFIG, params, tokens)
    rounded, activations = apply(CONFIG, params, tokens, compute_dtype=jnp.bfloat16, capture=("block_out", "attn_probs"))
    assert rounded.dtype == jnp.float32 and activations["block_out"].dtype == jnp.bfloat16 and activations["attn_probs"].dtype == jnp.float32
    assert 0 < np.linalg.norm(rounded - exact) < 0.03 * np.linalg.norm(exact)


def test_captures_have_the_promised_names_and_shapes(params, tokens):
    shapes = {"embed": (3, 9, 24), "block_out": (2, 3, 9, 24), "final_norm": (3, 9, 24), "mlp_act": (2, 3, 9, 20), "attn_probs": (2, 3, 6, 9, 9)}
    for name, shape in shapes.items():
        _, activations = jax.eval_shape(lambda p, t: apply(CONFIG, p, t, capture=(name,)), params, tokens)
        assert {k: v.shape for k, v in activations.items()} == {name: shape}
    assert apply(CONFIG, params, tokens)[1] == {}


def test_probabilities_from_a_kernel_that_never_holds_them_are_refused(params, tokens):
    with pytest.raises(ValueError, match="attention='splash': the kernel never materializes the probabilities; use attention='xla'"):
        transformer.apply(CONFIG, params, tokens, capture=("attn_probs",), attention="splash")


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, pytest.param(OLMO2, marks=pytest.mark.nightly)], ids=["llama", "olmo2"])
def test_remat_saves_memory_and_changes_no_gradient(config):
    """Temporary memory of the gradient with scanned layers, from the compiler: none > dots > full. The same products, so the same gradients."""
    config = dataclasses.replace(config, n_layers=8)
    params, tokens = perturbed(config), np.random.default_rng(2).integers(0, 50, (8, 64))

    def loss(params, remat, scan_layers):
        logits, _ = transformer.apply(config, params, tokens, scan_layers=scan_layers, remat=remat)
        return jnp.mean(jnp.square(logits))

    gradient, sizes = {}, {}
    for remat in ("none", "dots", "full"):
        compiled = jax.jit(jax.grad(loss), static_argnums=(1, 2)).lower(params, remat, True).compile()
        gradient[remat], sizes[remat] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
    assert sizes["none"] > 1.5 * sizes["dots"] and sizes["dots"] > 1.5 * sizes["full"], sizes
    unrolled = jax.jit(jax.grad(loss), static_argnums=(1, 2))(params, "full", False)
    for other in (gradient["dots"], gradient["full"], unrolled):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max())), other, gradient["none"])


def test_unknown_capture_names_the_known(params, tokens):
    with pytest.raises(ValueError, match="'residual' is unknown; known: embed, block_out, final_norm, mlp_act, attn_probs"):
        apply(CONFIG, params, tokens, capture=("embed", "residual"))


def test_what_is_not_captured_costs_nothing(params, tokens):
    """The compiled program returns the logits alone, and holds no array of all layers' activations."""
    without, dear = (apply.lower(CONFIG, params, tokens, capture=capture).compile() for capture in ((), ("attn_probs",)))
    probs_bytes = 4 * 2 * 3 * 6 * 9 * 9
    assert dear.memory_analysis().output_size_in_bytes - without.memory_analysis().output_size_in_bytes >= probs_bytes
    assert "f32[2,3,6,9,9]" in dear.as_text() and "f32[2,3,6,9,9]" not in without.as_text()


def test_count_params_equals_the_papers_numbers():
    assert count_params(presets()["llama-0.5b"]) == 500_921_856
    assert count_params(presets()["llama-1b"]) == 1_000_564_736
    assert count_params(presets()["llama-4b"]) == 4_000_288_768
    assert count_params(presets()["olmo2-1b"]) == 1_484_916_736
    assert round(count_params(presets()["llama-125m"]) / 1e5) == 1282
    assert set(presets()) == {f"llama-{size}" for size in ("125m", "250m", "0.5b", "1b", "2b", "4b")} | {"olmo2-1b"}
    assert count_params(CONFIG) == sum(x.size for x in jax.tree.leaves(init_params(CONFIG, 0)))


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"d_head": 48}])
@pytest.mark.parametrize("name", presets())
def test_parameter_counts_equal_those_of_the_tree(name, change):
    config = dataclasses.replace(presets()[name], **change)
    sizes = {path: math.prod(leaf.shape) for path, leaf in zip(param_paths(abstract_params(config)), jax.tree.leaves(abstract_params(config)))}
    assert count_params(config) == sum(sizes.values())
    in_matmuls = [path for path in sizes if path.endswith("/kernel") or (config.tie_embeddings and path == "embed/embedding")]
    assert count_matmul_params(config) == sum(sizes[path] for path in in_matmuls)


def test_parameter_tree_is_the_documented_one():
    shapes = dict(zip(param_paths(abstract_params(CONFIG)), (x.shape for x in jax.tree.leaves(abstract_params(CONFIG)))))
    assert shapes == {
        "embed/embedding": (50, 24),
        "blocks/attn_norm/scale": (2, 24),
        "blocks/attn/q/kernel": (2, 24, 24),
        "blocks/attn/k/kernel": (2, 24, 8),
        "blocks/attn/v/kernel": (2, 24, 8),
        "blocks/attn/o/kernel": (2, 24, 24),
        "blocks/mlp_norm/scale": (2, 24),
        "blocks/mlp/gate/kernel": (2, 24, 20),
        "blocks/mlp/up/kernel": (2, 24, 20),
        "blocks/mlp/down/kernel": (2, 20, 24),
        "final_norm/scale": (24,),
        "head/kernel": (24, 50),
    }
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(abstract_params(CONFIG)))
    olmo2 = {"blocks/attn/q_norm/scale": (2, 24), "blocks/attn/k_norm/scale": (2, 8)}
    assert dict(zip(param_paths(abstract_params(OLMO2)), (x.shape for x in jax.tree.leaves(abstract_params(OLMO2))))) == shapes | olmo2
    wide = {"blocks/attn/q/kernel": (2, 24, 60), "blocks/attn/o/kernel": (2, 60, 24)} | {f"blocks/attn/{x}/kernel": (2, 24, 20) for x in "kv"}
    tied = {path: shape for path, shape in (shapes | wide).items() if path != "head/kernel"}
    assert dict(zip(param_paths(abstract_params(LLAMA3)), (x.shape for x in jax.tree.leaves(abstract_params(LLAMA3))))) == tied


def test_initialization_follows_the_paper_and_the_seed():
    config = ModelConfig(vocab_size=512, d_model=64, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=160)
    params = init_params(config, 5)
    for path, leaf in zip(param_paths(params), jax.tree.leaves(params)):
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
            continue
        into_residual = path.endswith(("attn/o/kernel", "mlp/down/kernel"))
        std = 1 / (4 * np.sqrt(64)) if into_residual else np.sqrt(2 / (5 * 64))
        assert abs(float(leaf.std()) / std - 1) < 0.03, path
        assert abs(float(leaf.mean())) < 5 * std / np.sqrt(leaf.size), path
    layers = params["blocks"]["attn"]["q"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])
    jax.tree.map(np.testing.assert_array_equal, params, init_params(config, 5))
    assert not np.array_equal(layers, init_params(config, 6)["blocks"]["attn"]["q"]["kernel"])


def test_truncated_initialization_is_olmo2s():
    """N(0, 0.02) cut at three standard deviations, which takes 1.3% off its spread; against scipy's truncated normal."""
    config = dataclasses.replace(OLMO2, vocab_size=512, d_model=64, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=160)
    params = init_params(config, 5)
    for path, leaf in zip(param_paths(params), jax.tree.leaves(params)):
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        else:
            assert float(jnp.abs(leaf).max()) <= 0.06 and float(jnp.abs(leaf).max()) > 0.055, path
    drawn = np.concatenate([np.ravel(leaf) for path, leaf in zip(param_paths(params), jax.tree.leaves(params)) if path.endswith("kernel")])
    assert scipy.stats.kstest(drawn / 0.02, scipy.stats.truncnorm(-3, 3).cdf).pvalue > 0.001
