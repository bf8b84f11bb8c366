"""Generation against the full forward, and the promises on batching, ends and random streams."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.config import EvaluateConfig, ModelConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.evaluate import generate as generation
from plasticity_jax.evaluate.complete import count_programs
from plasticity_jax.evaluate.generate import Completion, Sampling, completions, count_cut, cut_at_stop, generate, largest_shapes
from plasticity_jax.evaluate.sampling import draw, keep_top_k, keep_top_p, penalize, tokens_seen
from plasticity_jax.evaluate.stop_strings import has_stopped, stop_check
from plasticity_jax.model.cache import Layout
from plasticity_jax.model.transformer import apply, init_params

CONFIG = ModelConfig(vocab_size=45, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
PAD = 1
NEVER = 44  # an end-of-text id for tests that want none; see `model`
# Two prompt lengths and one number of rows serve almost every test: compiling is what takes time here.
PLAIN = Sampling(n_samples=3, greedy_first=True)
WARPED = dataclasses.replace(PLAIN, temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.3)
SETTINGS = dict(max_new_tokens=6, buckets=(4, 8), batch_size=16, eos_id=NEVER, pad_id=PAD, compute_dtype=jnp.float32)


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


def run(model, prompts, sampling=PLAIN, **changes):
    return generate(model, prompts, sampling=sampling, **SETTINGS | changes)


def greedy(completions):
    return [of_prompt[0] for of_prompt in completions]


def test_greedy_equals_the_repeated_full_forward(model, prompts):
    expected = [repeated_forward(model, prompt, 6) for prompt in prompts]
    assert greedy(run(model, prompts)) == expected
    assert len({tuple(tokens) for tokens in expected}) > 4  # the prompts matter


def test_no_samples_gives_the_greedy_completion(model, prompts):
    alone = run(model, prompts[2:5], Sampling(n_samples=0), buckets=(8,))
    assert alone == [[tokens] for tokens in greedy(run(model, prompts[2:5]))]


@pytest.mark.parametrize("sampling", [PLAIN, WARPED], ids=["plain", "warped"])
def test_samples_do_not_depend_on_the_company(model, prompts, sampling):
    together = run(model, prompts, sampling)
    for index in (0, 4):
        assert run(model, [prompts[index]], sampling) == [together[index]]
    assert run(model, prompts[::-1], sampling) == together[::-1]
    batches = list(completions(model, prompts, sampling=sampling, skip=[1, 5, 6], **SETTINGS))
    left = {index: [completion.tokens for completion in of_prompt] for indices, made in batches for index, of_prompt in zip(indices, made)}
    assert left == {index: tokens for index, tokens in enumerate(together) if index not in (1, 5, 6)}


def test_samples_do_not_depend_on_the_number_of_tokens_or_on_a_greedy_row(model, prompts):
    whole = run(model, prompts[:3])
    short = run(model, prompts[:3], Sampling(n_samples=3), max_new_tokens=3)
    assert [[tokens[:3] for tokens in of_prompt[1:]] for of_prompt in whole] == short


def test_samples_differ_by_seed_sample_and_prompt(model, prompts):
    hot = dataclasses.replace(PLAIN, temperature=2.0)
    first, second = run(model, prompts, hot), run(model, prompts, dataclasses.replace(hot, seed=1))
    assert all(a[1:] != b[1:] for a, b in zip(first, second)) and greedy(first) == greedy(second)
    assert all(len(set(map(tuple, of_prompt[1:]))) == 3 for of_prompt in first)
    assert len({tuple(of_prompt[1]) for of_prompt in first}) == len(prompts)
    assert run(model, prompts, hot) == first


@pytest.mark.parametrize("change", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_what_leaves_one_token_is_greedy(model, prompts, change):
    cold = run(model, prompts[3:6], dataclasses.replace(PLAIN, **change))
    assert all(of_prompt == of_prompt[:1] * 4 for of_prompt in cold)


def test_completions_end_before_the_end_of_text_token(model, prompts):
    whole = run(model, prompts)
    eos = whole[4][0][2]
    expected = [
        [Completion(tokens[: tokens.index(eos)], True) if eos in tokens else Completion(tokens, False) for tokens in of_prompt] for of_prompt in whole
    ]
    batches = list(completions(model, prompts, sampling=PLAIN, **SETTINGS | {"eos_id": eos}))
    assert {index: made for indices, of_batch in batches for index, made in zip(indices, of_batch)} == dict(enumerate(expected))
    assert len(expected[4][0].tokens) <= 2 and any(len(of_prompt[0].tokens) == 6 for of_prompt in expected)


@pytest.mark.parametrize("n", [2, 8, pytest.param(11, marks=pytest.mark.nightly)])
def test_each_of_several_end_of_text_tokens_ends_a_completion(model, prompts, n):
    whole = run(model, prompts)
    ends = [whole[4][0][2], whole[1][2][1], *range(100, 98 + n)]  # the others are no tokens of the model
    expected = [
        [next((Completion(tokens[:i], True) for i in range(len(tokens)) if tokens[i] in ends), Completion(tokens, False)) for tokens in of_prompt]
        for of_prompt in whole
    ]
    before = count_programs()
    batches = list(completions(model, prompts, sampling=PLAIN, **SETTINGS | {"eos_id": ends}))
    assert {index: made for indices, of_batch in batches for index, made in zip(indices, of_batch)} == dict(enumerate(expected))
    assert {tokens[len(made.tokens)] for of, found in zip(whole, expected) for tokens, made in zip(of, found) if made.ended} == set(ends[:2])
    assert n > 8 or count_programs() == before


def test_a_long_prompt_loses_its_beginning(model):
    prompt = list(range(2, 14))
    assert greedy(run(model, [prompt])) == greedy(run(model, [prompt[-8:]]))
    assert count_cut([prompt, prompt[-8:], [3]], 8) == 1


def test_prompt_and_completion_share_one_limit(model):
    """Of 10 tokens in all, a prompt of n leaves 10 - n; only one that leaves none loses its beginning."""
    texts = {n: list(range(2, 2 + n)) for n in (1, 4, 5, 8, 9, 10, 13)}
    expected = {n: repeated_forward(model, prompt[-9:], 10 - min(n, 9)) for n, prompt in texts.items()}
    share = {"max_new_tokens": None, "max_length": 10, "buckets": EvaluateConfig(max_length=10, prompt_buckets=(4,)).paddings}
    assert share["buckets"] == (4, 8, 9)
    whole = run(model, list(texts.values()), **share)
    assert dict(zip(texts, greedy(whole))) == expected
    assert [{len(tokens) for tokens in of_prompt} for of_prompt in whole] == [{9}, {6}, {5}, {2}, {1}, {1}, {1}]
    assert count_cut(list(texts.values()), share["buckets"][-1]) == 2
    capped = greedy(run(model, list(texts.values()), **share | {"max_new_tokens": 3}))
    assert capped == [tokens[:3] for tokens in expected.values()]
    samples, free = run(model, [texts[8]], **share)[0], run(model, [texts[8]], buckets=(8,))[0]
    assert samples == [tokens[:2] for tokens in free]


def test_text_that_ends_and_the_limit_of_the_sum(model, monkeypatch):
    """In segments, where the host looks at the text, the same limit holds."""
    monkeypatch.setattr(generation, "SEGMENT", 2)
    share = {"max_new_tokens": None, "max_length": 10, "buckets": (4, 8, 9)}
    whole = run(model, [[2, 3, 4], list(range(2, 11))], **share)
    assert run(model, [[2, 3, 4], list(range(2, 11))], is_end=lambda tokens: False, **share) == whole
    assert [len(of_prompt[0]) for of_prompt in whole] == [7, 1]


def test_the_programs_that_may_need_most_memory_are_those_of_brute_force():
    settings = EvaluateConfig(max_length=100, prompt_buckets=(8, 32))
    for most, rows in ((None, 1), (None, 17), (12, 1), (80, 17)):
        needs = {}  # by the lengths of a prompt and its longest completion
        for prompt in range(1, 100):
            bucket = next(length for length in settings.paddings if length >= prompt)
            needs[bucket] = max(needs.get(bucket, 0), min(100 - prompt, most or 100))
        largest = max(needs.items(), key=lambda shape: shape[0] + rows * shape[1])
        assert set(largest_shapes(settings, most, rows)) == {largest, (99, needs[99])}


def test_models_of_one_shape_share_the_compiled_program(model, prompts):
    run(model, prompts)
    before = count_programs()
    config, params = model
    run((config, init_params(config, 9)), prompts[:3], dataclasses.replace(PLAIN, seed=5, temperature=0.5))
    run(model, prompts, dataclasses.replace(PLAIN, top_k=CONFIG.vocab_size, top_p=1.0))
    assert count_programs() == before


def test_one_program_is_compiled_for_a_bucket_and_told(model, prompts, caplog):
    caplog.set_level(logging.INFO, "plasticity_jax")
    before = count_programs()
    for _ in range(2):
        run(model, prompts, Sampling(n_samples=1), max_new_tokens=5)
    assert count_programs() == before + 2
    told = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert [line.rpartition(" in ")[0] for line in told] == [
        "compiled the program for prompts of up to 4 tokens (1 of 2 buckets)",
        "compiled the program for prompts of up to 8 tokens (2 of 2 buckets)",
    ]


# ---------------------------------------------------------------------------------------------------------- what settings do to the logits


def test_a_penalty_reaches_tokens_of_prompt_and_completion_and_not_the_padding(model, prompts):
    """Against the whole text again for every token, in NumPy; padding holds a token that a penalty on it would keep from being chosen."""
    penalty, forward = 1.5, jax.jit(apply, static_argnums=0)
    made, plain = (greedy(run(model, prompts, dataclasses.replace(PLAIN, repetition_penalty=r), pad_id=5)) for r in (penalty, 1.0))
    for prompt, tokens in zip(prompts, made):
        text = list(prompt)
        for token in tokens:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(text)] = text
            logits = np.array(forward(*model, padded)[0][0, len(text) - 1], np.float64)
            seen = np.unique(text)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            assert token == np.argmax(logits)
            text.append(token)
    assert made != plain


def test_padding_never_counts_as_seen():
    tokens, valid = np.array([[5, 5, 2], [5, 3, 3]]), np.array([[False, True, True], [False, True, True]])
    seen = np.asarray(tokens_seen(jnp.asarray(tokens), jnp.asarray(valid), 6))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[2, 5], [3]]
    logits = np.array([[2.0, -1.0, 4.0, 0.0, 1.0, -2.0]] * 2, np.float32)
    np.testing.assert_array_equal(penalize(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(2)), [[2, -1, 2, 0, 1, -4], [2, -1, 4, 0, 1, -2]])


def test_the_k_highest_stay_with_what_ties_with_the_last():
    logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0, 1.0, -5.0]])
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])):
        left = np.asarray(keep_top_k(logits, k))[0]
        assert np.flatnonzero(np.isfinite(left)).tolist() == kept and (left[kept] == np.asarray(logits)[0, kept]).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 200.0])
@pytest.mark.parametrize("p", [1e-4, 0.3, 0.9, 0.999])
def test_the_fewest_tokens_that_reach_p_stay(scale, p):
    """Against a sort in float64; where p falls on a boundary within float32's rounding, either set is right."""
    logits = (np.random.default_rng(5).normal(size=(40, 333)) * scale).astype(np.float32)
    kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), jnp.float32(p))))
    for row, is_kept in zip(logits.astype(np.float64), kept):
        order = np.argsort(-row)
        weights = np.exp(row[order] - row.max())
        cumulative = np.cumsum(weights) / weights.sum()
        count = is_kept.sum()
        assert is_kept[order[:count]].all()
        assert cumulative[count - 1] >= p - 1e-5 and (count == 1 or cumulative[count - 2] < p + 1e-5)


def test_equal_logits_stay_together_at_the_edge_of_p():
    kept = np.isfinite(np.asarray(keep_top_p(jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.2, 0.1]])), jnp.float32(0.5))))
    assert np.flatnonzero(kept[0]).tolist() == [1, 2, 3]


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


@pytest.mark.slow
def test_samples_follow_the_models_distribution():
    """First tokens of many samples of one prompt, on a model of one layer, against the softmax of its logits in float64."""
    config = ModelConfig(vocab_size=12, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8)
    params = init_params(config, 0)
    params["head"]["kernel"] = params["head"]["kernel"] * 4
    n = 4000
    made = run((config, params), [[3, 5, 7]], Sampling(n_samples=n, temperature=1.5), buckets=(4,), max_new_tokens=2, batch_size=n, eos_id=13)
    pairs = np.array(made[0])
    likeliest = int(np.bincount(pairs[:, 0]).argmax())
    for text, drawn in (([3, 5, 7], pairs[:, 0]), ([3, 5, 7, likeliest], pairs[pairs[:, 0] == likeliest, 1])):
        logits, _ = apply(config, params, jnp.asarray([text]))
        weights = np.exp(np.asarray(logits[0, -1], np.float64) / 1.5)
        expected = len(drawn) * weights / weights.sum()
        statistic = ((np.bincount(drawn, minlength=12) - expected) ** 2 / expected).sum()
        assert len(drawn) > 100 and statistic < 11 + 4 * np.sqrt(22)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"n_samples": -1}, "n_samples=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": None}, "both None"),
        ({"max_length": 1}, "max_length=1"),
        ({"buckets": (8, 4)}, "ascending"),
    ],
)
def test_numbers_out_of_range_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, [[2]], **change)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        run(model, [[2], []])


# ------------------------------------------------------------------------------------------------------------------------- stop strings


STOP = ("Human", "Human:", "Assistant", "Assistant:")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (" positive.", " positive."),
        (" yes\nHuman: next", " yes\n"),
        (" a Assistant b Human", " a "),
        ("Human", ""),
        ("", ""),
    ],
)
def test_stop_strings_cut_the_text(text, cut):
    assert cut_at_stop(text, STOP) == cut
    assert cut_at_stop(text, ()) == text


@given(st.text("abc", max_size=12), st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
def test_once_stopped_nothing_that_follows_changes_the_cut(text, more, stop):
    if has_stopped(text, stop):
        assert has_stopped(text + more, stop)
        assert cut_at_stop(text, stop) == cut_at_stop(text + more, stop) != text
    assert has_stopped(text + more + "|", stop) == any(string in text + more for string in stop)


def letters(tokens):
    """The text of tokens of a vocabulary of letters of two bytes each; 43 is the first half of one."""
    return b"".join(b"\xc3" if token == 43 else chr(0x400 + token).encode() for token in tokens).decode("utf-8", errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [pytest.param(PLAIN, marks=pytest.mark.nightly), WARPED], ids=["plain", "warped"])
def test_segments_change_no_token(model, prompts, sampling, monkeypatch):
    """Texts end at different places, and some do not, with looks of the host every 4 tokens, every 7, and none."""
    plain = run(model, prompts, sampling, max_new_tokens=20)
    every = letters([token for of_prompt in plain for tokens in of_prompt for token in tokens])
    stop = [min(set(every), key=lambda letter: abs(every.count(letter) - len(every) // 30))]
    made, programs = [], count_programs()
    for segment in (100, 4, 7):
        monkeypatch.setattr(generation, "SEGMENT", segment)
        batches = completions(
            model, prompts, sampling=sampling, is_end=lambda tokens: has_stopped(letters(tokens), stop), **SETTINGS | {"max_new_tokens": 20}
        )
        made.append({index: rows for indices, of_batch in batches for index, rows in zip(indices, of_batch)})
    assert made[1] == made[0] and made[2] == made[0]
    assert count_programs() == programs + 2, "one for each of the two buckets, in segments of any length"
    for index, of_prompt in made[0].items():
        for row, tokens in zip(of_prompt, plain[index]):
            assert cut_at_stop(letters(row.tokens), stop) == cut_at_stop(letters(tokens), stop)
            assert row.ended == (stop[0] in letters(tokens)) and row.tokens == tokens[: len(row.tokens)]
    ended = [len(row.tokens) for of_prompt in made[0].values() for row in of_prompt if row.ended]
    assert 4 < len(ended) < 32 and len(set(ended)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [pytest.param(PLAIN, marks=pytest.mark.nightly), WARPED], ids=["plain", "warped"])
def test_members_get_what_each_gets_alone(model, prompts, sampling, monkeypatch):
    """Three models whose texts end elsewhere, one of which ends every text at once; in two buckets, in segments, as one program for each bucket."""
    config, params = model
    others = [jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(seed), x.shape), params) for seed in (1, 2)]
    others[1]["head"]["kernel"] = others[1]["head"]["kernel"] * 0.0 + 50.0 * jnp.eye(16, 45, 7)  # always among few tokens
    models = [params, *others]
    every = letters([token for of_prompt in run(model, prompts, sampling, max_new_tokens=20) for tokens in of_prompt for token in tokens])
    stop = [min(set(every), key=lambda letter: abs(every.count(letter) - len(every) // 30))]
    monkeypatch.setattr(generation, "SEGMENT", 7)
    how = dict(sampling=sampling, is_end=lambda tokens: has_stopped(letters(tokens), stop), **SETTINGS | {"max_new_tokens": 20})
    alone = [{i: rows for indices, found in completions((config, one), prompts, **how) for i, rows in zip(indices, found)} for one in models]
    programs = count_programs()
    for skip in ((), (0, 4)):
        together = [{} for _ in models]
        for indices, of_members in generation.completions_of_members(config, generation.stacked(models, Layout()), 3, prompts, skip=skip, **how):
            for of_member, found in zip(together, of_members, strict=True):
                of_member.update(zip(indices, found, strict=True))
        assert together == [{i: rows for i, rows in of_member.items() if i not in skip} for of_member in alone]
    assert count_programs() == programs + 2, "one for each of the two buckets"
    assert alone[0] != alone[1] != alone[2]
    lengths = [[len(row.tokens) for of_prompt in of_member.values() for row in of_prompt] for of_member in alone]
    assert len(set(map(tuple, lengths))) > 1 and any(row.ended for of_prompt in alone[0].values() for row in of_prompt)


def ends_somewhere(tokens):
    """Ends a completion after 2 to 39 tokens, half of all after 7 at most, as its first two say."""
    return len(tokens) > 1 and len(tokens) >= 2 + ((tokens[0] * 7 + tokens[1]) % 40) ** 3 // 1600


def watched(monkeypatch, *, segment, worth):
    """Looks of the host every `segment` tokens; returns the list that the shapes in which batches go on are added to."""
    monkeypatch.setattr(generation, "SEGMENT", segment)
    monkeypatch.setattr(generation, "WORTH", worth)
    seen, keep_rows = [], generation.keep_rows

    def keep(*given):
        places_HxP, rows_HxB = given[-2:]
        seen.append((places_HxP.size, rows_HxB.size // places_HxP.size))
        return keep_rows(*given)

    monkeypatch.setattr(generation, "keep_rows", keep)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("n_samples", "penalty"), [(0, 1.0), (9, 1.3)])
def test_finished_rows_leave_the_batch(model, n_samples, penalty, monkeypatch):
    """Texts end at very different places, alone or of two models; the rows that go on do so in ever fewer rows, and nobody's tokens change."""
    config, params = model
    prompts = np.random.default_rng(8).integers(2, 44, (12, 4)).tolist()
    sampling = Sampling(n_samples=n_samples, seed=1, repetition_penalty=penalty, greedy_first=True)
    how = SETTINGS | {"sampling": sampling, "max_new_tokens": 40, "batch_size": 12 * sampling.n_completions, "buckets": (4,)}
    how["is_end"] = ends_somewhere
    [(_, expected)] = completions(model, prompts, **how)  # 64 tokens lie between two looks, so nobody leaves
    lengths = [len(row.tokens) for of_prompt in expected for row in of_prompt]
    assert min(lengths) < 9 and max(lengths) > 30 and len(set(lengths)) > 5

    seen = watched(monkeypatch, segment=4, worth=4)
    assert list(completions(model, prompts, **how)) == [(list(range(12)), expected)]
    possible = [(3, 1)] if n_samples == 0 else [(12, 3), (12, 1), (3, 1)]
    assert len(seen) >= min(2, len(possible)) and seen == [shape for shape in possible if shape in seen]
    assert generation.shapes(12, sampling.n_completions, 1) == [*possible[::-1], (12, sampling.n_completions)]
    programs = count_programs()
    seen.clear()
    [(_, of_members)] = generation.completions_of_members(config, generation.stacked([params, params], Layout()), 2, prompts, **how)
    assert of_members == [expected, expected] and seen
    assert list(completions(model, prompts, **how)) == [(list(range(12)), expected)]
    assert count_programs() <= programs + len(possible) + 1

    # Rows that are not worth a program of their own stay.
    seen.clear()
    monkeypatch.setattr(generation, "WORTH", 40)
    assert list(completions(model, prompts, **how)) == [(list(range(12)), expected)] and not seen


@pytest.mark.slow
def test_in_bfloat16_tokens_depend_on_the_list_of_prompts_and_not_on_what_is_left_out(model, monkeypatch):
    """As after a kill: whatever has been kept, the others get the tokens that they got in one go."""
    prompts = [[1, i + 2, 3] for i in range(24)]
    how = SETTINGS | {"sampling": dataclasses.replace(PLAIN, n_samples=5), "max_new_tokens": 40, "batch_size": 72, "buckets": (4,)}
    how |= {"compute_dtype": jnp.bfloat16, "is_end": ends_somewhere}
    seen = watched(monkeypatch, segment=4, worth=4)

    def found(skip):
        return {index: rows for indices, made in completions(model, prompts, skip=skip, **how) for index, rows in zip(indices, made, strict=True)}

    whole, shapes = found(()), sorted(seen)
    assert len(whole) == 24 and len(set(shapes)) > 1
    for skip in (range(12), range(5), [0, 3, 13, 23]):
        assert found(skip) == {index: rows for index, rows in whole.items() if index not in skip}


def test_short_completions_cost_no_program_and_no_look_between(model, prompts, monkeypatch):
    """As in the default study: one program per bucket, whenever their rows end."""
    seen, before = watched(monkeypatch, segment=generation.SEGMENT, worth=1), count_programs()
    looks = []

    def is_end(tokens):
        looks.append(len(tokens))
        return bool(tokens) and tokens[0] % 3 > 0

    how = dict(sampling=Sampling(n_samples=2), is_end=is_end, **SETTINGS | {"max_new_tokens": 12})
    made = [row for _, of_batch in completions(model, prompts, **how) for of_prompt in of_batch for row in of_prompt]
    assert count_programs() == before + 2 and not seen
    assert len({len(row.tokens) for row in made}) > 1


def test_stop_strings_are_found_in_the_text_of_tokens_that_hold_parts_of_characters():
    tokenizer = Tokenizer.train(["Is 漢字 a Human word? " * 20], 270)
    tokens = tokenizer.encode("漢 ☕ Human: 字")
    is_end = stop_check(tokenizer, ("☕ Hum", "字"))
    assert [is_end(tokens[:n]) for n in range(len(tokens) + 1)] == ["☕ Hum" in tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]
    assert any(not is_end(tokens[:n]) and "\ufffd" in tokenizer.decode(tokens[:n]) for n in range(len(tokens)))
    assert stop_check(tokenizer, ()) is None


def test_decoding_stops_once_all_texts_have_ended(model, prompts, monkeypatch):
    looks = []
    monkeypatch.setattr(generation, "SEGMENT", 4)

    def is_end(tokens):
        looks.append(len(tokens))
        return len(tokens) >= 3

    [(indices, [made])] = completions(model, prompts[4:5], sampling=PLAIN, is_end=is_end, **SETTINGS | {"max_new_tokens": 20})
    assert indices == [0] and made == [Completion(tokens[:3], True) for tokens in run(model, prompts[4:5], max_new_tokens=20)[0]]
    assert max(looks) == 4
