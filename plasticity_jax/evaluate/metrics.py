"""Scores over problems: greedy accuracy, majority, Pass@k, Correct Ratio, rewards. Their intervals are computed in the report."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

FAILURES = ("wrong", "no answer", "timed out")  # verdicts other than "right"; see `grading.Verdict`


@dataclass(frozen=True)
class Metric:
    """What is known of a metric of the tasks, whatever the number of completions.

    Attributes:
      name: as in the results, with "n" for the number of completions, such as "maj@n".
      heading: in figures and tables; "n" again.
      unit: of its values; empty for a share of the problems.
      higher_is_better: its direction.
      compared: whether the page draws, correlates and aggregates it: the paper's six, and lm-evaluation-harness's two where options are compared.
      of_all_problems: whether it is a mean over all problems, so that problems can be paired; correct_ratio is one over those with a right completion.
      on_page: whether tables of the page hold it; its CSV files do.
    """

    name: str
    heading: str
    unit: str = ""
    higher_is_better: bool = True
    compared: bool = True
    of_all_problems: bool = True
    on_page: bool = True


METRICS = (  # in the order of the page
    Metric("pass@1", "Pass@1"),
    Metric("maj@n", "Maj@n"),
    Metric("rm@n", "RM@n"),
    Metric("pass@n", "Pass@n"),
    Metric("correct_ratio@n", "Correct Ratio@n", of_all_problems=False),
    Metric("orm_score", "ORM Score", unit="reward"),
    Metric("accuracy", "accuracy"),
    Metric("acc_norm", "acc_norm"),
    Metric("acc_bytes", "acc_bytes", compared=False),
    Metric("mean@n", "Mean@n", compared=False),
    Metric("unbiased_pass@n", "unbiased Pass@n", compared=False, on_page=False),
)


def metric_of(name: str) -> Metric:
    """The declaration of a metric by its name in the results, such as "maj@16", with that number in its heading; one that is not declared is not compared."""
    known = {metric.name: metric for metric in METRICS}
    n = re.search(r"@(\d+)$", name)
    found = known.get(name) or known.get(re.sub(r"@\d+$", "@n", name), Metric(name, name, compared=False))
    return found if n is None else replace(found, heading=re.sub("@n$", n[0], found.heading))


def ordered_metrics(names: Iterable[str]) -> list[str]:
    """Names of metrics, each once, in the order of `METRICS`; others follow as they come."""
    places = {metric.name: i for i, metric in enumerate(METRICS)}
    return sorted(dict.fromkeys(names), key=lambda name: places.get(metric_of(name).name, len(places)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of `k` completions is right, drawn without replacement from `n` of which `c` are right.

    Its mean over problems is the unbiased estimate of Pass@k.

    Raises:
      ValueError: not 1 <= k <= n or not 0 <= c <= n.
    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1; exact integers instead of its product form.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: without completions there is nothing to score.")
    if not 0 <= c <= n:
        raise ValueError(f"c={c} must lie in 0..{n}: at most all n={n} completions can be right.")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must lie in 1..{n}: draw between one and all n={n} completions.")
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def metrics(
    greedy_correct: Bool[np.ndarray, "..."], sampled_correct: Bool[np.ndarray, "..."], majority_correct: Bool[np.ndarray, "..."]
) -> dict[str, float]:
    """Scores of one model on one task, each in [0, 1].

    Args:
      greedy_correct: [P] whether the greedy completion is right.
      sampled_correct: [P, n] the same for each sampled completion, n at least 1.
      majority_correct: [P] the same for the first completion of the largest cluster.
    Returns:
      "pass@1" (greedy), "maj@n", "pass@n" (at least one of n), "correct_ratio@n" (fraction of right completions over the problems with at least
      one right; 0 if there is no such problem), "mean@n" (fraction of right sampled completions over all problems), with n as a number, and
      "unbiased_pass@k" (the mean of `pass_at_k`) for k = 2, 4, 8, ... below n. "pass@1" is the greedy score also for n = 1.
    Raises:
      ValueError: the shapes do not match, or there is no problem or no sample.
    Source: paper section 5.4.
    """
    greedy_P, sampled_Pxn, majority_P = (np.asarray(x, bool) for x in (greedy_correct, sampled_correct, majority_correct))
    shapes = greedy_P.shape, sampled_Pxn.shape, majority_P.shape
    if sampled_Pxn.ndim != 2 or greedy_P.shape != sampled_Pxn.shape[:1] or majority_P.shape != greedy_P.shape or sampled_Pxn.size == 0:
        raise ValueError(f"shapes {', '.join(map(str, shapes))} must be [P], [P, n], [P] with P and n at least 1.")
    n, right_P = sampled_Pxn.shape[1], sampled_Pxn.sum(axis=1)
    solved_P = right_P > 0
    found = {
        f"maj@{n}": float(majority_P.mean()),
        f"pass@{n}": float(solved_P.mean()),
        f"correct_ratio@{n}": float(right_P[solved_P].mean() / n) if solved_P.any() else 0.0,
        f"mean@{n}": float(right_P.mean() / n),
        "pass@1": float(greedy_P.mean()),
    }
    for k in (2**power for power in range(1, (n - 1).bit_length())):
        found[f"unbiased_pass@{k}"] = float(np.mean([pass_at_k(n, int(c), k) for c in right_P]))
    return found


def reward_metrics(sampled_correct: Bool[np.ndarray, "..."], rewards: Float[np.ndarray, "..."]) -> dict[str, float]:
    """Scores from the rewards of the sampled completions.

    Args:
      sampled_correct: [P, n] whether each sampled completion is right.
      rewards: [P, n] the reward of each, finite, in the scorer's unit.
    Returns:
      "rm@n" (fraction of problems whose completion with the highest reward is right; ties go to the first) with n as a number, in [0, 1], and
      "orm_score" (mean over problems of the mean reward), in the scorer's unit.
    Raises:
      ValueError: the shapes do not match, there is no problem or no sample, or a reward is not finite.
    Source: paper section 5.4.
    """
    sampled_Pxn, rewards_Pxn = np.asarray(sampled_correct, bool), np.asarray(rewards, np.float64)
    if sampled_Pxn.ndim != 2 or rewards_Pxn.shape != sampled_Pxn.shape or sampled_Pxn.size == 0:
        raise ValueError(f"shapes {sampled_Pxn.shape}, {rewards_Pxn.shape} must both be [P, n] with P and n at least 1.")
    if not np.isfinite(rewards_Pxn).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(rewards_Pxn))} rewards are not finite; a scorer must rate every completion.")
    chosen_P = sampled_Pxn[np.arange(len(sampled_Pxn)), rewards_Pxn.argmax(axis=1)]
    return {f"rm@{sampled_Pxn.shape[1]}": float(chosen_P.mean()), "orm_score": float(rewards_Pxn.mean())}


def macro_average(per_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Unweighted mean over tasks (or test sets) of the metrics that all of them have; {} without tasks."""
    tasks = list(per_task.values())
    return {name: math.fsum(task[name] for task in tasks) / len(tasks) for name in (tasks[0] if tasks else ()) if all(name in task for task in tasks)}


def failures(verdicts: Sequence[str]) -> dict[str, float]:
    """Fractions of "wrong", "no answer" and "timed out" among all verdicts. With that of "right" they sum to 1. All 0 without verdicts."""
    return {name: sum(verdict == name for verdict in verdicts) / max(len(verdicts), 1) for name in FAILURES}
