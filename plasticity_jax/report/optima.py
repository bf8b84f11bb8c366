"""The best weight decay of a setting, before and after fine-tuning, and whether it moves with the number of tokens. docs/statistics.md has the rules."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plasticity_jax.report.effects import Contrast, Measure, difference, measured
from plasticity_jax.report.results import StudyResults
from plasticity_jax.report.verdicts import (
    CANNOT_TELL,
    ONE_RUN,
    ONE_SIDED,
    Found,
    Verdict,
    decided,
    finished_losses,
    loss_measure,
    loss_optima,
    score_measure,
    some_lead,
)

LARGER, NOT_LARGER = "larger", "not larger"
SAME_DECAY = 1e-3  # relative: λ of two studies that are nearer are one λ


@dataclass(frozen=True)
class Best:
    """The best of the weight decays of a setting.

    Attributes:
      decay: λ with the best mean over seeds; of equals the smallest.
      value: that mean.
      equals: further λ with the same mean.
      of_seeds: seed → its own best λ, for the seeds that have all of the λ compared.
    """

    decay: float
    value: float
    equals: tuple[float, ...]
    of_seeds: dict[int, float]

    @property
    def agree(self) -> int:
        """Seeds whose own best λ it is."""
        return sum(decay == self.decay for decay in self.of_seeds.values())

    @property
    def text(self) -> str:
        """λ and how many seeds agree, for evidence."""
        others = "".join(f" or {decay:.4g}" for decay in self.equals)
        return f"λ={self.decay:.4g}{others} ({self.agree} of {len(self.of_seeds)} seeds)"


@dataclass(frozen=True)
class Respect:
    """What the weight decays of a setting are compared by.

    Attributes:
      measure: one number per model.
      sign: 1 if more of it is better, −1 if less.
    """

    measure: Measure
    sign: int

    def best(self, results: StudyResults) -> Best | None:
        """Over the λ that did not diverge with any seed; None if none of them has a number."""
        found = measured(results, self.measure, list(finished_losses(results)))
        return None if not found else self._best(results, found)

    def _best(self, results: StudyResults, found: dict[float, float]) -> Best:
        top = max(self.sign * value for value in found.values())
        first, *equals = [decay for decay, value in found.items() if self.sign * value == top]
        of_seeds = {}
        for seed in results.seeds:
            own = {m.point: v for decay in found for m in results.at(decay) if m.member.seed == seed and (v := self.measure.value(m)) is not None}
            if len(own) == len(found):
                of_seeds[seed] = max(own, key=lambda decay: self.sign * own[decay])
        return Best(first, found[first], tuple(equals), of_seeds)

    def lead(self, results: StudyResults) -> Callable[[float, float], Contrast]:
        """(λ, other λ) → by how much the first is better."""

        @functools.cache
        def lead(decay: float, other: float) -> Contrast:
            low, high = (other, decay) if self.sign > 0 else (decay, other)
            return difference(results, self.measure, low, high)

        return lead


def by_loss() -> Respect:
    """By held-out loss at the end of pretraining."""
    return Respect(loss_measure(), -1)


def by_score(tasks: Sequence[str]) -> Respect:
    """By greedy accuracy after fine-tuning, a mean over tasks."""
    return Respect(score_measure(tasks, gain=False), 1)


@dataclass(frozen=True)
class Larger:
    """Whether the downstream-best λ of a setting is larger than the loss-best: a word, why if there is none, the two-sided p, and the seeds it rests on."""

    word: str
    why: str = ""
    p: float | None = None
    seeds: int = 0


def larger(results: StudyResults, tasks: Sequence[str]) -> Larger:
    """Whether some λ above the loss-best has a better score than every λ at or below it, by the chance of pretraining."""
    if len(results.seeds) == 1:
        return Larger(ONE_RUN, seeds=1)
    respect, losses = by_score(tasks), finished_losses(results)
    scores = measured(results, respect.measure, list(losses))
    if len(scores) < 2:
        return Larger(CANNOT_TELL, "fewer than two λ have a loss and a score")
    optima, lead = loss_optima(results, {decay: losses[decay] for decay in scores}), respect.lead(results)
    ends = lead(min(scores), max(scores))
    if ends.seeds < 2:
        return Larger(ONE_RUN if ends.seeds else CANNOT_TELL, "" if ends.seeds else "no seed has both ends of the grid", seeds=ends.seeds)
    if ends.constant:
        return Larger(CANNOT_TELL, "the score is the same number for every model", seeds=ends.seeds)
    above, below = 0.0, 0.0
    for optimum in optima:
        upper, rest = [d for d in scores if d > optimum], [d for d in scores if d <= optimum]
        above, below = max(above, some_lead(lead, upper, rest) if upper else 1.0), max(below, some_lead(lead, rest, upper) if upper else 1.0)
    if max(optima) == max(scores):
        return Larger(CANNOT_TELL, f"the largest λ, {max(scores):.4g}, may be the loss-best, and none lies above it", seeds=ends.seeds)
    word = LARGER if above <= ONE_SIDED else NOT_LARGER if below <= ONE_SIDED else CANNOT_TELL
    return Larger(word, "" if word != CANNOT_TELL else "chance could have given the difference", min(1.0, 2 * min(above, below)), ends.seeds)


# ------------------------------------------------------------------------------------------------------------- the claim about tokens

RULE = (
    "Unit: the pretraining seed. An optimum moves down if, for a cut between the λ that both settings have, some λ above it leads every λ at or below "
    "with fewer tokens, and some λ at or below leads every λ above with more: the larger p of the two, each the largest p of its comparisons times its "
    "candidates; over the cuts the smallest, times their number. Where fewer than two λ are shared, the setting with fewer tokens must be best above one "
    "of its λ, and the other below one of its own that is not above that. Supports: loss-best and downstream-best both move down (larger p). Contradicts: "
    "either moves up (smaller p, times two). Score: greedy accuracy after fine-tuning, averaged over the tasks that both settings learned, on the same "
    "test rows."
)


@dataclass(frozen=True)
class Budget:
    """A setting of the claim about tokens: its name, its results, and its tokens per parameter."""

    name: str
    results: StudyResults
    tokens_per_parameter: float

    @property
    def shown(self) -> str:
        return f"{self.tokens_per_parameter:.3g} tokens per parameter"


def optima_move(fewer: Budget, more: Budget, tasks: Sequence[str], differs: str = "") -> Verdict:
    """Whether both optima move down from one setting to the same with more tokens.

    Args:
      tasks: those that both learned, on the same test rows.
      differs: in what else the two settings differ, as a sentence; empty if in nothing.
    """
    found, seeds = _optima_move(fewer, more, tasks)
    found = found if not differs else Found(f"{found.evidence} {differs}", found.shown, found.supports, found.contradicts, tested=found.tested)
    return decided(
        f"With more tokens per parameter, both the loss-best and the downstream-best weight decay move down: {fewer.name} against {more.name}.",
        "models at 20 and 140 tokens per parameter",
        RULE,
        found,
        one_run=any(len(one.results.seeds) == 1 for one in (fewer, more)) or seeds == 1,
        seeds=seeds,
    )


def _optima_move(fewer: Budget, more: Budget, tasks: Sequence[str]) -> tuple[Found, int]:
    evidence, down, up, seeds = [], [], [], []
    respects = {"Loss": by_loss()} | ({"Score": by_score(tasks)} if tasks else {})
    for name, respect in respects.items():
        found = [(budget, respect.best(budget.results)) for budget in (fewer, more)]
        shown = [f"{'no λ has a number' if best is None else f'best at {best.text}'} with {budget.shown}" for budget, best in found]
        evidence.append(f"{name}: {', '.join(shown)}")
        if any(best is None for _, best in found):
            evidence[-1] += "."
            continue
        down.append(moves(respect, fewer.results, more.results))
        up.append(moves(respect, more.results, fewer.results))
        seeds += [len(best.of_seeds) for _, best in found if best is not None]
        evidence[-1] += f"; moves down p = {down[-1]:.2g}, up p = {up[-1]:.2g} (one-sided)."
    if not tasks:
        evidence.append("No task was learned in both settings and tested on the same rows, so nothing is known of the downstream-best λ.")
    if len(down) < 2:
        return Found(" ".join(evidence)), min(seeds, default=0)
    return Found(" ".join(evidence), supports=max(down), contradicts=min(1.0, 2 * min(up)), tested=True), min(seeds)


def moves(respect: Respect, upper: StudyResults, lower: StudyResults) -> float:
    """One-sided p value for the optimum of `upper` lying above that of `lower`; 1 where their λ leave no cut."""
    points = [list(measured(results, respect.measure, list(finished_losses(results)))) for results in (upper, lower)]
    leads = [respect.lead(results) for results in (upper, lower)]
    found = []
    for above, rest, below, others in cuts(*points):
        found.append(max(some_lead(leads[0], above, rest), some_lead(leads[1], below, others)))
    return min(1.0, len(found) * min(found)) if found else 1.0


def cuts(upper: list[float], lower: list[float]) -> list[tuple[list[float], list[float], list[float], list[float]]]:
    """For every cut: λ of the upper setting above it and the rest, then λ of the lower setting below it and the rest."""
    shared = [(d, other) for d in upper for other in lower if abs(d - other) <= SAME_DECAY * max(d, other)]
    if len(shared) >= 2:
        ups, lows = map(list, zip(*shared))
        return [(ups[i:], ups[:i], lows[:i], lows[i:]) for i in range(1, len(shared))]
    found = []
    for i, floor in enumerate(upper[:-1]):
        below = [d for d in lower if d <= floor * (1 + SAME_DECAY)]
        if len(below) >= 2:
            found.append((upper[i + 1 :], upper[: i + 1], below[:-1], lower[len(below) - 1 :]))
    return found
