"""Intervals and correlations. Every interval is a 95% interval; the same seed gives the same interval."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.95

# One-dimensional numbers. Other shapes raise a ValueError, so the shape is not part of the type.
Series = Sequence | np.ndarray

# Indices drawn at once; limits the memory of a bootstrap over many rows.
_DRAWS_AT_ONCE = 4_000_000


class Estimate(NamedTuple):
    """A value with its 95% interval; unpacks as (value, low, high)."""

    value: float
    low: float
    high: float


class Blocks(NamedTuple):
    """Blocks of text, [n] each: loss in nats per token, name of the domain, key of the document in which the block begins."""

    loss: Series
    domain: Sequence | np.ndarray
    document: Sequence | np.ndarray


def bootstrap_mean(x: Series, *, samples: int, seed: int) -> Estimate:
    """Mean of `x` with its percentile bootstrap interval.

    Args:
      x: one value per problem, [n].
      samples: number of resamples.
      seed: of the resampling.
    Raises:
      ValueError: `x` is empty or not one-dimensional, or `samples` is below 1.
    """
    x_n = _column(x, "x")
    ones_n = np.ones_like(x_n)
    return _estimate(x_n.mean(), _resampled_ratio(x_n, ones_n, len(x_n), samples, np.random.default_rng(seed)))


def paired_bootstrap(a: Series, b: Series, *, samples: int, seed: int) -> Estimate:
    """Mean of `a - b` with its percentile bootstrap interval; both are resampled with the same problems.

    Args:
      a, b: one value per problem, [n] each, the same problems in the same order.
      samples, seed: as in `bootstrap_mean`.
    Raises:
      ValueError: the two differ in length, or as in `bootstrap_mean`.
    """
    a_n, b_n = _pair(a, b, "a", "b")
    return bootstrap_mean(a_n - b_n, samples=samples, seed=seed)


def cluster_bootstrap_gap(seen: Blocks, held_out: Blocks, *, samples: int, seed: int) -> Estimate:
    """Mean held-out loss minus mean seen loss, with the same domain weights on both sides and a bootstrap over documents.

    Within each domain and side, whole documents are drawn: blocks of one long document are similar, and drawing blocks would make the interval too
    narrow. m - 1 of m documents are drawn with replacement, which makes the bootstrap variance of a mean unbiased also for few documents (Rao & Wu
    1988). If a side of a domain has a single document, its blocks are drawn instead.

    Args:
      seen, held_out: the blocks of each side; every domain has the same number of blocks on both.
      samples, seed: as in `bootstrap_mean`. The draws depend on the documents only: for two models with the same blocks, the gap of the
        difference of their losses is the difference of their gaps, resample by resample.
    Raises:
      ValueError: a side is empty, a domain differs in its number of blocks, or the fields of a side differ in length.
    """
    counts = _blocks_per_domain(seen)
    other = _blocks_per_domain(held_out)
    if counts != other:
        raise ValueError(f"blocks per domain are {counts} seen and {other} held out; give every domain the same number on both sides.")
    total = sum(counts.values())
    rng = np.random.default_rng(seed)
    gap, resampled_s = 0.0, np.zeros(samples)
    for domain, n in counts.items():
        for sign, side in ((1.0, held_out), (-1.0, seen)):
            inside_n = np.asarray([d == domain for d in side.domain])
            loss_n = np.asarray(side.loss, np.float64)[inside_n]
            sums_m, sizes_m = _cluster_sums(loss_n, np.asarray(side.document)[inside_n])
            draws = len(sums_m) - 1 or 1
            gap += sign * n / total * loss_n.mean()
            resampled_s += sign * n / total * _resampled_ratio(sums_m, sizes_m, draws, samples, rng)
    return _estimate(gap, resampled_s)


def wilson_interval(successes: int, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of Wilson's two-sided score interval for the proportion of `successes` in `n` trials.

    Raises:
      ValueError: `n` is below 1, `successes` lies outside 0..n, or `level` outside (0, 1).
    Source: Wilson 1927, JASA 22.
    """
    from scipy.stats import binomtest  # scipy.stats takes a second to import

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}: n must be at least 1 and successes between 0 and n.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie in (0, 1).")
    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def pearson(x: Series, y: Series) -> float:
    """Pearson's correlation; NaN for fewer than two points or a constant series.

    Raises:
      ValueError: the series are empty or differ in length.
    """
    from scipy.stats import pearsonr

    return _correlation(pearsonr, x, y)


def spearman(x: Series, y: Series) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN and errors as in `pearson`."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, x, y)


def _correlation(test: Callable, x: Series, y: Series) -> float:
    x_n, y_n = _pair(x, y, "x", "y")
    if np.all(x_n == x_n[0]) or np.all(y_n == y_n[0]):
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a nearly constant series, whose correlation is nevertheless the best estimate there is
        return float(test(x_n, y_n).statistic)


def leave_one_out_pearson(x: Series, y: Series) -> Float[np.ndarray, " n"]:
    """Pearson's correlation without point i, for every i: [n]. Shows how much depends on a single point. NaN and errors as in `pearson`."""
    x_n, y_n = _pair(x, y, "x", "y")
    if len(x_n) == 1:
        return np.full(1, np.nan)
    return np.asarray([pearson(np.delete(x_n, i), np.delete(y_n, i)) for i in range(len(x_n))])


def _column(x: Series, name: str) -> np.ndarray:
    x_n = np.asarray(x, np.float64)
    if x_n.ndim != 1 or len(x_n) == 0:
        raise ValueError(f"{name} has shape {x_n.shape}; give at least one value in one dimension.")
    return x_n


def _pair(a: Series, b: Series, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray]:
    a_n, b_n = _column(a, name_a), _column(b, name_b)
    if len(a_n) != len(b_n):
        raise ValueError(f"{name_a} has {len(a_n)} values and {name_b} has {len(b_n)}; pairs need equal numbers, in the same order.")
    return a_n, b_n


def _blocks_per_domain(side: Blocks) -> dict:
    if not len(side.loss) == len(side.domain) == len(side.document):
        raise ValueError(f"{len(side.loss)} losses, {len(side.domain)} domains and {len(side.document)} documents; give one of each per block.")
    if len(side.loss) == 0:
        raise ValueError("a side has no blocks; a gap needs at least one on each.")
    counts: dict = {}
    for domain in side.domain:
        counts[domain] = counts.get(domain, 0) + 1
    return dict(sorted(counts.items()))


def _cluster_sums(loss_n: np.ndarray, document_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of losses and number of blocks, per document, or per block if there is only one document."""
    documents_m, member_n = np.unique(document_n, return_inverse=True)
    if len(documents_m) == 1:
        return loss_n, np.ones_like(loss_n)
    return np.bincount(member_n, weights=loss_n), np.bincount(member_n).astype(np.float64)


def _resampled_ratio(sums_m: np.ndarray, sizes_m: np.ndarray, draws: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """[samples]: ratio of the sum of drawn sums to the sum of drawn sizes, for `draws` clusters drawn with replacement."""
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1.")
    at_once = max(1, _DRAWS_AT_ONCE // draws)
    ratios = []
    for start in range(0, samples, at_once):
        drawn_sxk = rng.integers(len(sums_m), size=(min(at_once, samples - start), draws))
        ratios.append(sums_m[drawn_sxk].sum(axis=1) / sizes_m[drawn_sxk].sum(axis=1))
    return np.concatenate(ratios)


def _estimate(value: float, resampled_s: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled_s, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
