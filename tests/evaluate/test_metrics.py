"""Scores against brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plasticity_jax.analysis import statistics
from plasticity_jax.evaluate.metrics import (
    Outcomes,
    failures,
    macro_average,
    metric_intervals,
    metrics,
    paired_metric_differences,
    pass_at_k,
    reward_metrics,
)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_counts_every_draw(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k", "value"), [(0, 0, 1, "n=0"), (3, 4, 1, "c=4"), (3, -1, 1, "c=-1"), (3, 1, 0, "k=0"), (3, 1, 4, "k=4")])
def test_impossible_arguments_are_named(n, c, k, value):
    with pytest.raises(ValueError, match=value) as caught:
        pass_at_k(n, c, k)
    assert "\n" not in str(caught.value)


def test_metrics_by_hand():
    sampled = [[True, True, False, False], [False] * 4, [True, False, False, False], [True] * 4]
    found = metrics(np.array([True, False, False, True]), np.array(sampled), np.array([True, False, False, True]))
    assert found == {"pass@1": 0.5, "maj@4": 0.5, "pass@4": 0.75, "correct_ratio@4": pytest.approx((0.5 + 0.25 + 1) / 3), "mean@4": 7 / 16,
                     "unbiased_pass@2": pytest.approx((5 / 6 + 0 + 1 / 2 + 1) / 4), "unbiased_pass@4": 0.75}


def test_correct_ratio_without_a_solved_problem_is_zero():
    assert metrics(np.zeros(3, bool), np.zeros((3, 2), bool), np.zeros(3, bool))["correct_ratio@2"] == 0.0


def test_one_sample_keeps_the_greedy_pass_at_1():
    assert metrics(np.array([True]), np.array([[False]]), np.array([False]))["pass@1"] == 1.0


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[P, n\]"):
        metrics(np.zeros(3, bool), np.zeros((2, 2), bool), np.zeros(3, bool))
    with pytest.raises(ValueError, match="at least 1"):
        metrics(np.zeros(0, bool), np.zeros((0, 2), bool), np.zeros(0, bool))


@given(hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 5))))
def test_pass_at_n_agrees_with_the_estimator(sampled):
    n = sampled.shape[1]
    found = metrics(sampled[:, 0], sampled, sampled[:, 0])
    if n > 1:  # with one sample the key belongs to the greedy score
        assert found[f"pass@{n}"] == pytest.approx(np.mean([pass_at_k(n, int(row.sum()), n) for row in sampled]))
    assert found[f"mean@{n}"] == pytest.approx(np.mean([pass_at_k(n, int(row.sum()), 1) for row in sampled]))


def _in_plain_python(greedy, sampled, majority, rewards):
    """The definitions of paper section 5.4, word by word."""
    problems, n = len(greedy), len(sampled[0])
    ratios = [sum(row) / n for row in sampled if any(row)]
    chosen, means = [], []
    for row, scores in zip(sampled, rewards):
        known = [i for i in range(n) if math.isfinite(scores[i])]
        chosen.append(bool(known) and row[min(known, key=lambda i: (-scores[i], i))])
        if known:
            means.append(sum(scores[i] for i in known) / len(known))
    found = {
        f"maj@{n}": sum(majority) / problems,
        f"pass@{n}": sum(map(any, sampled)) / problems,
        "pass@1": sum(greedy) / problems,  # also with n = 1
        f"correct_ratio@{n}": sum(ratios) / len(ratios) if ratios else 0.0,
        f"mean@{n}": sum(map(sum, sampled)) / problems / n,
        f"rm@{n}": sum(chosen) / problems,
        "orm_score": sum(means) / len(means) if means else math.nan,
    }
    for k in (2, 4, 8, 16):
        if k <= n:
            draws = [[any(row[i] for i in draw) for draw in itertools.combinations(range(n), k)] for row in sampled]
            found[f"unbiased_pass@{k}"] = sum(sum(row) / len(row) for row in draws) / problems
    return found


def _table(rng, problems=7, n=5):
    sampled = rng.random((problems, n)) < rng.random((problems, 1)) * 0.8
    rewards = rng.integers(0, 3, (problems, n)).astype(float)  # with ties
    rewards[rng.random((problems, n)) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
    return Outcomes(rng.random(problems) < 0.5, sampled, rng.random(problems) < 0.5, rewards)


@pytest.mark.parametrize("seed", range(20))
def test_every_metric_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    table = _table(rng, problems=rng.integers(1, 8), n=rng.integers(1, 9))
    found = metrics(*table[:3]) | reward_metrics(table.sampled, table.rewards)
    assert found == pytest.approx(_in_plain_python(*(x.tolist() for x in table)), nan_ok=True)


def test_rewards_by_hand():
    sampled = np.array([[True, False, True], [False, True, False], [True, True, True]])
    rewards = np.array([[1.0, 2.0, 2.0], [np.nan, -1.0, -3.0], [np.nan] * 3])  # tie: first; NaN is never chosen; nothing to choose from
    assert reward_metrics(sampled, rewards) == {"rm@3": pytest.approx(1 / 3), "orm_score": pytest.approx((5 / 3 - 2) / 2)}
    assert np.isnan(reward_metrics(sampled, np.full((3, 3), np.nan))["orm_score"])
    with pytest.raises(ValueError, match=r"one per sampled completion, \(3, 3\)"):
        reward_metrics(sampled, rewards[:2])


def test_intervals_resample_problems():
    """Against resampling the rows of the table themselves, one resample at a time."""
    table = _table(np.random.default_rng(1), problems=30)
    found = metric_intervals(*table, samples=300, seed=5)
    rng = np.random.default_rng(5)
    resampled = [_in_plain_python(*(x[drawn].tolist() for x in table)) for drawn in rng.integers(30, size=(300, 30))]
    assert found.keys() == resampled[0].keys()
    for name, ends in found.items():
        assert ends == pytest.approx(np.quantile([values[name] for values in resampled], [0.025, 0.975]))


def test_intervals_of_means_are_those_of_the_statistics():
    table = _table(np.random.default_rng(2), problems=200)
    expected = statistics.bootstrap_mean(table.greedy.astype(float), samples=500, seed=3)
    assert metric_intervals(*table[:3], samples=500, seed=3)["pass@1"] == pytest.approx(expected[1:])


def test_differences_are_paired():
    a, b = (_table(np.random.default_rng(seed), problems=40) for seed in (3, 4))
    found = paired_metric_differences(a, b, samples=400, seed=7)
    expected = statistics.paired_bootstrap(a.greedy.astype(float), b.greedy.astype(float), samples=400, seed=7)
    assert found["pass@1"] == pytest.approx(tuple(expected))
    assert all(ends == (0.0, 0.0, 0.0) for ends in paired_metric_differences(a, a, samples=400, seed=7).values())
    assert "rm@5" not in paired_metric_differences(a, b._replace(rewards=None), samples=10, seed=7)
    with pytest.raises(ValueError, match="40 and 39 problems"):
        paired_metric_differences(a, Outcomes(*(x[:39] for x in b)), samples=10, seed=7)


def test_intervals_where_nothing_is_solved():
    nothing = Outcomes(np.zeros(3, bool), np.zeros((3, 2), bool), np.zeros(3, bool), np.full((3, 2), np.nan))
    found = metric_intervals(*nothing, samples=20, seed=0)
    assert found["correct_ratio@2"] == (0.0, 0.0) and np.isnan(found["orm_score"]).all()
    with pytest.raises(ValueError, match="samples=0"):
        metric_intervals(*nothing, samples=0, seed=0)


def test_macro_average_takes_what_all_tasks_have():
    assert macro_average({"a": {"pass@1": 0.5, "maj@8": 1.0}, "b": {"pass@1": 1.0, "maj@4": 1.0}}) == {"pass@1": 0.75}
    assert macro_average({}) == {}


def test_failures_are_apart():
    assert failures(["right", "wrong", "no answer", "no answer"]) == {"wrong": 0.25, "no answer": 0.5, "timed out": 0.0}
    assert failures([]) == {"wrong": 0.0, "no answer": 0.0, "timed out": 0.0}
