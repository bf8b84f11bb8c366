"""Scores over problems: greedy accuracy, majority, Pass@k, Correct Ratio, rewards; and how sure they are."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

FAILURES = ("wrong", "no answer", "timed out")  # verdicts other than "right"; see `grading.Verdict`
LEVEL = 0.95

# Indices drawn at once; bounds the memory of a bootstrap over many problems.
_DRAWS_AT_ONCE = 4_000_000


class Outcomes(NamedTuple):
    """What a model got right on P problems with n samples each.

    Attributes:
      greedy: [P] whether the greedy completion is right.
      sampled: [P, n] the same of each sampled completion, n at least 1.
      majority: [P] the same of the first completion of the largest cluster.
      rewards: [P, n] what a scorer gave each sampled completion, in its own unit; None where nothing scored them.
    """

    greedy: Bool[np.ndarray, "..."]
    sampled: Bool[np.ndarray, "..."]
    majority: Bool[np.ndarray, "..."]
    rewards: Float[np.ndarray, "..."] | None = None


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
      greedy_correct, sampled_correct, majority_correct: see `Outcomes`.
    Returns:
      "pass@1" (greedy), "maj@n", "pass@n" (at least one of n), "correct_ratio@n" (share of right completions over the problems with at least one
      right; 0 where there is no such problem), "mean@n" (share of right sampled completions over all problems), with n as a number, and
      "unbiased_pass@k" (the mean of `pass_at_k`) for k = 2, 4, 8, ... up to n. With n = 1, "pass@1" is the greedy one all the same.
    Raises:
      ValueError: shapes that do not fit, or no problem or no sample.
    Source: paper section 5.4.
    """
    return _values(_ratios(Outcomes(greedy_correct, sampled_correct, majority_correct)))


def reward_metrics(sampled_correct: Bool[np.ndarray, "..."], rewards: Float[np.ndarray, "..."]) -> dict[str, float]:
    """Scores that come from the rewards of the sampled completions.

    A reward that is not finite is never chosen and left out of means; a problem with no other kind counts as wrong for "rm@n".

    Args:
      sampled_correct, rewards: see `Outcomes`.
    Returns:
      "rm@n" (share of problems whose completion with the highest reward is right, the first of several) with n as a number, in [0, 1], and
      "orm_score" (mean over problems of the mean reward), in the scorer's unit; NaN where no reward is finite.
    Raises:
      ValueError: shapes that do not fit, or no problem or no sample.
    Source: paper section 5.4.
    """
    sampled_Pxn = np.asarray(sampled_correct, bool)
    nothing_P = np.zeros(len(sampled_Pxn), bool) if sampled_Pxn.ndim else sampled_Pxn
    ratios = _ratios(Outcomes(nothing_P, sampled_Pxn, nothing_P, rewards))
    return {name: value for name, value in _values(ratios).items() if name.startswith(("rm@", "orm_score"))}


def macro_average(per_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over tasks (or test sets), each counting alike, of the metrics that all of them have; {} without tasks."""
    tasks = list(per_task.values())
    return {name: math.fsum(task[name] for task in tasks) / len(tasks) for name in (tasks[0] if tasks else ()) if all(name in task for task in tasks)}


def failures(verdicts: Sequence[str]) -> dict[str, float]:
    """Shares of "wrong", "no answer" and "timed out" among all verdicts; with that of "right" they add up to 1. All 0 without verdicts."""
    return {name: sum(verdict == name for verdict in verdicts) / max(len(verdicts), 1) for name in FAILURES}


def metric_intervals(greedy: Bool[np.ndarray, "..."], sampled: Bool[np.ndarray, "..."], majority: Bool[np.ndarray, "..."],
                     rewards: Float[np.ndarray, "..."] | None = None, *, samples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Ends of the 95% percentile bootstrap interval of each metric, over problems.

    Every resample computes each metric afresh, so that "correct_ratio@n" averages over the solved problems of that resample.

    Args:
      greedy, sampled, majority, rewards: see `Outcomes`.
      samples: number of resamples.
      seed: of the resampling; the same for the same number of problems gives the same draws.
    Returns:
      Metric → (low, high), for all that `metrics` gives, and all that `reward_metrics` gives where there are rewards.
    Raises:
      ValueError: as in `metrics`, or `samples` below 1.
    """
    resampled = _resampled([_ratios(Outcomes(greedy, sampled, majority, rewards))], samples, seed)
    return {name: _ends(values_S) for name, values_S in resampled[0].items()}


def paired_metric_differences(a: Outcomes, b: Outcomes, *, samples: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Each metric of `a` minus that of `b`, with its bootstrap interval; both are resampled at the same problems.

    Args:
      a, b: of two models, the same problems in the same order.
      samples, seed: as in `metric_intervals`.
    Returns:
      Metric → (difference, low, high), for the metrics that both have.
    Raises:
      ValueError: as in `metric_intervals`, or different numbers of problems.
    """
    ratios_a, ratios_b = _ratios(a), _ratios(b)
    if len(a.greedy) != len(b.greedy):
        raise ValueError(f"{len(a.greedy)} and {len(b.greedy)} problems cannot be paired; give both models the same problems, in the same order.")
    values_a, values_b = _values(ratios_a), _values(ratios_b)
    resampled_a, resampled_b = _resampled([ratios_a, ratios_b], samples, seed)
    return {name: (values_a[name] - values_b[name], *_ends(resampled_a[name] - resampled_b[name])) for name in values_a if name in values_b}


class _Ratio(NamedTuple):
    """A metric as sum over problems / sum over problems, so that a resample is a weighting of both."""

    over_P: np.ndarray
    under_P: np.ndarray  # 1 where the problem counts, otherwise 0
    of_nothing: float  # where no problem counts


def _ratios(outcomes: Outcomes) -> dict[str, _Ratio]:
    greedy_P, sampled_Pxn, majority_P = (np.asarray(x, bool) for x in outcomes[:3])
    shapes = greedy_P.shape, sampled_Pxn.shape, majority_P.shape
    if sampled_Pxn.ndim != 2 or greedy_P.shape != sampled_Pxn.shape[:1] or majority_P.shape != greedy_P.shape or sampled_Pxn.size == 0:
        raise ValueError(f"shapes {', '.join(map(str, shapes))} must be [P], [P, n], [P] with P and n at least 1.")
    n = sampled_Pxn.shape[1]
    share_P = sampled_Pxn.mean(axis=1)
    solved_P = share_P > 0
    found = {
        f"maj@{n}": _mean(majority_P),
        f"pass@{n}": _mean(solved_P),
        f"correct_ratio@{n}": _mean(share_P),
        f"mean@{n}": _mean(share_P),
        "pass@1": _mean(greedy_P),
    }
    for k in (2**power for power in range(1, n.bit_length())):
        chance_c = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
        found[f"unbiased_pass@{k}"] = _mean(chance_c[sampled_Pxn.sum(axis=1)])
    if outcomes.rewards is not None:
        found |= _reward_ratios(sampled_Pxn, np.asarray(outcomes.rewards, np.float64))
    return found


def _reward_ratios(sampled_Pxn: np.ndarray, rewards_Pxn: np.ndarray) -> dict[str, _Ratio]:
    if rewards_Pxn.shape != sampled_Pxn.shape:
        raise ValueError(f"rewards have shape {rewards_Pxn.shape}; give one per sampled completion, {sampled_Pxn.shape}.")
    finite_Pxn = np.isfinite(rewards_Pxn)
    rated_P = finite_Pxn.any(axis=1)
    best_P = np.where(finite_Pxn, rewards_Pxn, -np.inf).argmax(axis=1)  # the first of several
    sums_P = np.where(finite_Pxn, rewards_Pxn, 0.0).sum(axis=1)
    return {
        f"rm@{sampled_Pxn.shape[1]}": _mean(sampled_Pxn[np.arange(len(best_P)), best_P] & rated_P),
        "orm_score": _mean(sums_P / np.maximum(finite_Pxn.sum(axis=1), 1), rated_P, of_nothing=math.nan),
    }


def _mean(x_P: np.ndarray, counts_P: np.ndarray | None = None, of_nothing: float = 0.0) -> _Ratio:
    counts_P = np.ones(len(x_P), bool) if counts_P is None else counts_P
    return _Ratio(np.where(counts_P, x_P, 0).astype(np.float64), counts_P.astype(np.float64), of_nothing)


def _values(ratios: Mapping[str, _Ratio]) -> dict[str, float]:
    return {name: float(over_P.sum() / under_P.sum()) if under_P.any() else of_nothing for name, (over_P, under_P, of_nothing) in ratios.items()}


def _resampled(models: Sequence[Mapping[str, _Ratio]], samples: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Per model and metric its values [samples], all at the same draws of problems."""
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1.")
    n_problems = len(next(iter(models[0].values())).over_P)
    columns_PxC = np.stack([column_P for ratios in models for ratio in ratios.values() for column_P in ratio[:2]], axis=1)
    rng, at_once, sums = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // n_problems), []
    for start in range(0, samples, at_once):
        drawn_SxP = rng.integers(n_problems, size=(min(at_once, samples - start), n_problems))
        row_S = n_problems * np.arange(len(drawn_SxP))[:, None]
        times_SxP = np.bincount((drawn_SxP + row_S).ravel(), minlength=drawn_SxP.size).reshape(drawn_SxP.shape)
        sums.append(times_SxP @ columns_PxC)
    pairs = iter(np.concatenate(sums).T.reshape(-1, 2, samples))
    found = []
    for ratios in models:
        found.append({})
        for name, ratio in ratios.items():
            over_S, under_S = next(pairs)
            found[-1][name] = np.divide(over_S, under_S, out=np.full(samples, ratio.of_nothing), where=under_S > 0)
    return found


def _ends(values_S: np.ndarray) -> tuple[float, float]:
    """NaN, the score of a resample in which nothing counts, is left out."""
    known_S = values_S[~np.isnan(values_S)]
    return tuple(np.quantile(known_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()) if known_S.size else (math.nan, math.nan)
