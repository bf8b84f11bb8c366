"""The paper's claims against a study: one rule each, fixed before any run. With one seed a verdict is at most one of three words.

The claims are about weight decay, called λ: a study along another field has no verdicts. Intervals are 95% bootstrap intervals.
Source of the claims: "Weight Decay Improves Language Model Plasticity" (arXiv 2602.11137);
those not in its abstract are as reported by readers of the text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plasticity_jax.report.comparisons import score_difference
from plasticity_jax.report.results import StudyResults
from plasticity_jax.stages import guarded, stages
from plasticity_jax.study.sweep import DECAY

CONSISTENT, INCONSISTENT, CANNOT_TELL = "consistent with", "inconsistent with", "cannot tell"

LOSS_MARGIN = 0.01  # nats per token: smaller differences of held-out loss count as ties
# The paper fine-tunes models up to about this much above their lowest loss and calls the range useful; beyond it, decay harms pretraining itself.
USEFUL_LOSS = 0.1


@dataclass(frozen=True)
class Verdict:
    """One claim held against a study.

    Attributes:
      claim: what the paper says.
      source: which part of the paper.
      rule: how this code decides, in words.
      evidence: the numbers the rule was applied to.
      verdict: one of the three words above.
    """

    claim: str
    source: str
    rule: str
    evidence: str
    verdict: str


def verdicts(results: StudyResults) -> list[Verdict]:
    """Every claim's verdict, in the order of the page; none for a study that does not compare weight decays."""
    if results.axis.field != DECAY:
        return []
    return [verdict for rule in rules() if (verdict := rule(results)) is not None]


def rules() -> list[Callable[[StudyResults], Verdict | None]]:
    """The rules of the claims: those across stages, and those that a stage declares."""
    of_stages = [guarded(stage, "a claim", rule, None) for stage in stages().values() for rule in stage.claims]
    return [loss_is_u_shaped, downstream_prefers_more, *of_stages, gain_rises, optima_move]


def useful_range(results: StudyResults) -> list[float]:
    """λ from the smallest to the largest whose held-out loss is at most USEFUL_LOSS above the lowest."""
    losses = results.losses
    if not losses:
        return []
    largest = max(decay for decay, loss in losses.items() if loss <= min(losses.values()) + USEFUL_LOSS)
    return sorted(decay for decay in losses if decay <= largest)


def loss_is_u_shaped(results: StudyResults) -> Verdict:
    losses = sorted(results.losses.items())
    verdict = CANNOT_TELL
    if len(losses) >= 3:
        first, *inner, last = (loss for _, loss in losses)
        if min(inner) + LOSS_MARGIN < min(first, last):
            verdict = CONSISTENT
        elif min(first, last) + LOSS_MARGIN < min(inner) and len(losses) == len(results.points):
            verdict = INCONSISTENT
    shown = ", ".join(f"{loss:.3f} at λ={decay:.4g}" for decay, loss in losses) or "no finished member"
    return Verdict(
        "Held-out loss is lowest at an intermediate weight decay.",
        "pretraining loss over λ",
        f"Consistent if some λ inside the grid has a held-out loss more than {LOSS_MARGIN} nats below both ends; inconsistent if an end is more "
        f"than {LOSS_MARGIN} nats below every λ inside. Needs three finished λ, and all of them for “inconsistent”: beyond the last finished one "
        "the loss may rise.",
        f"Held-out loss in nats per token: {shown}.",
        verdict,
    )


def downstream_prefers_more(results: StudyResults) -> Verdict:
    verdict, evidence = _downstream(results)
    return Verdict(
        "The weight decay that is best after fine-tuning is at least as large as the one with the lowest held-out loss.",
        "best λ before and after fine-tuning",
        "Score: greedy accuracy after fine-tuning, averaged over the tasks the models learned. The best-scoring λ at or above the loss-best λ is "
        "compared with the best-scoring λ below it, paired by problem: consistent if the interval of the difference is above 0, inconsistent if "
        f"it is below 0. If several λ are within {LOSS_MARGIN} nats of the lowest loss, all of them must give the same word. Picking the best of "
        "several flatters both sides.",
        evidence,
        verdict,
    )


def _downstream(results: StudyResults) -> tuple[str, str]:
    if not results.learned:
        return CANNOT_TELL, _nothing_learned(results)
    scores = {d: s for d in results.losses if (s := results.task_mean(d, lambda m, t: m.after_task(t))) is not None}
    if len(scores) < 2:
        return CANNOT_TELL, "Fewer than two λ have a score on every learned task."
    losses = {d: results.losses[d] for d in scores}
    lowest = min(losses.values())
    best = max(scores, key=lambda d: scores[d])
    words, evidence = set(), [f"Lowest loss at λ={min(losses, key=lambda d: losses[d]):.4g}, best score {scores[best]:.3f} at λ={best:.4g}."]
    for optimum in sorted(d for d, loss in losses.items() if loss <= lowest + LOSS_MARGIN):
        below = [d for d in scores if d < optimum]
        if not below:
            words.add(CANNOT_TELL)
            evidence.append(f"No λ lies below {optimum:.4g}, so nothing could speak against the claim.")
            continue
        low, high = max(below, key=lambda d: scores[d]), max((d for d in scores if d >= optimum), key=lambda d: scores[d])
        difference = score_difference(results, low, high, results.learned, gain=False)
        words.add(word(difference))
        evidence.append(f"λ={high:.4g} against λ={low:.4g}: {interval_text(difference)}.")
    return (words.pop() if len(words) == 1 else CANNOT_TELL), " ".join(evidence)


def gain_rises(results: StudyResults) -> Verdict:
    verdict, evidence = _gain(results)
    return Verdict(
        "Models pretrained with more weight decay gain more from fine-tuning, over the useful range.",
        "abstract",
        f"Useful range: up to the largest λ whose held-out loss is at most {USEFUL_LOSS} nats above the lowest. Gain (after less before, greedy) "
        "at its largest λ less gain at its smallest, averaged over the tasks the models learned, paired by problem: consistent if the interval "
        "is above 0, inconsistent if below.",
        evidence,
        verdict,
    )


def _gain(results: StudyResults) -> tuple[str, str]:
    if not results.learned:
        return CANNOT_TELL, _nothing_learned(results)
    useful = [d for d in useful_range(results) if results.task_mean(d, lambda m, t: m.gain(t)) is not None]
    if len(useful) < 2:
        return CANNOT_TELL, "Fewer than two λ of the useful range have a gain on every learned task."
    low, high = useful[0], useful[-1]
    difference = score_difference(results, low, high, results.learned, gain=True)
    gains = (results.task_mean(d, lambda m, t: m.gain(t)) for d in (low, high))
    shown = " and ".join(f"{gain:.3f} at λ={d:.4g}" for d, gain in zip((low, high), gains))
    return word(difference), f"Mean gain {shown}; difference {interval_text(difference)}."


def optima_move(results: StudyResults) -> Verdict:
    counts = sorted({round(m.pretrain.tokens / m.pretrain.parameters, 1) for m in results.members if m.pretrain})
    shown = ", ".join(f"{count:g}" for count in counts) or "none finished"
    return Verdict(
        "With more tokens per parameter, both the loss-best and the downstream-best weight decay move down.",
        "models at 20 and 140 tokens per parameter",
        "Needs two token budgets, each with its own grid. One study has one budget, so this is always: cannot tell.",
        f"Tokens per parameter in this study: {shown}.",
        CANNOT_TELL,
    )


def _nothing_learned(results: StudyResults) -> str:
    return "No task was learned by any member." if any(m.after for m in results.members) else "No fine-tuned model has been scored yet."


def word(interval: tuple[float, float, float] | None) -> str:
    """What the sign of a difference says of a claim that it is positive."""
    if interval is None or not np.all(np.isfinite(interval)):
        return CANNOT_TELL
    _, lower, upper = interval
    return CONSISTENT if lower > 0 else INCONSISTENT if upper < 0 else CANNOT_TELL


def agreement(words: list[str]) -> str:
    """One word from several comparisons: the one that some give, if none contradicts."""
    found = set(words)
    if CONSISTENT in found and INCONSISTENT not in found:
        return CONSISTENT
    return INCONSISTENT if INCONSISTENT in found and CONSISTENT not in found else CANNOT_TELL


def falls(values: dict[float, float], margin: float) -> bool:
    """Whether values never rise by more than `margin` from one λ to the next."""
    ordered = [value for _, value in sorted(values.items())]
    return all(later <= earlier + margin for earlier, later in zip(ordered, ordered[1:]))


def interval_text(interval: tuple[float, float, float] | None) -> str:
    """A difference and its interval, for evidence."""
    if interval is None:
        return "not available"
    mean, lower, upper = interval
    return f"{mean:+.3f} [{lower:+.3f}, {upper:+.3f}]".replace("-", "−")
