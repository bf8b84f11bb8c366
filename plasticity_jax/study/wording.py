"""What a study says in plain words: the answer at the top of the page, and the warnings beside it."""

import math

from plasticity_jax.study.comparisons import score_difference
from plasticity_jax.study.results import StudyResults
from plasticity_jax.study.verdicts import CANNOT_TELL, CONSISTENT, INCONSISTENT, LOSS_MARGIN, Verdict

TINY = 100_000_000  # parameters; the smallest model of the paper has five times as many
# What a row's split may be without a warning: published for training, generated, never split, or split here.
HARMLESS_SPLITS = {"train", "held_out", "generated", "none", ""}


def answer(results: StudyResults, verdicts: list[Verdict]) -> list[str]:
    """Sentences: what was varied, what was found, how sure that is."""
    sentences = [_varied(results), *_found(results), _how_sure(results, verdicts)]
    return [sentence.replace("λ = ", "λ\u00a0=\u00a0") for sentence in sentences]


def _varied(results: StudyResults) -> str:
    decays, finished = len(results.decays), len(results.losses)
    done = next((m.pretrain for m in results.members if m.pretrain), None)
    size = f" of {millions(done['parameters'])} parameters" if done else ""
    tokens = f" on {millions(done['tokens'])} tokens of text" if done else ""
    if decays == 1:
        return (
            f"One language model{size} was pretrained{tokens} with AdamW’s weight decay λ = {results.decays[0]:.3g}; without a second there is "
            "nothing to compare."
        )
    so_far = (
        ""
        if finished == decays
        else f" {_word_for(finished).capitalize()} of them {'has' if finished == 1 else 'have'} finished without diverging so far."
    )
    return (
        f"{_word_for(decays).capitalize()} language models{size} were pretrained{tokens}, from the same initial parameters and on the same "
        f"batches; they differ in one number, AdamW’s weight decay λ ({', '.join(f'{d:.3g}' for d in results.decays)}).{so_far}"
    )


def _found(results: StudyResults) -> list[str]:
    sentences = []
    losses = results.losses
    if len(losses) > 1:
        best, worst = min(losses, key=losses.get), max(losses, key=losses.get)
        near = [d for d in losses if d != best and losses[d] <= losses[best] + LOSS_MARGIN]
        tie = f", with λ = {_listed(near)} within {LOSS_MARGIN} of it" if near else ""
        sentences.append(
            f"Held-out loss was lowest at λ = {best:.3g} ({losses[best]:.3f} nats per token{tie}) and highest at λ = {worst:.3g} "
            f"({losses[worst]:.3f})."
        )
    scores = {d: s for d in results.decays if (s := results.task_mean(d, lambda m, t: m.after_task(t))) is not None}
    if len(scores) > 1:
        best, reference = max(scores, key=scores.get), min(scores)
        tasks = (
            f"the {_word_for(len(results.learnt))} tasks they learnt" if len(results.learnt) > 1 else f"the one task they learnt, {results.learnt[0]}"
        )
        sentence = f"After the same fine-tuning, accuracy averaged over {tasks} was highest at λ = {best:.3g} ({scores[best]:.3f})"
        if best == reference:
            sentences.append(sentence + ", the smallest weight decay.")
        else:
            difference = score_difference(results, reference, best, results.learnt, gain=False)
            if difference:
                mean, lower, upper = difference
                sure = "excludes" if lower > 0 or upper < 0 else "includes"
                sentence += (
                    f", against {scores[reference]:.3f} at λ = {reference:.3g}; the difference of {round(mean, 3) + 0.0:.3f} has a 95% interval "
                    f"of {lower:+.3f} to {upper:+.3f}, which {sure} zero (picking the best afterwards flatters it)"
                )
            sentences.append(sentence + ".")
    elif any(m.after for m in results.members) and not results.learnt:
        sentences.append("No fine-tuned model scored above the majority class, so nothing can be said about plasticity.")
    return sentences


def _how_sure(results: StudyResults, verdicts: list[Verdict]) -> str:
    count = {word: sum(v.verdict == word for v in verdicts) for word in (CONSISTENT, INCONSISTENT, CANNOT_TELL)}
    seeds = len(results.config.grid.seeds)
    once = (
        "Every model was pretrained once, so chance in pretraining is not measured"
        if seeds == 1
        else f"Every weight decay was pretrained with {seeds} seeds"
    )
    return (
        f"Of {_word_for(len(verdicts))} claims of the paper, these numbers are consistent with {_word_for(count[CONSISTENT])} and inconsistent "
        f"with {_word_for(count[INCONSISTENT])}; for {_word_for(count[CANNOT_TELL])} they cannot tell. {once}, and the intervals cover the "
        "choice of test items alone."
    )


def warnings(results: StudyResults) -> list[str]:
    """What a reader must know before believing a number; most general first."""
    return [*_size(results), *_states(results), *_seeds(results), *_splits(results), *_control(results), *_unlearnt(results)]


def _size(results: StudyResults) -> list[str]:
    done = [m for m in results.members if m.pretrain]
    if not done or done[0].pretrain["parameters"] >= TINY:
        return []
    kinds = sorted({str(m.provenance["device_kind"]) for m in done if "device_kind" in m.provenance})
    where = f" trained on {'a CPU' if kinds == ['cpu'] else ', '.join(kinds)}" if kinds else ""
    return [
        f"Tiny model: {millions(done[0].pretrain['parameters'])} parameters{where}. The paper’s models have 500 million to 4 billion; effects "
        "need not carry over in either direction."
    ]


def _states(results: StudyResults) -> list[str]:
    found = []
    for state in ("diverged", "failed"):
        for s in results.runs:
            if s.state == state:
                reason = f": {s.reason}" if s.reason else ""
                found.append(f"{s.run.id.rsplit('-', 1)[0]} {state}{reason}. It has no number on this page.")
    waiting = [s for s in results.runs if s.state in ("missing", "running")]
    if waiting:
        stages = ", ".join(f"{stage} {sum(s.run.stage == stage for s in waiting)}" for stage in dict.fromkeys(s.run.stage for s in waiting))
        found.append(f"Partial study: {len(waiting)} of {len(results.runs)} runs have no result ({stages}).")
    return found


def _seeds(results: StudyResults) -> list[str]:
    seeds = results.config.grid.seeds
    return (
        [f"Single pretraining seed ({seeds[0]}): a difference between two λ may be the luck of one run, whatever its interval says."]
        if len(seeds) == 1
        else []
    )


def _splits(results: StudyResults) -> list[str]:
    used = []
    for name, summary in results.prepared.items():
        splits = summary.get("source_splits", {})
        for role in ("train", "test"):
            found = splits.get(role, {})
            published = sorted(split for split in ({found} if isinstance(found, str) else found) if split not in HARMLESS_SPLITS)
            if published:
                label = name.removeprefix("task-").replace("probe-", "probe set ")
                used.append(f"{label} ({role} rows from the published {' and '.join(published)} split)")
    if not used:
        return []
    return [
        f"Published test or validation rows are in use: {'; '.join(used)}. They serve comparisons within this study; never set these scores "
        "beside published ones."
    ]


def _control(results: StudyResults) -> list[str]:
    failing = [m.name for m in results.members if m.gap and not m.gap["control"]["passes"]]
    if not failing:
        return []
    return [
        f"The unigram control of the seen / held-out gap fails for {', '.join(failing)}: the two sides differ in difficulty, so the gap’s size "
        "means little."
    ]


def _unlearnt(results: StudyResults) -> list[str]:
    found = []
    for task in results.tasks:
        bound = results.lower_bound(task)
        if bound is not None and task not in results.learnt:
            found.append(
                f"No member learnt {task}: the best one’s 95% lower bound is {bound[0]:.3f}, the majority class {bound[1]:.3f}. It is left out "
                "of averages and verdicts."
            )
    return found


def millions(count: float) -> str:
    """A large count in words: 0.53 million, 2.0 billion."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size / 10:
            value = count / size
            return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f} {unit}"
    return f"{count:,.0f}"


def _word_for(count: int) -> str:
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def _listed(decays: list[float]) -> str:
    return " and ".join(f"{d:.3g}" for d in decays)
