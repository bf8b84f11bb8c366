"""Scores against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plasticity_jax.evaluate.metrics import failures, macro_average, metrics, pass_at_k, reward_metrics


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
    assert found == {
        "pass@1": 0.5,
        "maj@4": 0.5,
        "pass@4": 0.75,
        "correct_ratio@4": pytest.approx((0.5 + 0.25 + 1) / 3),
        "mean@4": 7 / 16,
        "unbiased_pass@2": pytest.approx((5 / 6 + 0 + 1 / 2 + 1) / 4),
    }


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
    chosen = [row[min(range(n), key=lambda i: (-scores[i], i))] for row, scores in zip(sampled, rewards)]
    found = {
        f"maj@{n}": sum(majority) / problems,
        f"pass@{n}": sum(map(any, sampled)) / problems,
        "pass@1": sum(greedy) / problems,  # also with n = 1
        f"correct_ratio@{n}": sum(ratios) / len(ratios) if ratios else 0.0,
        f"mean@{n}": sum(map(sum, sampled)) / problems / n,
        f"rm@{n}": sum(chosen) / problems,
        "orm_score": sum(map(sum, rewards)) / problems / n,
    }
    for k in (2, 4, 8, 16):
        if k < n:
            draws = [[any(row[i] for i in draw) for draw in itertools.combinations(range(n), k)] for row in sampled]
            found[f"unbiased_pass@{k}"] = sum(sum(row) / len(row) for row in draws) / problems
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_metric_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    problems, n = rng.integers(1, 8), rng.integers(1, 9)
    sampled = rng.random((problems, n)) < rng.random((problems, 1)) * 0.8
    rewards = rng.integers(0, 3, (problems, n)).astype(float)  # with ties
    greedy, majority = rng.random(problems) < 0.5, rng.random(problems) < 0.5
    found = metrics(greedy, sampled, majority) | reward_metrics(sampled, rewards)
    assert found == pytest.approx(_in_plain_python(*(x.tolist() for x in (greedy, sampled, majority, rewards))))


def test_rewards_by_hand():
    sampled = np.array([[True, False, True], [False, True, False]])
    rewards = np.array([[1.0, 2.0, 2.0], [-5.0, -1.0, -3.0]])  # tie: first
    assert reward_metrics(sampled, rewards) == {"rm@3": 0.5, "orm_score": pytest.approx((5 / 3 - 3) / 2)}
    with pytest.raises(ValueError, match=r"must both be \[P, n\]"):
        reward_metrics(sampled, rewards[:1])
    with pytest.raises(ValueError, match="1 rewards are not finite"):
        reward_metrics(sampled, np.where(rewards == 1.0, np.nan, rewards))


def test_macro_average_takes_what_all_tasks_have():
    assert macro_average({"a": {"pass@1": 0.5, "maj@8": 1.0}, "b": {"pass@1": 1.0, "maj@4": 1.0}}) == {"pass@1": 0.75}
    assert macro_average({}) == {}


def test_failures_are_apart():
    assert failures(["right", "wrong", "no answer", "no answer"]) == {"wrong": 0.25, "no answer": 0.5, "timed out": 0.0}
    assert failures([]) == {"wrong": 0.0, "no answer": 0.0, "timed out": 0.0}
