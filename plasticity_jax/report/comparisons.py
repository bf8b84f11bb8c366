"""Intervals within one run, problems resampled: of a metric of one member, of the difference of two, of a weighted sum over members and tasks."""

import functools
from collections.abc import Sequence

import numpy as np

from plasticity_jax.config import ReportConfig
from plasticity_jax.report.results import Score

Interval = tuple[float, float, float]  # mean, lower and upper end of the 95% interval


def metric_interval(score: Score, name: str, settings: ReportConfig) -> Interval | None:
    """A metric of one member on one task with the interval over problems; fine-tuning seeds share the draws and are averaged. None for a metric that is not a mean."""
    draws = _metric_draws(score, name, settings)
    if draws is None:
        return None
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return score.metrics[name], float(lower), float(upper)


def metric_difference(low: Score, high: Score, name: str, settings: ReportConfig) -> Interval | None:
    """Metric of `high` − of `low`, both on the same draws of problems: paired."""
    lows, highs = _metric_draws(low, name, settings), _metric_draws(high, name, settings)
    if lows is None or highs is None:
        return None
    lower, upper = np.quantile(highs - lows, [0.025, 0.975])
    return high.metrics[name] - low.metrics[name], float(lower), float(upper)


def weighted_interval(tasks: Sequence[Sequence[tuple[float, Score]]], name: str, settings: ReportConfig) -> tuple[float, float] | None:
    """Ends of the interval of a weighted sum of a metric over scores of one task, averaged over tasks; problems are paired within a task, tasks drawn apart."""
    summed = []
    for i, scores in enumerate(tasks):
        draws = [(weight, _metric_draws(score, name, settings, stream=i)) for weight, score in scores]
        known = [weight * found for weight, found in draws if found is not None]
        if len(known) < len(draws):
            return None
        summed.append(np.sum(known, axis=0))
    lower, upper = np.quantile(np.mean(summed, axis=0), [0.025, 0.975])
    return float(lower), float(upper)


def _metric_draws(score: Score, name: str, settings: ReportConfig, stream: int = 0) -> np.ndarray | None:
    """[S] the metric on resampled problems; 0 in a draw whose problems all weigh nothing, as `correct_ratio` is defined.

    Args:
      stream: of the draws: scores on the same problems share one, tasks have their own.
    """
    parts = [outcome.metric(name) for outcome in score.outcomes]
    whole = [part for part in parts if part is not None]
    if not parts or len(whole) < len(parts):
        return None
    times = _times_drawn(len(score.greedy), settings.bootstrap_samples, settings.seed, stream)
    by_seed = []
    for value, weight in whole:
        weights, sums = times @ np.asarray(weight, np.float64), times @ (value * np.asarray(weight, np.float64))
        by_seed.append(np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0))
    return np.mean(by_seed, axis=0)


@functools.lru_cache(maxsize=8)
def _times_drawn(problems: int, samples: int, seed: int, stream: int) -> np.ndarray:
    """[S, P] how often each problem is in each resample."""
    return (
        np.random.default_rng([seed, stream] if stream else seed)
        .multinomial(problems, np.full(problems, 1 / problems), size=samples)
        .astype(np.float64)
    )


def with_interval(name: str, interval: Interval | tuple[float | None, ...] | None) -> dict[str, float | None]:
    """Three columns of a table: the value, and the ends of its interval as `<name>_lower` and `<name>_upper`."""
    mean, lower, upper = interval or (None, None, None)
    return {name: mean, f"{name}_lower": lower, f"{name}_upper": upper}
