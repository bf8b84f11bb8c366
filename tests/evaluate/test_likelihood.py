"""Log-likelihoods against a float64 softmax of the model's logits, and the choice among options that follows from them."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest
from running import python

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.tasks import Example
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import options
from plasticity_jax.evaluate.likelihood import Likelihood, _score, log_likelihoods
from plasticity_jax.evaluate.options import choose
from plasticity_jax.evaluate.zero_shot import check_installed
from plasticity_jax.model.forward import Forward, _compiled
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.model.transformer import init_params

CONFIG = ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16)
SETTINGS = dict(batch_size=6, forward=Forward("float32"), what="test")
LENGTHS = [(1, 1), (5, 3), (20, 12), (3, 30), (30, 2), (30, 3), (40, 5), (10, 50), (1, 60), (33, 32), (2, 2), (60, 4), (31, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, spread enough that likelihoods differ widely and some tokens are the likeliest."""
    params = init_params(CONFIG, 3)
    params["head"]["kernel"] = params["head"]["kernel"] * 20
    tokenizer = Tokenizer.train(["Human: where is the key? Assistant: under the mat, naïve one"] * 9, 290)
    return LoadedModel(CONFIG, params, tokenizer, tmp_path_factory.mktemp("model"), None)


@pytest.fixture(scope="module")
def pairs(model):
    """Random tokens; every third continuation is what greedy decoding gives, token by token, so that both answers occur."""
    rng = np.random.default_rng(0)
    found = [(rng.integers(2, 300, n).tolist(), rng.integers(2, 300, m).tolist()) for n, m in LENGTHS]
    for index in range(0, len(found), 3):
        context, continuation = found[index]
        continuation.clear()
        for _ in range(min(LENGTHS[index][1], 4)):
            continuation.append(int(np.argmax(logits_of(model, context + continuation)[-1])))
    return found


def logits_of(model, tokens):
    padded = np.zeros((1, 64), np.int32)  # causal: what follows changes nothing, and one shape is compiled
    padded[0, : len(tokens)] = tokens
    return np.asarray(model(padded, capture=())[0], np.float64)[0, : len(tokens)]


def expected(model, context, continuation):
    """(sum of log-probabilities in float64, whether all are the likeliest)."""
    logits = logits_of(model, [*context, *continuation])[len(context) - 1 : -1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_p[np.arange(len(continuation)), continuation].sum(), bool((logits.argmax(-1) == continuation).all())


def test_equals_the_float64_softmax_of_the_logits(model, pairs):
    found = log_likelihoods(model, pairs, **SETTINGS)
    for (context, continuation), one in zip(pairs, found, strict=True):
        total, greedy = expected(model, context, continuation)
        assert one.total == pytest.approx(total, abs=1e-4) and one.greedy == greedy
        assert one.n_tokens == len(continuation) and not one.cut
    assert {one.greedy for one in found} == {True, False} and min(one.total for one in found) < -50


def test_a_large_vocabulary_in_parts_gives_the_same(model, pairs, monkeypatch):
    short = [pair for pair in pairs if sum(map(len, pair)) <= 33]
    whole = log_likelihoods(model, short, **SETTINGS)
    monkeypatch.setattr("plasticity_jax.model.loss.LOGIT_BYTES", 4 * 6 * 300 * 4)  # logits of four places at a time
    for one, other in zip(log_likelihoods(model, short, **SETTINGS), whole, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-4) and one[1:] == other[1:]


def test_a_pair_does_not_feel_the_others_and_each_length_compiles_twice_at_most(model, pairs):
    found = log_likelihoods(model, pairs, **SETTINGS)
    program = _compiled(_score, (model.config,), SETTINGS["forward"])
    programs = program._cache_size()
    order = np.random.default_rng(1).permutation(len(pairs))[:9]
    assert log_likelihoods(model, [pairs[i] for i in order], **SETTINGS) == [found[i] for i in order]
    assert log_likelihoods(model, pairs[4:5], **SETTINGS) == found[4:5]
    assert program._cache_size() == programs > 0  # lengths 32 and 64, continuations up to 32 and longer, were all there before


def test_what_is_too_long_loses_its_beginning_and_says_so(model, pairs):
    context, continuation = pairs[6]  # 40 tokens and then some
    n = len(continuation)
    [short] = log_likelihoods(model, [(context, continuation)], max_length=32, **SETTINGS)
    [kept] = log_likelihoods(model, [(context[-(33 - n) :], continuation)], max_length=32, **SETTINGS)
    assert short == kept._replace(cut=True) and not kept.cut
    assert short.total == pytest.approx(expected(model, context[-(33 - n) :], continuation)[0], abs=1e-4)
    [beyond] = log_likelihoods(model, [([5], list(range(10, 60)))], max_length=32, **SETTINGS)  # longer than the limit by itself
    assert beyond.cut and beyond.n_tokens == 32
    assert beyond.total == pytest.approx(expected(model, [27], list(range(28, 60)))[0], abs=1e-4)


def test_nothing_to_score_or_to_predict_from_is_refused_and_no_pairs_are_no_results(model):
    assert log_likelihoods(model, [], **SETTINGS) == []
    for pair, name in (([], [1]), "context"), (([1], []), "continuation"):
        with pytest.raises(ValueError, match=f"the {name} of pair 1 is empty"):
            log_likelihoods(model, [([1], [2]), pair], **SETTINGS)
    with pytest.raises(ValueError, match="batch_size=0 is below 1"):
        log_likelihoods(model, [([1], [2])], **SETTINGS | {"batch_size": 0})


ON_MESHES = """
import jax, numpy as np
from plasticity_jax.config import MeshConfig, ModelConfig
from plasticity_jax.evaluate.likelihood import log_likelihoods
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.transformer import init_params
from plasticity_jax.parallel import make_mesh, param_shardings

config = ModelConfig(vocab_size=96, d_model=32, n_layers=1, n_heads=8, n_kv_heads=4, d_ff=48)
params, rng = init_params(config, 0), np.random.default_rng(0)
pairs = [(rng.integers(0, 96, n).tolist(), rng.integers(0, 96, m).tolist()) for n, m in ((3, 4), (20, 5), (9, 9), (1, 1), (16, 8))]
settings = dict(batch_size=3, what="test")
alone = log_likelihoods((config, params), pairs, forward=Forward("float32"), **settings)
for axes in ({"data": 2, "tensor": 2}, {"data": 1, "fsdp": 4}):
    mesh = make_mesh(MeshConfig(**axes))
    sharded = jax.device_put(params, param_shardings(mesh, params))
    forward = Forward("float32", scan_layers=True, mesh=mesh)
    for one, other in zip(log_likelihoods((config, sharded), pairs, forward=forward, **settings), alone, strict=True):
        assert abs(one.total - other.total) < 1e-4 and one[1:] == other[1:], (axes, one, other)
print("the same on", jax.device_count())
"""


def test_a_mesh_changes_nothing():
    assert "the same on 4" in python(ON_MESHES, devices=4)


# ------------------------------------------------------------------------------------------------------------------------------ options


def example(prompt, options):
    return Example("1", prompt, options[0], "", "generated", "none", options=tuple(options))


def test_the_likeliest_option_is_chosen_in_the_template_with_and_without_its_length(model):
    rng, words = np.random.default_rng(2), ["where", "is", "the", "key", "naïve", "mat"]
    examples = [example(" ".join(rng.choice(words, 3)), [" " + " ".join(rng.choice(words, n)) for n in (1, 3, 6)]) for _ in range(12)]
    choices = choose(model, model.tokenizer, examples, **SETTINGS)
    for row, choice in zip(examples, choices, strict=True):
        prompt = model.tokenizer.encode(f"Human: {row.prompt}\nAssistant:")
        totals = [expected(model, prompt, model.tokenizer.encode(option))[0] for option in row.options]
        lengths, byte_lengths = [len(option) for option in row.options], [len(option.encode()) for option in row.options]
        assert choice.log_likelihoods == pytest.approx(totals, abs=1e-4) and (choice.lengths, choice.byte_lengths) == (lengths, byte_lengths)
        assert choice.best == int(np.argmax(totals)) and choice.best_by_length == int(np.argmax(np.array(totals) / lengths))
        assert choice.best_by_bytes == int(np.argmax(np.array(totals) / byte_lengths))
    assert any(choice.best != choice.best_by_length for choice in choices)  # the length matters


def test_acc_norm_counts_characters_and_acc_bytes_bytes_as_the_harness_does(model, monkeypatch):
    totals = iter([-5.0, -6.0])
    monkeypatch.setattr(options, "log_likelihoods", lambda model, pairs, **settings: [Likelihood(next(totals), False, 1, False) for _ in pairs])
    [choice] = choose(model, model.tokenizer, [example("where", ["ééé", "abcd"])], **SETTINGS)
    # -5/3 against -6/4 per character, -5/6 against -6/4 per byte.
    assert (choice.best, choice.best_by_length, choice.best_by_bytes) == (0, 1, 0)


def test_of_options_with_a_common_ending_the_ending_alone_is_scored_after_each_beginning(model):
    row = dataclasses.replace(example("the naïve key is", ["mat where the key", "key where the key"]), ending="where the key")
    [choice] = choose(model, model.tokenizer, [row], **SETTINGS)
    prompts = [model.tokenizer.encode(f"Human: the naïve key is {word}\nAssistant:") for word in ("mat", "key")]
    totals = [expected(model, prompt, model.tokenizer.encode("where the key"))[0] for prompt in prompts]
    assert choice.log_likelihoods == pytest.approx(totals, abs=1e-4) and choice.best == int(np.argmax(totals))


def test_equal_options_go_to_the_first_and_an_empty_one_is_refused(model):
    [choice] = choose(model, model.tokenizer, [example("key?", [" the mat"] * 3)], **SETTINGS)
    assert (choice.best, choice.best_by_length, choice.best_by_bytes) == (0, 0, 0)
    for texts in ([" mat", ""], [""]):
        with pytest.raises(UserError, match="each option needs text"):
            choose(model, model.tokenizer, [example("key?", texts)], **SETTINGS)


def test_without_the_harness_the_refusal_names_the_command(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval"] + ["plasticity_jax.evaluate.harness"]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'plasticity_jax\[harness\]'"):
        check_installed()
    with pytest.raises(UserError, match=r"pip install 'plasticity_jax\[harness\]'"):
        importlib.import_module("plasticity_jax.evaluate.harness")
