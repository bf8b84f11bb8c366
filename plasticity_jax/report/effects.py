"""What is compared between the points of a study, and how sure a difference is: over pretraining seeds where there are several, within one run otherwise.

docs/statistics.md says which unit, test and assumption belongs to which claim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plasticity_jax.analysis.statistics import Effect, bootstrap_mean, holm, trend_weights, unit_effect
from plasticity_jax.report.results import MemberResults, StudyResults
from plasticity_jax.stages import guarded, stages
from plasticity_jax.stages.stage import Rows

NORMAL = 1.96  # half a 95% interval, in standard errors
SEEDS = "pretraining seeds"


@dataclass(frozen=True)
class Measure:
    """A number per model that is compared between points.

    Attributes:
      name: such as "gain".
      groups: (member) → one [fine-tuning seeds, items] per task or probe set, or [1, items] for a base model; their means weigh alike. None where
        the member has no result.
      items: what they are, in words; empty where they do not stand for others of their kind, as heads do not.
      delta: a difference up to this counts as none.
      unit: of the number.
      absent: (member) → why a member that has results has no number, in words; None where it has one.
      within: (results, member → weight) → variance of the weighted sum within one pretraining run, where items do not give it; None if unknown.
      interval: (results, member → weight) → ends of its 95% interval over `items` within one pretraining run, where it is no mean of theirs, or is
        drawn faster than `bootstrap_mean` does; None if unknown.
    """

    name: str
    groups: Callable[[MemberResults], Sequence[Any] | None]
    items: str
    delta: float
    unit: str = ""
    within: "Callable[[StudyResults, list[tuple[MemberResults, float]]], float | None] | None" = None
    absent: Callable[[MemberResults], str | None] | None = None
    interval: "Callable[[StudyResults, list[tuple[MemberResults, float]]], tuple[float, float] | None] | None" = None

    def finite(self, member: MemberResults) -> list[np.ndarray] | None:
        """The groups as numbers; None where one is missing, empty or not finite."""
        groups = self.groups(member)
        if not groups:
            return None
        found = [np.atleast_2d(np.asarray(group, np.float64)) for group in groups]
        return found if all(group.size and np.all(np.isfinite(group)) for group in found) else None

    def value(self, member: MemberResults) -> float | None:
        """The number of one model."""
        found = self.finite(member)
        return None if found is None else float(np.mean([group.mean() for group in found]))


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of a measure over points, such as the difference of two.

    Attributes:
      value: its mean over the pretraining seeds that have all of its points; None if none has.
      low, high: ends of the 95% interval; None where no uncertainty is known.
      over: what the interval covers, in words: "pretraining seeds", "problems only".
      seeds: number of those pretraining seeds.
      effect: the test over them; None for fewer than two.
      constant: whether the measure is one number for every model and item.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    over: str = ""
    seeds: int = 0
    effect: Effect | None = None
    constant: bool = False

    @property
    def interval(self) -> tuple[float | None, float | None, float | None]:
        return self.value, self.low, self.high

    @property
    def text(self) -> str:
        """The value and its interval, for evidence."""
        if self.value is None:
            return "not available"
        if self.low is None or self.high is None:
            return f"{self.value:+.3f} (uncertainty not known)".replace("-", "−")
        over = f"over {self.seeds} {SEEDS}, p = {self.effect.p:.2g}" if self.effect is not None else f"uncertainty over {self.over}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]".replace("-", "−") + f" ({over})"


def contrast(results: StudyResults, measure: Measure, weights: Mapping[Any, float]) -> Contrast:
    """A weighted sum over points, within each pretraining seed that has them all, then over seeds."""
    sums, members, raw = [], [], []
    for seed in results.seeds:
        of_seed = {m.point: m for point in weights for m in results.at(point) if m.member.seed == seed}
        groups = {point: found for point, m in of_seed.items() if (found := measure.finite(m)) is not None}
        if len(groups) < len(weights):
            continue
        summed = _weighted(groups, weights)
        if summed is not None:
            sums.append(summed)
            members.append([(of_seed[point], weight) for point, weight in weights.items()])
            raw += [group.ravel() for found in groups.values() for group in found]
    if not sums:
        return Contrast()
    value = float(np.mean([[group.mean() for group in summed] for summed in sums]))
    constant = bool(np.ptp(np.concatenate(raw)) == 0)
    found = [None if measure.within is None else measure.within(results, of_seed) for of_seed in members]
    variances = [variance for variance in found if variance is not None]
    if len(sums) == 1:
        return _within_run(results, measure, members[0], sums[0], value, variances, constant)
    tables = [[group.mean(axis=0) for group in summed] for summed in sums]  # over fine-tuning seeds
    if len({tuple(len(row) for row in rows) for rows in tables}) > 1:  # seeds were not scored on the same items
        tables = [[np.atleast_1d(row.mean()) for row in rows] for rows in tables]
    floor = float(np.mean(variances)) if variances else 0.0
    effect = unit_effect([np.stack(rows) for rows in zip(*tables)], sampled=bool(measure.items), floor=floor)
    return Contrast(value, effect.low, effect.high, SEEDS, len(sums), effect, constant)


def difference(results: StudyResults, measure: Measure, low: Any, high: Any) -> Contrast:
    """The measure at `high` less that at `low`."""
    return contrast(results, measure, {high: 1.0, low: -1.0})


def trend(results: StudyResults, measure: Measure, points: Sequence[Any], sign: int) -> tuple[Contrast, list[Contrast]]:
    """Linear change from the first to the last of the points, over their ranks, and the steps between neighbors; `sign` −1 turns falls into rises."""
    whole = contrast(results, measure, dict(zip(points, sign * trend_weights(len(points)))))
    return whole, [contrast(results, measure, {after: sign, before: -sign}) for before, after in zip(points, points[1:])]


def measured(results: StudyResults, measure: Measure, points: Sequence[Any]) -> dict[Any, float]:
    """Point → mean of the measure over its models, for the points that have one."""
    found = {point: [v for m in results.at(point) if (v := measure.value(m)) is not None] for point in points}
    return {point: float(np.mean(values)) for point, values in found.items() if values}


def left_out(results: StudyResults, measure: Measure, points: Sequence[Any]) -> str:
    """Which results at these points cannot be used and why, as sentences with a space before each; empty where all can."""
    members = [m for point in points for m in results.at(point)]
    broken = [m.name for m in members if measure.groups(m) and measure.finite(m) is None]
    gone = {m.name: why for m in members if measure.absent is not None and (why := measure.absent(m)) is not None}
    missing = [m.name for m in members if not measure.groups(m) and m.name not in gone]
    said = f" Not a finite number, so left out: {', '.join(broken)}." if broken else ""
    said += f" Left out: {'; '.join(f'{name} ({why})' for name, why in gone.items())}." if gone else ""
    return said + (f" No result: {', '.join(missing)}." if missing else "")


def measures(results: StudyResults) -> list[Measure]:
    """Every measure that a stage declares, for those that some member has."""
    declared = [measure for stage in stages().values() for measure in guarded(stage, "measures", stage.measures, [])(results)]
    return [measure for measure in declared if any(measure.value(m) is not None for m in results.members)]


def pairwise_rows(results: StudyResults) -> Rows:
    """Every measure at every pair of points: the difference of the later less the earlier, its interval, and p, alone and by Holm over the pairs."""
    rows: Rows = []
    for part in results.slices:
        for measure in measures(part):
            points = list(measured(part, measure, part.points))
            pairs = [(low, high, difference(part, measure, low, high)) for i, low in enumerate(points) for high in points[i + 1 :]]
            tested = [i for i, (_, _, found) in enumerate(pairs) if found.effect is not None]
            adjusted = dict(zip(tested, holm([found.effect.p for _, _, found in pairs if found.effect is not None]) if tested else ()))
            for i, (low, high, found) in enumerate(pairs):
                row = {axis.field: value for axis, value in part.facet} | {"measure": measure.name, "unit": measure.unit, "from": low, "to": high}
                row |= {"difference": found.value, "difference_lower": found.low, "difference_upper": found.high}
                row |= {"interval_over": found.over, "seeds": found.seeds, "p": None if found.effect is None else found.effect.p}
                rows.append(row | {"p_holm": float(adjusted[i]) if i in adjusted else None})
    return rows


def _weighted(groups: dict[Any, list[np.ndarray]], weights: Mapping[Any, float]) -> list[np.ndarray] | None:
    """One [fine-tuning seeds, items] per group; None if the points were not scored on the same items."""
    if len({tuple(group.shape[1] for group in found) for found in groups.values()}) > 1:
        return None
    summed = []
    for of_points in zip(*groups.values()):
        same = len({group.shape[0] for group in of_points}) == 1
        terms = [weights[point] * (group if same else group.mean(axis=0, keepdims=True)) for point, group in zip(groups, of_points)]
        summed.append(np.sum(terms, axis=0))
    return summed


def _within_run(
    results: StudyResults,
    measure: Measure,
    members: list[tuple[MemberResults, float]],
    groups: list[np.ndarray],
    value: float,
    variances: list[float],
    constant: bool,
) -> Contrast:
    """What one pretraining run knows of its uncertainty. It is no test of a claim about λ, so there is no p value."""
    if variances:
        reach = NORMAL * float(np.sqrt(variances[0]))
        return Contrast(value, value - reach, value + reach, "documents only", 1, None, constant)
    several = len({len(group) for group in groups}) == 1 and len(groups[0]) > 1
    if measure.interval is not None and not several:
        ends = measure.interval(results, members) or (None, None)
        return Contrast(value, *ends, over=f"{measure.items} only" if ends[0] is not None else "", seeds=1, constant=constant)
    if not measure.items:
        return Contrast(value, seeds=1, constant=constant)
    if several:
        found = unit_effect(groups, sampled=True)
        return Contrast(value, found.low, found.high, f"fine-tuning seeds and {measure.items} only", 1, None, constant)
    settings = results.config.report
    _, low, high = bootstrap_mean([group.mean(axis=0) for group in groups], samples=settings.bootstrap_samples, seed=settings.seed)
    return Contrast(value, low, high, f"{measure.items} only", 1, None, constant)
