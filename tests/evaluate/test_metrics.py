"""Scores against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plasticity_jax.evaluate.metrics import metrics, pass_at_k


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
    assert found == {"pass@1": 0.5, "maj@4": 0.5, "pass@4": 0.75, "correct_ratio@4": pytest.approx((0.5 + 0.25 + 1) / 3), "mean@4": 7 / 16}


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
