"""Generation against the full forward, and the promises on batching, ends and random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plasticity_jax.config import ModelConfig
from plasticity_jax.evaluate.generate import complete, count_cut, cut_at_stop, draw, generate
from plasticity_jax.model.transformer import apply, init_params

CONFIG = ModelConfig(vocab_size=45, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
PAD = 1
NEVER = 44  # an end-of-text id for tests that want none; see `model`
# Two prompt lengths and one number of rows serve almost every test: compiling is what takes time here.
SETTINGS = dict(max_new_tokens=6, n_samples=3, greedy_first=True, temperature=1.0, seed=0, buckets=(4, 8), batch_size=16, eos_id=NEVER, pad_id=PAD,
                compute_dtype=jnp.float32)


@pytest.fixture(scope="module")
def model():
    """Random weights, spread enough that completions differ; NEVER is never the likeliest token, and hardly ever drawn."""
    params = init_params(CONFIG, 3)
    params["head"]["kernel"] = (params["head"]["kernel"] * 8).at[:, NEVER].set(0.0)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 8
    return CONFIG, params


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 44, length).tolist() for length in (1, 3, 4, 5, 8, 8, 2, 7)]


def repeated_forward(model, prompt, steps):
    """The slow way: the whole text again for every token."""
    config, params = model
    tokens = list(prompt)
    forward = jax.jit(apply, static_argnums=0)
    for _ in range(steps):
        padded = np.zeros((1, 16), np.int32)  # causal: what follows the text changes nothing, and one shape is compiled
        padded[0, : len(tokens)] = tokens
        logits, _ = forward(config, params, padded)
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def greedy(completions):
    return [of_prompt[0] for of_prompt in completions]


def test_greedy_equals_the_repeated_full_forward(model, prompts):
    expected = [repeated_forward(model, prompt, 6) for prompt in prompts]
    assert greedy(generate(model, prompts, **SETTINGS)) == expected
    assert len({tuple(tokens) for tokens in expected}) > 4  # the prompts matter


def test_no_samples_gives_the_greedy_completion(model, prompts):
    settings = SETTINGS | {"n_samples": 0, "greedy_first": False, "buckets": (8,)}
    assert generate(model, prompts[2:5], **settings) == [[tokens] for tokens in greedy(generate(model, prompts[2:5], **SETTINGS))]


def test_samples_do_not_depend_on_the_company(model, prompts):
    together = generate(model, prompts, **SETTINGS)
    for index in (0, 4):
        assert generate(model, [prompts[index]], **SETTINGS) == [together[index]]
    assert generate(model, prompts[::-1], **SETTINGS) == together[::-1]


def test_samples_do_not_depend_on_the_number_of_tokens_or_on_a_greedy_row(model, prompts):
    whole = generate(model, prompts[:3], **SETTINGS)
    short = generate(model, prompts[:3], **SETTINGS | {"max_new_tokens": 3, "greedy_first": False})
    assert [[tokens[:3] for tokens in of_prompt[1:]] for of_prompt in whole] == short


def test_samples_differ_by_seed_sample_and_prompt(model, prompts):
    settings = SETTINGS | {"temperature": 2.0}
    first, second = generate(model, prompts, **settings), generate(model, prompts, **settings | {"seed": 1})
    assert all(a[1:] != b[1:] for a, b in zip(first, second)) and greedy(first) == greedy(second)
    assert all(len(set(map(tuple, of_prompt[1:]))) == 3 for of_prompt in first)
    assert len({tuple(of_prompt[1]) for of_prompt in first}) == len(prompts)
    assert generate(model, prompts, **settings) == first


def test_a_low_temperature_is_greedy(model, prompts):
    cold = generate(model, prompts, **SETTINGS | {"temperature": 1e-4})
    assert all(of_prompt == of_prompt[:1] * 4 for of_prompt in cold)


def test_completions_end_before_the_end_of_text_token(model, prompts):
    whole = generate(model, prompts, **SETTINGS)
    eos = whole[4][0][2]
    expected = [[tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in of_prompt] for of_prompt in whole]
    ended = generate(model, prompts, **SETTINGS | {"eos_id": eos})
    assert ended == expected
    assert len(ended[4][0]) <= 2 and any(len(of_prompt[0]) == 6 for of_prompt in ended)


def test_a_long_prompt_loses_its_beginning(model):
    prompt = list(range(2, 14))
    assert greedy(generate(model, [prompt], **SETTINGS)) == greedy(generate(model, [prompt[-8:]], **SETTINGS))
    assert count_cut([prompt, prompt[-8:], [3]], (4, 8)) == 1


def test_models_of_one_shape_share_the_compiled_program(model, prompts):
    generate(model, prompts, **SETTINGS)
    before = complete._cache_size()
    config, params = model
    generate((config, init_params(config, 9)), prompts[:3], **SETTINGS | {"seed": 5, "temperature": 0.5})
    assert complete._cache_size() == before


def test_draw_follows_the_softmax():
    """A chi-square statistic over 45 tokens, the last block of the vocabulary half empty, one token without any weight."""
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=1.5, size=45).astype(np.float32)
    logits[7] = -np.inf
    n = 100_000
    drawn = np.asarray(draw(jnp.tile(logits, (n, 1)), jnp.asarray(rng.random(n, np.float32))))
    expected = np.exp(logits.astype(np.float64))
    expected *= n / expected.sum()
    seen = np.bincount(drawn, minlength=45)
    assert len(seen) == 45 and seen[7] == 0
    some = expected > 0
    statistic = ((seen - expected)[some] ** 2 / expected[some]).sum()
    assert statistic < 43 + 4 * np.sqrt(2 * 43)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_draw_at_the_ends_gives_a_token_with_weight(uniform):
    rng = np.random.default_rng(2)
    logits = rng.normal(scale=3, size=(500, 70)).astype(np.float32)
    logits[:, [0, 1, 40, 69]] = -np.inf
    drawn = np.asarray(draw(jnp.asarray(logits), jnp.full(500, uniform, jnp.float32)))
    assert np.isfinite(logits[np.arange(500), drawn]).all()


def test_samples_follow_the_models_distribution():
    """First tokens of many samples of one prompt, on a model of one layer, against the softmax of its logits in float64."""
    config = ModelConfig(vocab_size=12, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8)
    params = init_params(config, 0)
    params["head"]["kernel"] = params["head"]["kernel"] * 4
    n = 4000
    settings = SETTINGS | {"n_samples": n, "greedy_first": False, "buckets": (4,), "max_new_tokens": 2, "temperature": 1.5,
                           "batch_size": n, "eos_id": 13}
    pairs = np.array(generate((config, params), [[3, 5, 7]], **settings)[0])
    likeliest = int(np.bincount(pairs[:, 0]).argmax())
    for text, drawn in (([3, 5, 7], pairs[:, 0]), ([3, 5, 7, likeliest], pairs[pairs[:, 0] == likeliest, 1])):
        logits, _ = apply(config, params, jnp.asarray([text]))
        weights = np.exp(np.asarray(logits[0, -1], np.float64) / 1.5)
        expected = len(drawn) * weights / weights.sum()
        statistic = ((np.bincount(drawn, minlength=12) - expected) ** 2 / expected).sum()
        assert len(drawn) > 100 and statistic < 11 + 4 * np.sqrt(22)


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"n_samples": -1}, "n_samples=-1"),
    ({"buckets": (8, 4)}, "ascending"),
])
def test_numbers_out_of_range_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[2]], **SETTINGS | change)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[2], []], **SETTINGS)


@pytest.mark.parametrize(("text", "cut"), [
    (" positive.", " positive."),
    (" yes\nHuman: next", " yes\n"),
    (" a Assistant b Human", " a "),
    ("Human", ""),
    ("", ""),
])
def test_stop_strings_cut_the_text(text, cut):
    assert cut_at_stop(text) == cut
