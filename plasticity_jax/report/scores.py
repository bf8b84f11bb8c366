"""Every metric at every point: by task and as a mean over the learned tasks, against the held-out loss, and all metrics as one number per model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plasticity_jax.analysis.statistics import leave_one_out_pearson, pearson, spearman
from plasticity_jax.evaluate.metrics import metric_of, ordered_metrics
from plasticity_jax.report.comparisons import weighted_interval, with_interval
from plasticity_jax.report.effects import Contrast, Measure, contrast, difference
from plasticity_jax.report.results import MemberResults, Score, StudyResults, once
from plasticity_jax.report.verdicts import SCORE_MARGIN, score_measure
from plasticity_jax.stages import member_row, number
from plasticity_jax.stages.stage import Rows

MEAN = "mean (learned)"  # in the place of a task
CONSTANT = 1e-12  # scores that differ by less are the same, but for rounding
FEWEST = 3  # points of a correlation: two always lie on a line


@dataclass(frozen=True)
class Aggregate:
    """All learned tasks and compared metrics of a part as one number per model.

    Attributes:
      ranks: member → mean over tasks and metrics of its rank among the models of its pretraining seed; 1 is the best, ties share their mean rank.
      z: the same of the z-scores; a score above the mean counts as positive where higher is better.
      scores: member → over how many tasks x metrics.
      models: how many models of a seed were compared.
      notes: what is left out, or why there is nothing, as sentences.
    """

    ranks: dict[str, float]
    z: dict[str, float]
    scores: dict[str, int]
    models: int
    notes: tuple[str, ...]


def value_of(score: Score | None, metric: str) -> float | None:
    """A metric of a score; None where it has none that is finite."""
    return None if score is None else number(score.metrics.get(metric))


@once
def compared_metrics(results: StudyResults) -> list[str]:
    """The metrics that the page compares and some fine-tuned model has, in the order of their declaration."""
    names = [name for m in results.members for task in results.tasks if task in m.after for name in m.after[task].metrics]
    return [name for name in ordered_metrics(names) if metric_of(name).compared]


def tasks_with(results: StudyResults, metric: str) -> dict[str, tuple[str, ...]]:
    """What a metric is shown for: name → tasks. Every task that has it, then the learned ones together where there are several."""
    having = [t for t in results.tasks if any(value_of(m.after.get(t), metric) is not None for m in results.members)]
    learned = tuple(task for task in having if task in results.learned)
    return {task: (task,) for task in having} | ({MEAN: learned} if len(learned) > 1 else {})


def metric_measure(tasks: Sequence[str], metric: str, *, gain: bool) -> Measure:
    """A metric after fine-tuning, or its gain, averaged over tasks. Within one run its interval is over problems."""
    about = metric_of(metric)

    def groups(member: MemberResults) -> list[Any] | None:
        found = []
        for task in tasks:
            after, before = _by_problem(member.after.get(task), metric), _by_problem(member.before.get(task), metric) if gain else None
            if after is None or gain and (before is None or after.shape[1] != before.shape[1]):
                return None
            found.append(after if before is None else after - before.mean(axis=0))
        return found

    def interval(results: StudyResults, members: list[tuple[MemberResults, float]]) -> tuple[float, float] | None:
        terms = [[(weight, m.after[task]) for m, weight in members] + [(-weight, m.before[task]) for m, weight in members if gain] for task in tasks]
        return weighted_interval(terms, metric, results.config.report)

    name = f"{about.heading} {'gain' if gain else 'after'}"
    return Measure(name, groups, "problems", SCORE_MARGIN, about.unit or "share of problems", interval=interval)


def _by_problem(score: Score | None, metric: str) -> np.ndarray | None:
    """[fine-tuning seeds, problems]; [1, 1] for a metric that is no mean over all problems, or whose problems are not kept. None without a finite value."""
    value = value_of(score, metric)
    if score is None or value is None:
        return None
    found = [outcome.metric(metric) for outcome in score.outcomes] if metric_of(metric).of_all_problems else []
    rows = [np.asarray(one[0], np.float64) for one in found if one is not None]
    return np.stack(rows) if rows and len(rows) == len(found) and len({len(row) for row in rows}) == 1 else np.array([[value]])


def _measure(results: StudyResults, tasks: Sequence[str], metric: str, *, gain: bool) -> Measure:
    """The metric that a task is scored by has the measure of the claims, so that the page has one interval for it."""
    scores = [s for m in results.members for task in tasks for s in (m.after.get(task),) if s is not None]
    counted = bool(scores) and all(outcome.counts == metric for score in scores for outcome in score.outcomes)
    return score_measure(tasks, gain=gain) if counted else metric_measure(tasks, metric, gain=gain)


def gain_rows(results: StudyResults) -> Rows:
    """Score and gain by metric, task and point, and for the learned tasks together, with 95% intervals; of both less the first point's, paired.

    `interval_over` says what the intervals cover.
    """
    return [row for part in results.slices for row in _gain_rows(part)]


@once
def _gain_rows(part: StudyResults) -> Rows:
    field, rows = part.axis.field, []
    for metric in compared_metrics(part):
        for task, tasks in tasks_with(part, metric).items():
            score, gain = (_measure(part, tasks, metric, gain=gain) for gain in (False, True))
            after = {point: found for point in part.points if (found := contrast(part, score, {point: 1.0})).value is not None}
            gains = {point: contrast(part, gain, {point: 1.0}) for point in after}
            reference = next(iter(after), None)
            for point, found in after.items():
                before = [part.mean(point, lambda m, t=t: value_of(m.before.get(t), metric)) for t in tasks]
                row = {"metric": metric, "task": task, **part.swept(point), "timescale_share": part.timescale(point)}
                row |= with_interval("after", found.interval) | {"before": None if None in before else float(np.mean(before))}
                row |= with_interval("gain", gains[point].interval) | {f"reference_{field}": reference}
                for name, measure, known in (("after_difference", score, True), ("gain_difference", gain, gains[point].value is not None)):
                    compare = known and point != reference
                    row |= with_interval(name, difference(part, measure, reference, point).interval if compare else None)
                rows.append(row | {"interval_over": found.over, "seeds": found.seeds})
    return rows


def by_seed(part: StudyResults, tasks: Sequence[str], metric: str, *, gain: bool = False) -> dict[int, dict[Any, float]]:
    """Pretraining seed → point → the metric after fine-tuning, or its gain, a mean over tasks; of the models that have it on all of them."""
    found: dict[int, dict[Any, float]] = {}
    for m in part.members:
        values = [value_of(m.after.get(task), metric) for task in tasks]
        if gain:
            pairs = zip(values, [value_of(m.before.get(task), metric) for task in tasks])
            values = [None if after is None or before is None else after - before for after, before in pairs]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):
            found.setdefault(m.member.seed, {})[m.point] = float(np.mean(known))
    return {seed: {p: of_seed[p] for p in part.points if p in of_seed} for seed, of_seed in sorted(found.items())}


def seed_mean(of_seeds: dict[int, dict[Any, float]], points: Iterable[Any]) -> dict[Any, float]:
    """Point → mean over the pretraining seeds that have it."""
    found = {point: [values[point] for values in of_seeds.values() if point in values] for point in points}
    return {point: float(np.mean(values)) for point, values in found.items() if values}


# ----------------------------------------------------------------------------------------------------------------- loss against score


def correlation_rows(results: StudyResults) -> Rows:
    """Correlation over the points between held-out loss and score after fine-tuning, both means over seeds, by metric and task; needs three points.

    `seeds_lowest` and `seeds_highest`: Pearson within one pretraining seed. `note`: why a number is missing.
    """
    return [row for part in results.slices for row in _correlation_rows(part)]


@once
def _correlation_rows(part: StudyResults) -> Rows:
    rows = []
    for metric in compared_metrics(part):
        for task, tasks in tasks_with(part, metric).items():
            of_seeds = by_seed(part, tasks, metric)
            scores = seed_mean(of_seeds, part.losses)
            row = {**{axis.field: value for axis, value in part.facet}, "metric": metric, "task": task, "points": len(scores)}
            losses, values = [part.losses[p] for p in scores], list(scores.values())
            enough = len(scores) >= FEWEST and min(np.ptp(losses), np.ptp(values)) > CONSTANT
            # Leaving one out of three would leave two, which always lie on a line.
            left_out = leave_one_out_pearson(losses, values) if enough and len(scores) > FEWEST else ()
            ends = [v for v in map(number, left_out) if v is not None]
            within = [r for seed, found in of_seeds.items() if (r := _within_seed(part, seed, found)) is not None] if len(of_seeds) > 1 else []
            row |= {name: number(of(losses, values)) if enough else None for name, of in (("pearson", pearson), ("spearman", spearman))}
            row |= {"leave_one_out_lowest": min(ends, default=None), "leave_one_out_highest": max(ends, default=None)}
            row |= {"seeds_lowest": min(within, default=None), "seeds_highest": max(within, default=None)}
            rows.append(row | {"note": _why_not(part, losses, values)})
    return rows


def _within_seed(part: StudyResults, seed: int, scores: dict[Any, float]) -> float | None:
    losses = {m.point: m.loss for m in part.members if m.member.seed == seed and m.loss is not None}
    points = [point for point in scores if point in losses]
    return number(pearson([losses[p] for p in points], [scores[p] for p in points])) if len(points) >= FEWEST else None


def _why_not(part: StudyResults, losses: list[float], scores: list[float]) -> str:
    if len(scores) < FEWEST:
        return f"{len(scores)} of the {FEWEST} {part.axis.symbol} that it needs have a loss and a score"
    if np.ptp(scores) <= CONSTANT:
        return "the score is the same everywhere"
    if np.ptp(losses) <= CONSTANT:
        return "the loss is the same everywhere"
    return "" if len(scores) > FEWEST else f"leaving one {part.axis.symbol} out needs four"


# -------------------------------------------------------------------------------------------------------------------------- aggregate


@once
def aggregate(part: StudyResults) -> Aggregate:
    """Mean rank and mean z-score of every model over the learned tasks and their metrics, within its pretraining seed.

    Compared are the points whose models of every seed have all of these scores, so that each seed ranks the same ones. A task x metric that some
    compared model lacks, or that is the same for all models of the seed, is left out.
    """
    scored = [m for m in part.members if part.learned and all(task in m.after for task in part.learned)]
    seeds = sorted({m.member.seed for m in scored})
    of = {(m.point, m.member.seed): m for m in scored}
    points = [point for point in part.points if seeds and all((point, seed) in of for seed in seeds)]
    notes = []
    absent = [part.axis.text(point) for point in part.points if point not in points]
    if not part.learned:
        said = "No task was learned" if any(m.after for m in part.members) else "No fine-tuned model has been scored yet"
        return Aggregate({}, {}, {}, 0, (f"{said}, so there is nothing to aggregate.",))
    if absent:
        every = " with every pretraining seed" if len(part.seeds) > 1 else ""
        notes.append(f"Left out: {part.axis.symbol} = {', '.join(absent)}, not scored on every learned task{every}.")
    if len(points) < 2:
        needed = f"A rank needs two {part.axis.symbol} whose models are scored on every learned task; there {_be(len(points))}."
        return Aggregate({}, {}, {}, len(points), (*notes, needed))
    columns, missing = [], []
    for metric in compared_metrics(part):
        for task in part.learned:
            having = [value_of(of[point, seed].after[task], metric) is not None for point in points for seed in seeds]
            if any(having):
                (columns if all(having) else missing).append((metric, task))
    if missing:
        notes.append(f"Left out, because some models lack them: {_named(missing)}.")
    ranks, z, counts, constant = {}, {}, {}, {}
    for seed in seeds:
        found = _ranked(np.array([[value_of(of[p, seed].after[t], metric) for metric, t in columns] for p in points], np.float64), columns)
        for column in found[2]:
            constant.setdefault(column, []).append(seed)
        for i, point in enumerate(points):
            name, count = of[point, seed].name, len(columns) - len(found[2])
            if count:
                ranks[name], z[name], counts[name] = float(found[0][i]), float(found[1][i]), count
    for of_seeds in dict.fromkeys(tuple(found) for found in constant.values()):
        where = "" if len(of_seeds) == len(seeds) else f" of seed {', '.join(map(str, of_seeds))}"
        same = [column for column, found in constant.items() if tuple(found) == of_seeds]
        notes.append(f"Left out, because every model{where} has the same score, which has no z-score: {_named(same)}.")
    if not ranks:
        notes.append("No score is left to aggregate.")
    return Aggregate(ranks, z, counts, len(points), tuple(notes))


def _ranked(scores: np.ndarray, columns: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """[models, tasks x metrics] scores → [models] mean ranks, [models] mean z-scores, and the columns that are constant and left out."""
    from scipy.stats import rankdata

    same = np.ptp(scores, axis=0) <= CONSTANT
    signs = np.array([1.0 if metric_of(metric).higher_is_better else -1.0 for metric, _ in columns])
    kept = (scores * signs)[:, ~same]
    left = [column for column, one in zip(columns, same) if one]
    if not kept.shape[1]:
        return np.zeros(len(scores)), np.zeros(len(scores)), left
    z = (kept - kept.mean(axis=0)) / kept.std(axis=0)
    return rankdata(-kept.round(12), axis=0).mean(axis=1), z.mean(axis=1), left


def _named(columns: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{metric_of(metric).heading} on {task}" for metric, task in columns)


def _be(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def aggregate_rows(results: StudyResults) -> Rows:
    """Every model's mean rank and mean z-score over learned tasks x metrics; of a study over several fields, within its part."""
    return [
        member_row(m, mean_rank=found.ranks[m.name], mean_z=found.z[m.name], scores=found.scores[m.name], models=found.models)
        for part in results.slices
        for found in (aggregate(part),)
        for m in part.members
        if m.name in found.ranks
    ]


def aggregate_contrasts(part: StudyResults, of: str) -> dict[Any, Contrast]:
    """Point → mean over the pretraining seeds of "ranks" or "z" with its interval over them."""
    values: dict[str, float] = getattr(aggregate(part), of)
    measure = Measure(of, lambda m: [[[values[m.name]]]] if m.name in values else None, "", 0.0)
    found = {point: contrast(part, measure, {point: 1.0}) for point in part.points}
    return {point: one for point, one in found.items() if one.value is not None}


# ------------------------------------------------------------------------------------------------------------------------------ words


def spoken(part: StudyResults, values: Mapping[Any, float | None], digits: int = 3) -> str:
    """Values over the points in words: "0.6 at λ = 0, 0.65 at λ = 0.1"."""
    known = [(point, value) for point, value in values.items() if value is not None]
    return ", ".join(f"{round(value, 12) + 0.0:.{digits}g} at {part.axis.equation(point)}" for point, value in known)


def spoken_rows(part: StudyResults, name: str) -> str:
    """A column of `gain_rows` in words, by metric: of the learned tasks together, or of every task where they have no mean."""
    sentences = []
    for metric in compared_metrics(part):
        shown = tasks_with(part, metric)
        for task in [MEAN] if MEAN in shown else shown:
            rows = [row for row in _gain_rows(part) if (row["metric"], row["task"]) == (metric, task) and row[name] is not None]
            if rows:
                values = {row[part.axis.field]: row[name] for row in rows}
                sentences.append(f"{metric_of(metric).heading}, {'mean over the learned tasks' if task == MEAN else task}: {spoken(part, values)}.")
    return " ".join(sentences)
