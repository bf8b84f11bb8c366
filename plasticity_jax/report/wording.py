"""What a study says in plain words: the answer at the top of the page, and the warnings beside it."""

import math

from plasticity_jax.report.comparisons import score_difference
from plasticity_jax.report.results import StudyResults
from plasticity_jax.report.verdicts import CANNOT_TELL, CONSISTENT, INCONSISTENT, LOSS_MARGIN, Verdict
from plasticity_jax.study.sweep import DECAY, Axis, facet_axes

TINY = 100_000_000  # parameters; the smallest model of the paper has five times as many
# What a row's split may be without a warning: published for training, generated, never split, or split here.
HARMLESS_SPLITS = {"train", "held_out", "generated", "none", ""}


def answer(results: StudyResults, verdicts: list[Verdict]) -> list[str]:
    """Sentences: what was varied, what was found, how sure that is. For a study of several slices, only what holds for all of them."""
    if len(results.slices) > 1:
        return _spaced([_varied(results), _how_often(results)])
    return _spaced([_varied(results), *_found(results), *_how_many(verdicts), _how_often(results)])


def slice_answer(part: StudyResults, verdicts: list[Verdict]) -> list[str]:
    """Sentences about one slice of a study: what was found in it."""
    return _spaced([*_found(part), *_how_many(verdicts)]) or ["No member of this part has finished yet."]


def _spaced(sentences: list[str]) -> list[str]:
    return [sentence.replace(" = ", "\u00a0=\u00a0") for sentence in sentences]


def _varied(results: StudyResults) -> str:
    runs = len({m.member.base for m in results.members}) // len(results.config.grid.seeds)
    finished = len({m.member.base for m in results.members if m.loss is not None}) // len(results.config.grid.seeds)
    done = [m.pretrain for m in results.members if m.pretrain]
    size = f" of {_range([p['parameters'] for p in done])} parameters" if done else ""
    tokens = f" on {_range([p['tokens'] for p in done])} tokens of text" if done else ""
    axes = (results.axis, *facet_axes(results.config))
    pretrained, tuned = [axis for axis in axes if not axis.of_tuning], [axis for axis in axes if axis.of_tuning]
    recipes = f" Each was fine-tuned in several ways: {_listed([_swept(results, axis) for axis in tuned])}." if tuned else ""
    if runs == 1:
        alone = "" if tuned else "; without a second there is nothing to compare"
        return f"One language model{size} was pretrained{tokens} with AdamW’s weight decay λ = {results.members[0].member.weight_decay:.3g}{alone}.{recipes}"
    so_far = (
        ""
        if finished == runs
        else f" {_word_for(finished).capitalize()} of them {'has' if finished == 1 else 'have'} finished without diverging so far."
    )
    shared = ["from the same initial parameters"] * results.same_start + ["on the same batches"] * results.same_batches
    if len(pretrained) > 1:
        number = f"{_word_for(len(pretrained))} settings"
    else:
        number = "one setting" if pretrained[0].scale == "categories" else "one number"
    return (
        f"{_word_for(runs).capitalize()} language models{size} were pretrained{tokens}{', ' + ' and '.join(shared) if shared else ''}; they differ in "
        f"{number}, {_listed([_swept(results, axis) for axis in pretrained])}.{_decay_beside(results)}{so_far}{recipes}"
    )


def _swept(results: StudyResults, axis: Axis) -> str:
    """A field and the values that it takes."""
    values = list(dict.fromkeys(axis.value(m.member) for m in results.members))
    shown = ", ".join(axis.text(value) for value in (values if axis.scale == "categories" else sorted(values)))
    if axis.field == DECAY:
        return f"AdamW’s weight decay λ ({shown})"
    return f"{'the ' if ' ' in axis.name else ''}{axis.name} ({shown})"


def _decay_beside(results: StudyResults) -> str:
    """λ, where it is not what is compared: it stands still, or follows from a timescale that does."""
    if results.axis.field == DECAY:
        return ""
    decays = sorted({m.member.weight_decay for m in results.members})
    if len(decays) == 1:
        return f" Weight decay is λ = {decays[0]:.3g} for all."
    timescale = results.config.grid.timescales[0]
    return f" Weight decay follows from one timescale, {timescale:.3g} of the run: λ is {', '.join(f'{d:.3g}' for d in decays)}."


def _found(results: StudyResults) -> list[str]:
    sentences, said, text = [], results.axis.said, results.axis.text
    losses = results.losses
    if len(losses) > 1:
        best, worst = min(losses, key=losses.get), max(losses, key=losses.get)
        near = [point for point in losses if point != best and losses[point] <= losses[best] + LOSS_MARGIN]
        tie = f", with {results.axis.symbol} = {_listed([text(point) for point in near])} within {LOSS_MARGIN} of it" if near else ""
        sentences.append(
            f"Held-out loss was lowest at {said(best)} ({losses[best]:.3f} nats per token{tie}) and highest at {said(worst)} ({losses[worst]:.3f})."
        )
    scores = {p: s for p in results.points if (s := results.task_mean(p, lambda m, t: m.after_task(t))) is not None}
    if len(scores) > 1:
        best, reference = max(scores, key=scores.get), next(iter(scores))
        tasks = (
            f"the {_word_for(len(results.learnt))} tasks they learnt" if len(results.learnt) > 1 else f"the one task they learnt, {results.learnt[0]}"
        )
        sentence = f"After the same fine-tuning, accuracy averaged over {tasks} was highest at {said(best)} ({scores[best]:.3f})"
        if best == reference:
            sentences.append(sentence + f", the {results.axis.least} {results.axis.name}.")
        else:
            difference = score_difference(results, reference, best, results.learnt, gain=False)
            if difference:
                mean, lower, upper = difference
                sure = "excludes" if lower > 0 or upper < 0 else "includes"
                sentence += (
                    f", against {scores[reference]:.3f} at {said(reference)}; the difference of {round(mean, 3) + 0.0:.3f} has a 95% interval "
                    f"of {lower:+.3f} to {upper:+.3f}, which {sure} zero (picking the best afterwards flatters it)"
                )
            sentences.append(sentence + ".")
    elif any(m.after for m in results.members) and not results.learnt:
        sentences.append("No fine-tuned model scored above the majority class, so nothing can be said about plasticity.")
    return sentences


def _how_many(verdicts: list[Verdict]) -> list[str]:
    if not verdicts:
        return []
    count = {word: sum(v.verdict == word for v in verdicts) for word in (CONSISTENT, INCONSISTENT, CANNOT_TELL)}
    return [
        f"Of {_word_for(len(verdicts))} claims of the paper, these numbers are consistent with {_word_for(count[CONSISTENT])} and inconsistent "
        f"with {_word_for(count[INCONSISTENT])}; for {_word_for(count[CANNOT_TELL])} they cannot tell."
    ]


def _how_often(results: StudyResults) -> str:
    seeds = len(results.config.grid.seeds)
    one = f"Every {results.axis.name}" if len(results.slices) == 1 else "Every combination"
    once = "Every model was pretrained once, so chance in pretraining is not measured" if seeds == 1 else f"{one} was pretrained with {seeds} seeds"
    return f"{once}, and the intervals cover the choice of test items alone."


def warnings(results: StudyResults) -> list[str]:
    """What a reader must know before believing a number; most general first."""
    return [*_size(results), *_changes(results), *_states(results), *_seeds(results), *_splits(results), *_control(results), *_unlearnt(results)]


def _size(results: StudyResults) -> list[str]:
    done = [m for m in results.members if m.pretrain]
    sizes = [m.pretrain["parameters"] for m in done]
    if not done or max(sizes) >= TINY:
        return []
    kinds = sorted({str(m.provenance["device_kind"]) for m in done if "device_kind" in m.provenance})
    where = f" trained on {'a CPU' if kinds == ['cpu'] else ', '.join(kinds)}" if kinds else ""
    return [
        f"Tiny model{'' if min(sizes) == max(sizes) else 's'}: {_range(sizes)} parameters{where}. The paper’s models have 500 million to 4 billion; "
        "effects need not carry over in either direction."
    ]


def _changes(results: StudyResults) -> list[str]:
    changed: dict[str, list[str]] = {}
    for m in results.members:
        if m.member.changes:
            changed.setdefault(", ".join(f"{name} = {value}" for name, value in m.member.changes), []).append(m.name)
    return [f"Members differ in more than what is swept: {what} for {', '.join(names)}." for what, names in changed.items()]


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
        [
            f"Single pretraining seed ({seeds[0]}): a difference between two {results.axis.symbol if results.axis.field == DECAY else 'members'} may be the luck of one run, whatever its interval says."
        ]
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
                label = prepared_name(name).removeprefix("task-").replace("probe-", "probe set ")
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
    for part in results.slices:
        for task in results.tasks:
            bound = part.lower_bound(task)
            if bound is not None and task not in part.learnt:
                found.append(
                    f"No member {f'with {part.title} ' if part.facet else ''}learnt {task}: the best one’s 95% lower bound is {bound[0]:.3f}, the "
                    f"majority class {bound[1]:.3f}. It is left out of averages and verdicts."
                )
    return found


def millions(count: float) -> str:
    """A large count in words: 0.53 million, 2.0 billion."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size / 10:
            value = count / size
            return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f} {unit}"
    return f"{count:,.0f}"


def prepared_name(run_id: str) -> str:
    """A prepare run's id without its stage and hash, such as "task-topic"."""
    return run_id.partition("/")[2].rpartition("-")[0]


def _word_for(count: int) -> str:
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def _range(counts: list[float]) -> str:
    low, high = millions(min(counts)), millions(max(counts))
    return low if low == high else f"{low} to {high}"


def _listed(texts: list[str]) -> str:
    return " and ".join(texts)
