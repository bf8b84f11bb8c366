"""Probes against scikit-learn; features against single, unpadded texts."""

import functools
import json
from dataclasses import asdict

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from plasticity_jax.analysis import probes
from plasticity_jax.analysis.probes import bag_of_words, features, fit_probe, fit_probes
from plasticity_jax.config import ModelConfig, ProbeConfig, StudyConfig
from plasticity_jax.data.probe_sets import write_probe_set
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import apply, init_params
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import probe
from plasticity_jax.stages.stage import Context

# Most tests fit 200 rows of 12 features and 4 classes: each shape compiles anew, for seconds.
N, D, CLASSES = 200, 12, 4


def clouds(n: int, seed: int, *, noise: float = 1.6) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping Gaussian clouds, with features of very different scales and offsets."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, D))
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=n)
    x = centres[y] + noise * rng.normal(size=(n, D))
    return (x * np.logspace(-2, 2, D) + np.linspace(-50, 50, D)).astype(np.float32), y


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_fit_agrees_with_scikit_learn(l2):
    (x_train, y_train), (x_test, y_test) = clouds(N, 0), clouds(300, 1)
    result = fit_probe(x_train, y_train, x_test, y_test, l2=(l2,))
    scaler = StandardScaler().fit(x_train.astype(np.float64))
    # Scikit-learn minimizes C · (sum of losses) + ||W||²/2.
    reference = LogisticRegression(C=1 / (l2 * len(x_train)), tol=1e-10, max_iter=5000).fit(scaler.transform(x_train), y_train)
    expected = reference.predict(scaler.transform(x_test))
    assert result.converged
    np.testing.assert_allclose(result.weights, reference.coef_.T, atol=2e-3)
    # A constant added to all biases changes nothing.
    np.testing.assert_allclose(result.bias - result.bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-3)
    np.testing.assert_array_equal(result.correct, expected == y_test)
    assert result.accuracy == np.mean(expected == y_test)
    assert result.per_class == {c: np.mean(expected[y_test == c] == c) for c in range(4)}


def test_penalty_is_the_best_on_rows_that_it_was_not_fitted_to():
    rng = np.random.default_rng(3)
    # Many features of pure noise: without a strong penalty the probe fits them.
    x = rng.normal(size=(1200, 60))
    y = (x[:, 0] + 1.5 * rng.normal(size=1200) > 0).astype(int)
    result = fit_probe(x[:200], y[:200], x[200:], y[200:], l2=(1e-5, 1e-1))
    assert result.l2 == 1e-1
    assert result.validation_loss[1e-1] < result.validation_loss[1e-5]
    weak = fit_probe(x[:200], y[:200], x[200:], y[200:], l2=(1e-5,))
    assert result.accuracy > weak.accuracy and weak.validation_loss == {}


def test_chosen_penalty_is_fitted_again_to_all_rows_whatever_the_candidates():
    (x_train, y_train), (x_test, y_test) = clouds(N, 0), clouds(100, 1)
    chosen = fit_probe(x_train, y_train, x_test, y_test, l2=(1e-2, 10.0))
    alone = fit_probe(x_train, y_train, x_test, y_test, l2=(1e-2,))
    assert chosen.l2 == 1e-2
    np.testing.assert_allclose(chosen.weights, alone.weights, atol=1e-6)


def test_standardised_fit_ignores_scale_and_offset_of_features():
    (x_train, y_train), (x_test, y_test) = clouds(N, 0), clouds(300, 1)
    plain = fit_probe(x_train, y_train, x_test, y_test)
    moved = fit_probe(x_train * 8 + 4, y_train, x_test * 8 + 4, y_test)
    assert moved.l2 == plain.l2 and abs(moved.accuracy - plain.accuracy) < 0.01
    raw = fit_probe(x_train, y_train, x_test, y_test, standardize=False, l2=(1.0,))
    assert (raw.scale == 1).all() and (raw.mean == 0).all()


def test_constant_features_and_string_labels_are_harmless():
    (x_train, y_train), (x_test, y_test) = clouds(N, 0), clouds(100, 1)
    # In float64 the mean of 200 times 1.1 rounds, and leaves a deviation of 4e-16.
    x_train, x_test = x_train.astype(np.float64), x_test.astype(np.float64)
    x_train[:, 5] = x_test[:, 5] = 1.1
    assert x_train[:, 5].std() > 0
    names = np.array(["arts", "money", "news", "sport"])
    result = fit_probe(x_train, names[y_train], x_test, names[y_test], l2=(1e-2,))
    scaler = StandardScaler().fit(x_train[:, np.arange(D) != 5].astype(np.float64))
    reference = LogisticRegression(C=1 / (1e-2 * N), tol=1e-10, max_iter=5000).fit(scaler.transform(x_train[:, np.arange(D) != 5]), y_train)
    np.testing.assert_array_equal(result.correct, reference.predict(scaler.transform(x_test[:, np.arange(D) != 5])) == y_test)
    assert np.abs(result.weights[5]).max() < 1e-6 and result.scale[5] == 1
    assert set(result.per_class) == set(result.classes) == set(names.tolist())
    json.dumps(result.per_class)


def test_separable_classes_without_penalty_end():
    (x_train, y_train), (x_test, y_test) = clouds(N, 0, noise=0.01), clouds(100, 1, noise=0.01)
    result = fit_probe(x_train, y_train, x_test, y_test, l2=(0.0,))
    assert result.accuracy == 1.0 and np.isfinite(result.weights).all()


def correlated_layers(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three layers of features whose variance lies in few directions, as in hidden states; hundreds of plain gradient steps apart from their fit."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=n)
    layers = []
    for strength in (0.2, 0.5, 1.0):
        mixing = fixed.normal(size=(40, 40)) * np.arange(1, 41) ** -1.0
        layers.append((strength * fixed.normal(size=(CLASSES, 40))[y] + rng.normal(size=(n, 40))) @ mixing.T + 5)
    return np.stack(layers).astype(np.float32), y


def test_layers_fitted_together_agree_with_scikit_learn_one_by_one():
    (x_train, y_train), (x_test, y_test) = correlated_layers(500, 0), correlated_layers(300, 1)
    penalties = (1e-3, 1e-2, 1e-1)
    together = fit_probes(x_train, y_train, x_test, y_test, l2=penalties, seed=0, standardize=True)
    held = probes._validation_rows(np.asarray(y_train), 0)
    for x, x_new, result in zip(x_train.astype(np.float64), x_test.astype(np.float64), together, strict=True):
        chosen = LogisticRegression(C=1 / (result.l2 * len(x)), tol=1e-10, max_iter=10_000)
        for penalty in penalties:
            scaler = StandardScaler().fit(x[~held])
            fit = LogisticRegression(C=1 / (penalty * (~held).sum()), tol=1e-10, max_iter=10_000).fit(scaler.transform(x[~held]), y_train[~held])
            expected = log_loss(y_train[held], fit.predict_proba(scaler.transform(x[held])))
            assert result.validation_loss[penalty] == pytest.approx(expected, abs=2e-4)
        assert result.l2 == min(result.validation_loss, key=result.validation_loss.__getitem__)
        scaler = StandardScaler().fit(x)
        chosen.fit(scaler.transform(x), y_train)
        np.testing.assert_allclose(result.mean, scaler.mean_, atol=1e-5)
        np.testing.assert_allclose(result.scale, scaler.scale_, rtol=1e-5)

        def objective(weights, bias):
            return log_loss(y_train, softmax(scaler.transform(x) @ weights + bias, axis=1)) + 0.5 * result.l2 * np.sum(weights**2)

        assert result.converged
        assert objective(result.weights, result.bias) <= objective(chosen.coef_.T, chosen.intercept_) + 1e-6
        assert abs(result.accuracy - chosen.score(scaler.transform(x_new), y_test)) < 0.005
    assert together[0].accuracy < together[2].accuracy


def test_more_features_than_rows_agree_with_scikit_learn():
    (x_train, y_train), (x_test, y_test) = correlated_layers(30, 0), correlated_layers(30, 1)
    for x, x_new, result in zip(x_train, x_test, fit_probes(x_train, y_train, x_test, y_test, l2=(1e-2,), seed=0, standardize=True), strict=True):
        scaler = StandardScaler().fit(x.astype(np.float64))
        reference = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-10, max_iter=10_000).fit(scaler.transform(x), y_train)
        assert result.converged
        np.testing.assert_allclose(result.weights, reference.coef_.T, atol=1e-3)


def test_one_compiled_program_serves_all_layers_and_all_fits_of_a_shape():
    (x_train, y_train), (x_test, y_test) = correlated_layers(120, 0), correlated_layers(50, 1)
    before = probes._fit_layers._cache_size()
    for offset in range(3):
        fit_probes(x_train + offset, y_train, x_test, y_test, l2=(1e-3, 10.0**-offset), seed=offset, standardize=True)
    assert probes._fit_layers._cache_size() == before + 1


X, Y = np.random.default_rng(0).normal(size=(10, 3)), [0, 1] * 5


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ((X[:0], [], X, Y), {}, "x_train has shape"),
        ((X, Y[:9], X, Y), {}, "y_train"),
        ((X, Y, X[:, :2], Y), {}, "features"),
        ((X, [0] * 10, X, [0] * 10), {}, "single class"),
        ((X, Y, X, [0, 2] * 5), {}, "label 2"),
        ((X * np.nan, Y, X, Y), {}, "not finite"),
        ((X, Y, X, Y), {"l2": ()}, "l2="),
        ((X, Y, X, Y), {"l2": (-1.0,)}, "l2="),
        ((X[:4], Y[:4], X, Y), {"l2": (0.1, 1.0)}, "choose l2"),
    ],
)
def test_impossible_input_is_refused_in_one_line(rows, options, message):
    with pytest.raises(ValueError, match=message) as error:
        fit_probe(*rows, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------------------- features

CONFIG = ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
TEXTS = ["x", "Dull " * 30, "y", "It rains in the north. " * 5, "z", "w"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the film rains in the north and words of numbers, fine and dull good " * 20], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return type("Model", (), {"config": CONFIG, "params": init_params(CONFIG, seed=1), "tokenizer": tokenizer})()


def test_features_are_the_states_at_the_last_real_token(model, tokenizer):
    states = features(model, TEXTS, tokenizer, max_length=40, tokens_per_batch=64)  # several batches, the last one short
    alone = jax.jit(functools.partial(apply, CONFIG, capture=("embed", "block_out")))
    assert states.shape == (3, len(TEXTS), 16) and states.dtype == np.float32
    for i, text in enumerate(TEXTS):
        _, activations = alone(model.params, np.asarray([tokenizer.encode(text)[:40]], np.int32))
        np.testing.assert_allclose(states[0, i], activations["embed"][0, -1], atol=1e-6)
        np.testing.assert_allclose(states[1:, i], activations["block_out"][:, 0, -1], atol=1e-5)
    assert len(tokenizer.encode(TEXTS[1])) > 40


def test_mean_pooling_averages_the_tokens_without_padding(model, tokenizer):
    states = features(model, TEXTS, tokenizer, max_length=40, tokens_per_batch=64, pooling="mean")
    alone = jax.jit(functools.partial(apply, CONFIG, capture=("embed", "block_out")))
    for i, text in enumerate(TEXTS):
        _, activations = alone(model.params, np.asarray([tokenizer.encode(text)[:40]], np.int32))
        np.testing.assert_allclose(states[0, i], np.asarray(activations["embed"][0], np.float64).mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(states[1:, i], np.asarray(activations["block_out"][:, 0], np.float64).mean(axis=1), atol=1e-5)


def test_bag_of_words_counts_the_most_common_tokens_of_the_training_texts(monkeypatch):
    monkeypatch.setattr(probes, "BAG_OF_WORDS", 3)
    texts = ["a b a c", "c a d", "b b e e e"]
    ids = [[ord(letter) for letter in text.split()] for text in texts]
    reference = CountVectorizer(token_pattern="[a-z]", vocabulary=["a", "c", "b"])  # of the first two texts; b before d
    np.testing.assert_allclose(bag_of_words(ids, n_train=2), np.log1p(reference.transform(texts).toarray()), rtol=1e-6)


def test_features_refuse_no_texts_and_empty_ones(model, tokenizer):
    with pytest.raises(ValueError, match="texts is empty"):
        features(model, [], tokenizer, max_length=8)
    with pytest.raises(ValueError, match=r"texts\[1\]=''"):
        features(model, ["a", ""], tokenizer, max_length=8)


# ---------------------------------------------------------------------------------------------------------------------------- stage


def finished_model(tmp_path, tokenizer: Tokenizer | None):
    directory = RunDirectory(tmp_path / "model")
    run = Run("t", "pretrain", "wd0", {}, member="wd0", seed=0)
    with directory.work(run, StudyConfig(model=CONFIG)):
        with Checkpoints(directory.path / "checkpoints", asynchronous=False) as checkpoints:
            checkpoints.save(0, init_params(CONFIG, seed=1))
        if tokenizer is not None:
            tokenizer.save(directory.path / "tokenizer.json")
        directory.finish({"diverged": None})
    return directory.path


def test_stage_probes_every_layer_of_every_set(tmp_path, model, tokenizer):
    rng = np.random.default_rng(0)
    # The last word gives the label away, so also random weights show it.
    rows = [
        (f"{' '.join(rng.choice(['the', 'film', 'words', 'north'], 5))} {word}", label)
        for _ in range(60)
        for word, label in (("good", "positive"), ("dull", "negative"))
    ]
    write_probe_set(
        tmp_path / "set",
        {
            "name": "sentiment",
            "labels": ("negative", "positive"),
            "train": rows[:80],
            "test": rows[80:],
            "dropped_leaks": 2,
            "sources": (),
            "source_splits": {},
        },
    )
    config = StudyConfig(model=CONFIG, probe=ProbeConfig(sets=("sentiment",), max_length=64, l2=(1e-2,), pooling="mean"))
    parents = {"model": finished_model(tmp_path, tokenizer), "probe-sentiment": tmp_path / "set"}
    results = asdict(probe.run(Context(config, Run("t", "probe", "wd0", {}), RunDirectory(tmp_path / "probe"), parents)))
    found = results["sets"]["sentiment"]
    assert found["layers"] == ["embed", "block1", "block2"]
    assert found["accuracy"][0] == 1.0 and found["accuracy_norm_free"][0] == 1.0
    assert found["bag_of_words"] == 1.0  # the last word gives the label away here too
    assert (found["n_train"], found["n_test"], found["majority"], found["dropped_leaks"]) == (80, 40, 0.5, 2)
    assert [np.mean(layer) for layer in found["correct"]] == found["accuracy"]
    json.dumps(results, allow_nan=False)
    states = features(model, [text for text, _ in rows], tokenizer, 64, pooling="mean").astype(np.float64)
    shuffled = np.random.default_rng(0).permutation([label for _, label in rows[:80]])
    for layer, accuracy in zip(states, found["accuracy_shuffled"], strict=True):
        scaler = StandardScaler().fit(layer[:80])
        reference = LogisticRegression(C=1 / (1e-2 * 80), tol=1e-10, max_iter=5000).fit(scaler.transform(layer[:80]), shuffled)
        assert accuracy == pytest.approx(reference.score(scaler.transform(layer[80:]), [label for _, label in rows[80:]]), abs=0.026)


def test_stage_refuses_a_model_without_a_tokenizer(tmp_path):
    parents = {"model": finished_model(tmp_path, None)}
    with pytest.raises(UserError, match="tokenizer.json"):
        probe.run(Context(StudyConfig(), Run("t", "probe", "wd0", {}), RunDirectory(tmp_path / "probe"), parents))
