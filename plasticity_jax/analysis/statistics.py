"""Intervals, tests and correlations. Every interval is a 95% interval; the same seed gives the same interval. docs/statistics.md says what is used where."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def bootstrap_mean(groups: Sequence[Series], *, samples: int, seed: int) -> Estimate:
    """Mean over groups of their means with its percentile bootstrap interval; each group is resampled by itself.

    Args:
      groups: one value per problem, [n] for each task. For a paired difference give the differences.
      samples: number of resamples.
      seed: of the resampling.
    Raises:
      ValueError: no group, one that is empty or not one-dimensional, or `samples` is below 1.
    """
    if not len(groups):
        raise ValueError("there is no group; give at least one.")
    rng, means, resampled = np.random.default_rng(seed), [], []
    for group in groups:
        x_n = _column(group, "a group")
        means.append(x_n.mean())
        resampled.append(_resampled_ratio(x_n, np.ones_like(x_n), len(x_n), samples, rng))
    return _estimate(float(np.mean(means)), np.mean(resampled, axis=0))


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


class Effect(NamedTuple):
    """A mean over units, which are pretraining seeds as a rule, and what its uncertainty is made of.

    At a two-sided level 1 − a, with t of units − 1 degrees of freedom and z of the normal distribution, both at 1 − a / 2, the interval is value ± h,
    h² = max(t · between, z · least)² + (z · shared)². The p values are the levels at which it just touches 0.

    Attributes:
      value: the mean.
      between: standard error from the spread over units.
      least: standard error that the items within the units give by themselves; few units agree by chance, and are not taken to differ less.
      shared: standard error from what items have in common over the units.
      units: number of units.
    Source: the sum of squared half widths is that of Graybill and Wang 1980 for sums of variances.
    """

    value: float
    between: float
    least: float
    shared: float
    units: int

    @property
    def low(self) -> float:
        return self.value - self._reach((1 - LEVEL) / 2)

    @property
    def high(self) -> float:
        return self.value + self._reach((1 - LEVEL) / 2)

    def above(self, margin: float = 0.0) -> float:
        """One-sided p value for the mean being above `margin`; small where it is."""
        return self._tail(self.value - margin)

    def below(self, margin: float = 0.0) -> float:
        """One-sided p value for the mean being below `margin`."""
        return self._tail(margin - self.value)

    @property
    def p(self) -> float:
        """Two-sided p value for the mean being 0."""
        return min(1.0, 2 * min(self.above(), self.below()))

    def within(self, delta: float) -> bool:
        """Whether the interval lies inside (−delta, delta): two one-sided tests at 2.5% each. Source: Schuirmann 1987."""
        return -delta < self.low and self.high < delta

    def _reach(self, tail: float) -> float:
        from scipy.special import ndtri, stdtrit

        t, z = -float(stdtrit(self.units - 1, tail)), -float(ndtri(tail))
        return float(np.hypot(max(t * self.between, z * self.least), z * self.shared))

    def _tail(self, distance: float) -> float:
        from scipy.optimize import brentq

        if distance == 0:
            return 0.5
        if distance < 0:
            return 1 - self._tail(-distance)
        smallest = -30.0  # log of the smallest p that is told apart from 0
        if self._reach(np.exp(smallest)) <= distance:
            return 0.0
        log_p: Any = brentq(lambda log: self._reach(np.exp(log)) - distance, smallest, np.log(0.5))
        return float(np.exp(log_p))


def unit_effect(groups: Sequence[np.ndarray], *, sampled: bool, floor: float = 0.0) -> Effect:
    """Mean over groups, units and items, where the unit is what was drawn; items are paired within units.

    Args:
      groups: one [units, items] each, such as a contrast between λ by pretraining seed and problem of a task. Groups weigh alike.
      sampled: whether the items stand for others of their kind, as problems do, and heads do not. Then what an item has in common over the units
        counts as error too.
      floor: variance of one unit's value that is known from within it, such as that of a bootstrap over documents.
    Raises:
      ValueError: fewer than two units, groups that differ in their units, an empty group, or a number that is not finite.
    Source: two crossed random factors, as in Clark 1973, "The language-as-fixed-effect fallacy".
    """
    tables = [np.asarray(group, np.float64) for group in groups]
    shapes = [table.shape for table in tables]
    if not tables or any(len(shape) != 2 or shape[0] != shapes[0][0] or shape[1] < 1 for shape in shapes):
        raise ValueError(f"groups have shapes {shapes}; give [units, items] with the same units and at least one item.")
    units = shapes[0][0]
    if units < 2:
        raise ValueError(f"{units} unit has no spread; give at least two.")
    if not all(np.all(np.isfinite(table)) for table in tables):
        raise ValueError("a number is not finite; leave its unit out.")
    value_u = np.mean([table.mean(axis=1) for table in tables], axis=0).round(12)  # less is rounding of sums, which would look like agreement
    least, shared = 0.0, 0.0
    for table in tables:
        items = table.shape[1]
        if items > 1:
            rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
            of_item = float((rest**2).sum() / ((units - 1) * (items - 1)))
            least += of_item / items / len(tables) ** 2
            if sampled:
                shared += max(0.0, float(table.mean(axis=0).var(ddof=1)) - of_item / units) / items / len(tables) ** 2
    between, least = np.sqrt(value_u.var(ddof=1) / units), np.sqrt(max(least, floor) / units)
    return Effect(float(value_u.mean().round(12)), float(between), float(least), float(np.sqrt(shared)), units)


def trend_weights(points: int) -> Float[np.ndarray, " points"]:
    """[points] weights of a linear contrast over ranks: applied to values on a straight line, they give the last less the first.

    Ranks of λ are those of the timescale, reversed, so no unit of either matters, and λ = 0, whose timescale is infinite, has its place.

    Raises:
      ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"{points} point has no trend; give at least two.")
    x = np.linspace(-0.5, 0.5, points)
    return x / (x**2).sum()


def holm(p: Series) -> Float[np.ndarray, " n"]:
    """[n] p values adjusted for their number by Holm's procedure, at most 1. Source: Holm 1979."""
    p_n = _column(p, "p")
    order, adjusted = np.argsort(p_n, kind="stable"), np.empty_like(p_n)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_n[order] * np.arange(len(p_n), 0, -1)))
    return adjusted


def t_power(difference: float, deviation: float, units: int) -> float:
    """Probability that a two-sided paired t test at 5% finds a difference and gives it the right sign.

    Args:
      difference: the true mean, above 0.
      deviation: standard deviation of the paired differences between units.
      units: number of pairs; below two nothing is ever found.
    """
    from scipy.stats import nct, t

    if units < 2:
        return 0.0
    return float(nct.sf(t.ppf((1 + LEVEL) / 2, units - 1), units - 1, difference / deviation * np.sqrt(units)))


def detectable(deviation: float, units: int, power: float) -> float:
    """The smallest difference that `t_power` finds with probability `power`; infinite below two units."""
    from scipy.optimize import brentq

    if units < 2:
        return float("inf")
    found: Any = brentq(lambda difference: t_power(difference, deviation, units) - power, 1e-9 * deviation, 200 * deviation)
    return float(found)


def units_needed(difference: float, deviation: float, power: float, most: int = 1000) -> int | None:
    """The fewest units with which `t_power` is at least `power`; None above `most`."""
    return next((units for units in range(2, most + 1) if t_power(difference, deviation, units) >= power), None)


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
