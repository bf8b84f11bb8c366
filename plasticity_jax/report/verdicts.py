"""The paper's claims against a study: one rule each, fixed before any run. docs/statistics.md says what each rule tests, and how often it errs.

The claims are about weight decay, called λ: a study along another field has no verdicts. The unit is the pretraining seed, so one seed has none either.
Source of the claims: "Weight Decay Improves Language Model Plasticity" (arXiv 2602.11137);
those not in its abstract are as reported by readers of the text.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plasticity_jax.analysis.statistics import holm
from plasticity_jax.report.effects import Contrast, Measure, difference, left_out, measured, trend
from plasticity_jax.report.results import StudyResults
from plasticity_jax.stages import guarded, stages
from plasticity_jax.study.sweep import DECAY

SUPPORTS, CONTRADICTS, NO_EFFECT, CANNOT_TELL = "supports", "contradicts", "no effect larger than δ", "cannot tell"
ONE_RUN = "one pretraining run: no verdict"

LOSS_MARGIN = 0.01  # nats per token: smaller differences of held-out loss count as ties
SCORE_MARGIN = 0.02  # of accuracy: a difference up to this counts as no effect
# The paper fine-tunes models up to about this much above their lowest loss and calls the range useful; beyond it, decay harms pretraining itself.
USEFUL_LOSS = 0.1
ONE_SIDED = 0.025  # p below which a verdict is given on either side: 5% for both


@dataclass(frozen=True)
class Verdict:
    """One claim held against a study.

    Attributes:
      claim: what the paper says.
      source: which part of the paper.
      rule: how this code decides, in words.
      evidence: the numbers the rule was applied to, or why there are none.
      verdict: one of the five words above.
      effect, effect_lower, effect_upper: the number that the claim is about, positive where it speaks for the claim, with its 95% interval.
      interval_over: what the interval covers.
      seeds: pretraining seeds that it rests on.
      p, p_holm: two-sided, alone and adjusted for the number of claims of the study; None without a test.
      delta: a difference up to this counts as no effect; None where the claim has none.
    """

    claim: str
    source: str
    rule: str
    evidence: str
    verdict: str
    effect: float | None = None
    effect_lower: float | None = None
    effect_upper: float | None = None
    interval_over: str = ""
    seeds: int = 0
    p: float | None = None
    p_holm: float | None = None
    delta: float | None = None

    @property
    def stands(self) -> bool:
        """Whether it would be given at 5% for all claims together."""
        return self.p_holm is not None and self.p_holm <= 2 * ONE_SIDED

    @property
    def shown(self) -> str:
        """The verdict with its δ as a number."""
        return self.verdict.replace("δ", f"{self.delta:g}") if self.delta is not None else self.verdict


@dataclass(frozen=True)
class Found:
    """What a rule found: the arguments of `judged`."""

    evidence: str
    shown: Contrast = Contrast()
    supports: float = 1.0
    contradicts: float = 1.0
    no_effect: bool = False
    delta: float | None = None
    tested: bool = False


def verdicts(results: StudyResults) -> list[Verdict]:
    """Every claim's verdict, in the order of the page; none for a study that does not compare weight decays."""
    if results.axis.field != DECAY:
        return []
    return with_holm([verdict for rule in rules() if (verdict := rule(results)) is not None])


def with_holm(found: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with p adjusted for their number."""
    tested = [i for i, verdict in enumerate(found) if verdict.p is not None]
    adjusted = dict(zip(tested, holm([found[i].p for i in tested]) if tested else ()))
    return [replace(verdict, p_holm=float(adjusted[i])) if i in adjusted else verdict for i, verdict in enumerate(found)]


def rules() -> list[Callable[[StudyResults], Verdict | None]]:
    """The rules of the claims: those across stages, and those that a stage declares."""
    of_stages = [guarded(stage, "a claim", rule, None) for stage in stages().values() for rule in stage.claims]
    return [loss_is_u_shaped, downstream_prefers_more, *of_stages, gain_rises]


def judged(results: StudyResults, claim: str, source: str, rule: str, found: Found) -> Verdict:
    """The verdict that follows from the two one-sided p values, the equivalence, and the number of pretraining seeds."""
    one_run = len(results.seeds) == 1 or found.shown.seeds == 1
    return decided(claim, source, rule, found, one_run=one_run, seeds=found.shown.seeds)


def decided(claim: str, source: str, rule: str, found: Found, *, one_run: bool, seeds: int) -> Verdict:
    """`judged` for a claim that rests on `seeds` pretraining seeds, or on one run, which decides nothing."""
    p = min(1.0, 2 * min(found.supports, found.contradicts)) if found.tested else None
    verdict = CANNOT_TELL
    if one_run:
        verdict, p = ONE_RUN, None
    elif found.tested:
        if found.no_effect:
            verdict = NO_EFFECT
        elif min(found.supports, found.contradicts) <= ONE_SIDED:
            verdict = SUPPORTS if found.supports < found.contradicts else CONTRADICTS
    return Verdict(claim, source, rule, found.evidence, verdict, *found.shown.interval, found.shown.over, seeds, p, delta=found.delta)


def finished_losses(results: StudyResults) -> dict[float, float]:
    """λ → held-out loss, a mean over seeds, ascending; without λ that diverged with any seed."""
    diverged = {m.point for m in results.members if m.state == "diverged"}
    return {decay: loss for decay, loss in sorted(results.losses.items()) if decay not in diverged}


def useful_range(results: StudyResults) -> list[float]:
    """λ from the smallest to the largest whose held-out loss, a mean over seeds, is at most USEFUL_LOSS above the lowest; none that diverged."""
    losses = finished_losses(results)
    largest = max((decay for decay, loss in losses.items() if loss <= min(losses.values()) + USEFUL_LOSS), default=0.0)
    return [decay for decay in losses if decay <= largest]


def trend_found(results: StudyResults, measures: Sequence[Measure], sign: int, what: str) -> Found:
    """A claim that every measure rises (`sign` 1) or falls (−1) with λ over the useful range; the first is shown, and decides on equivalence.

    A trend supports a claim unless a step between neighbors goes the other way with confidence (Holm over the steps). Any measure that goes the other
    way contradicts it, at a level divided by their number.
    """
    if results.no_loss:
        return Found(f"{results.no_loss} Without it no λ is in the useful range.")
    useful = useful_range(results)
    points = [d for d in useful if all(d in measured(results, measure, [d]) for measure in measures)]
    missing = "".join(dict.fromkeys(left_out(results, measure, useful) for measure in measures))
    if len(points) < 2:
        return Found(f"Fewer than two λ of the useful range have {what}.{missing}")
    shown = ", ".join(f"{value:.3f} at λ={d:.4g}" for d, value in measured(results, measures[0], points).items())
    wholes, steps = [], []
    for measure in measures:
        whole, between = trend(results, measure, points, sign)
        wholes.append(whole)
        steps += between
    word = "Rise" if sign > 0 else "Fall"
    texts = [f"{word} of {measure.name} {whole.text}." for measure, whole in zip(measures, wholes)]
    evidence = f"{measures[0].name}: {shown}. From λ={points[0]:.4g} to λ={points[-1]:.4g} along a line over ranks: " + " ".join(texts) + missing
    first = wholes[0]
    if first.value is None:
        return Found(evidence + " No pretraining seed has all of these λ.")
    if first.constant:
        return Found(evidence + " It is the same number for every model, so nothing can be compared.", first)
    effects = [whole.effect for whole in wholes if whole.effect is not None]
    if len(effects) < len(wholes):
        return Found(evidence, first, delta=measures[0].delta)
    back = holm([step.effect.below() if step.effect is not None else 1.0 for step in steps])
    supports = max(effect.above() for effect in effects)
    if supports <= ONE_SIDED and min(back) <= ONE_SIDED:
        supports, evidence = 1.0, evidence + " A step between neighboring λ goes the other way."
    contradicts = min(1.0, len(effects) * min(effect.below() for effect in effects))
    delta = measures[0].delta
    of_first = [whole.effect for whole in (first, *steps[: len(points) - 1])]
    no_effect = all(effect is not None and effect.within(delta) for effect in of_first)
    return Found(evidence, first, supports, contradicts, no_effect, delta, True)


TREND_RULE = (
    "Per pretraining seed, a line over the ranks of λ in the useful range (up to the largest λ that never diverged and whose held-out loss is at most "
    f"{USEFUL_LOSS} nats above the lowest), then a t test over seeds"
)
WORDS_RULE = (
    "Supports or contradicts if the 95% interval of the change excludes 0 on that side; “no effect larger than δ” if it, and that "
    "of every step between neighbors, lies within ±{delta}."
)


def loss_measure() -> Measure:
    """Held-out loss at the end of pretraining."""
    return Measure("held-out loss", lambda m: None if m.loss is None else [[[m.loss]]], "", LOSS_MARGIN, "nats/token")


def score_measure(tasks: Sequence[str], *, gain: bool) -> Measure:
    """Greedy accuracy after fine-tuning, or the gain, averaged over tasks: [fine-tuning seeds, problems] of each."""

    def groups(member):
        if not tasks or any(task not in member.after or (gain and task not in member.before) for task in tasks):
            return None
        found = []
        for task in tasks:
            after = [outcome.greedy for outcome in member.after[task].outcomes]
            if gain:
                before = member.before[task].greedy
                if len(before) != len(member.after[task].greedy):
                    return None
                after = [row - before for row in after]
            found.append(after)
        return found

    return Measure("gain" if gain else "score after", groups, "problems", SCORE_MARGIN, "accuracy")


def loss_is_u_shaped(results: StudyResults) -> Verdict:
    return judged(
        results,
        "Held-out loss is lowest at an intermediate weight decay.",
        "pretraining loss over λ",
        f"Supports if some λ inside the grid is more than {LOSS_MARGIN} nats below both ends, paired by seed; contradicts if an end is more than "
        f"{LOSS_MARGIN} nats below every λ inside: the largest p of the comparisons, times the number of candidates. Needs three finished λ, and all "
        "of them for “contradicts”: beyond the last finished one the loss may rise. “No effect larger than δ” if every end and every λ inside differ "
        f"by at most {LOSS_MARGIN} nats.",
        _u_shape(results),
    )


def _u_shape(results: StudyResults) -> Found:
    if results.no_loss:
        return Found(results.no_loss)
    found, measure = finished_losses(results), loss_measure()
    shown = ", ".join(f"{loss:.3f} at λ={decay:.4g}" for decay, loss in found.items()) or "no finished member"
    evidence = f"Held-out loss in nats per token: {shown}."
    if len(found) < 3:
        return Found(evidence + " Fewer than three λ have finished.")
    first, *inside, last = found
    ends = [first, last]

    @functools.cache
    def lead(decay: float, other: float) -> Contrast:
        return difference(results, measure, decay, other)  # a lower loss is the better one

    best, end = (min(among, key=lambda d: found[d]) for among in (inside, ends))
    compared = lead(best, end)
    evidence += f" λ={end:.4g} less λ={best:.4g}: {compared.text}."
    effects = [lead(decay, other).effect for decay in inside for other in ends]
    if any(effect is None for effect in effects):
        return Found(evidence, compared, delta=LOSS_MARGIN)
    supports = some_lead(lead, inside, ends, LOSS_MARGIN)
    contradicts = some_lead(lead, ends, inside, LOSS_MARGIN) if len(found) == len(results.points) else 1.0
    no_effect = all(effect is not None and effect.within(LOSS_MARGIN) for effect in effects)
    return Found(evidence, compared, supports, contradicts, no_effect, LOSS_MARGIN, True)


def some_lead(lead: Callable[[Any, Any], Contrast], candidates: Sequence[Any], others: Sequence[Any], margin: float = 0.0) -> float:
    """p value for one of the candidates being ahead of all others by more than `margin`: the largest p of its comparisons, times the candidates; 1 without any.

    Args:
      lead: (candidate, other) → by how much the candidate is ahead.
    Source: Berger 1982 for the largest p of an intersection; Bonferroni for the choice of the candidate.
    """
    found = []
    for candidate in candidates:
        effects = [lead(candidate, other).effect for other in others]
        found.append(max((1.0 if e is None else e.above(margin) for e in effects), default=1.0))
    return min(1.0, len(found) * min(found)) if found else 1.0


def downstream_prefers_more(results: StudyResults) -> Verdict:
    return judged(
        results,
        "The weight decay that is best after fine-tuning is at least as large as the one with the lowest held-out loss.",
        "best λ before and after fine-tuning",
        "Score: greedy accuracy after fine-tuning, averaged over the tasks the models learned. Supports if some λ of the useful range, at or above the "
        "loss-best one, scores better than every λ below it, paired by seed; contradicts if some λ below it scores better than every other: the largest "
        "p of the comparisons, times the number of candidates. Every λ whose loss is within "
        f"{LOSS_MARGIN} nats of the lowest, or not above it with 95% confidence, may be the loss-best one, and all must agree. “No effect larger "
        f"than δ” if all these scores differ by at most {SCORE_MARGIN}.",
        _downstream(results),
    )


def _downstream(results: StudyResults) -> Found:
    if not results.learned:
        return Found(_nothing_learned(results))
    if results.no_loss:
        return Found(results.no_loss)
    measure, useful, finished = score_measure(results.learned, gain=False), useful_range(results), finished_losses(results)
    scores = measured(results, measure, list(finished))
    if len(scores) < 2:
        return Found("Fewer than two λ have a score on every learned task." + left_out(results, measure, list(finished)))

    @functools.cache
    def lead(decay: float, other: float) -> Contrast:
        return difference(results, measure, other, decay)

    losses = {d: finished[d] for d in scores}
    best, optima = max(scores, key=lambda d: scores[d]), loss_optima(results, losses)
    evidence = [f"Lowest loss at λ={' or '.join(f'{d:.4g}' for d in optima)}, best score {scores[best]:.3f} at λ={best:.4g}."]
    supports, contradicts, no_effect, shown = 0.0, 0.0, True, Contrast()
    for optimum in optima:
        below, rest = [d for d in scores if d < optimum], [d for d in scores if d >= optimum]
        if not below:
            supports, contradicts, no_effect = 1.0, 1.0, False
            evidence.append(f"No λ lies below {optimum:.4g}, so nothing could speak against the claim.")
            continue
        compared = lead(max(rest, key=lambda d: scores[d]), max(below, key=lambda d: scores[d]))
        shown = compared if shown.value is None else shown
        if compared.constant:
            return Found(evidence[0] + " The score is the same number for every model, so nothing can be compared.", compared)
        evidence.append(f"Best at or above λ={optimum:.4g} less best below it: {compared.text}.")
        supports = max(supports, some_lead(lead, [d for d in rest if d in useful], below))
        contradicts = max(contradicts, some_lead(lead, below, rest))
        effects = [lead(decay, other).effect for decay in rest for other in below]
        no_effect = no_effect and all(effect is not None and effect.within(SCORE_MARGIN) for effect in effects)
    return Found(" ".join(evidence), shown, supports, contradicts, no_effect, SCORE_MARGIN, shown.effect is not None)


def loss_optima(results: StudyResults, losses: dict[float, float]) -> list[float]:
    """Every λ that may have the lowest loss, ascending: within LOSS_MARGIN of the lowest, or not above it with 95% confidence."""
    lowest = min(losses, key=lambda d: losses[d])
    return [d for d in sorted(losses) if losses[d] <= losses[lowest] + LOSS_MARGIN or _may_tie(results, lowest, d)]


def _may_tie(results: StudyResults, lowest: float, decay: float) -> bool:
    """Whether the seeds leave open that this λ has the lowest loss; one seed leaves that to LOSS_MARGIN alone."""
    effect = difference(results, loss_measure(), lowest, decay).effect
    return effect is not None and effect.above() > 2 * ONE_SIDED


def gain_rises(results: StudyResults) -> Verdict:
    return judged(
        results,
        "Models pretrained with more weight decay gain more from fine-tuning, over the useful range.",
        "abstract",
        f"{TREND_RULE}. Gain: greedy accuracy after less before, averaged over the tasks the models learned; problems count as drawn too. "
        + WORDS_RULE.format(delta=SCORE_MARGIN),
        _gain(results),
    )


def _gain(results: StudyResults) -> Found:
    if not results.learned:
        return Found(_nothing_learned(results))
    return trend_found(results, [score_measure(results.learned, gain=True)], 1, "a gain on every learned task")


def _nothing_learned(results: StudyResults) -> str:
    return "No task was learned by any member." if any(m.after for m in results.members) else "No fine-tuned model has been scored yet."
