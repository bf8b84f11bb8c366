"""Scores over problems: greedy accuracy, majority, Pass@k, Correct Ratio."""

import math

import numpy as np
from jaxtyping import Bool


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of `k` completions, drawn without replacement from `n` of which `c` are right, is right.

    Averaged over problems it is the unbiased estimate of Pass@k.

    Raises:
      ValueError: not 1 <= k <= n or not 0 <= c <= n.
    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1; exact integers instead of its product form.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: without completions there is nothing to score.")
    if not 0 <= c <= n:
        raise ValueError(f"c={c} must lie in 0..{n}: no more completions can be right than there are (n={n}).")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must lie in 1..{n}: draw at least one and at most all n={n} completions.")
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def metrics(greedy_correct: Bool[np.ndarray, "..."], sampled_correct: Bool[np.ndarray, "..."],
            majority_correct: Bool[np.ndarray, "..."]) -> dict[str, float]:
    """Scores of one model on one task, each in [0, 1].

    Args:
      greedy_correct: [P] whether the greedy completion is right.
      sampled_correct: [P, n] the same of each sampled completion, n at least 1.
      majority_correct: [P] the same of the first completion of the largest cluster.
    Returns:
      "pass@1" (greedy), "maj@n", "pass@n" (at least one of n), "correct_ratio@n" (share of right completions over the problems with at least one
      right; 0 where there is no such problem), "mean@n" (share of right sampled completions over all problems), with n as a number. With n = 1,
      "pass@1" is the greedy one all the same.
    Raises:
      ValueError: shapes that do not fit, or no problem or no sample.
    Source: paper section 5.4.
    """
    greedy, sampled, majority = (np.asarray(x, bool) for x in (greedy_correct, sampled_correct, majority_correct))
    if sampled.ndim != 2 or greedy.shape != sampled.shape[:1] or majority.shape != greedy.shape or sampled.size == 0:
        raise ValueError(f"shapes {greedy.shape}, {sampled.shape}, {majority.shape} must be [P], [P, n], [P] with P and n at least 1.")
    n = sampled.shape[1]
    share = sampled.mean(axis=1)
    solved = share > 0
    return {
        f"maj@{n}": float(majority.mean()),
        f"pass@{n}": float(solved.mean()),
        f"correct_ratio@{n}": float(share[solved].mean()) if solved.any() else 0.0,
        f"mean@{n}": float(share.mean()),
        "pass@1": float(greedy.mean()),
    }
