"""What the page says in sentences: the answer at its top, and the warnings beside it. `SENTENCES` is the table; below are the facts that fill it."""

import math
from collections.abc import Sequence

from plasticity_jax.report.effects import difference
from plasticity_jax.report.results import StudyResults
from plasticity_jax.report.verdicts import CONTRADICTS, LOSS_MARGIN, NO_EFFECT, ONE_RUN, SUPPORTS, Verdict, score_measure
from plasticity_jax.runs.environment import differing
from plasticity_jax.stages import guarded, stages
from plasticity_jax.study.sweep import DECAY, SELECTED, Axis, facet_axes

SENTENCES = {
    "one model": "One language model{size} was pretrained{tokens} with AdamW’s weight decay λ = {decay:.3g}{alone}.",
    "models": "{runs} language models{size} were pretrained{tokens}{shared}; they differ in {number}, {swept}.",
    "existing model": "One language model{size} that exists was taken as it is{alone}.",
    "existing models": "{runs} language models{size} that exist were taken as they are; they are labeled by {swept}. How they were pretrained is not known "
    "here, so a difference may come from whatever else they differ in.",
    "fixed decay": "Weight decay is λ = {decay:.3g} for all.",
    "fixed timescale": "Weight decay follows from one timescale, {timescale:.3g} of the run: λ is {decays}.",
    "unfinished": "{finished} of them {have} finished without diverging so far.",
    "recipes": "Each was fine-tuned in several ways: {swept}.",
    "loss": "Held-out loss was lowest at {best} ({lowest:.3f} nats per token{tie}) and highest at {worst} ({highest:.3f}).",
    "score": "After {tuning}, accuracy averaged over {tasks} was highest at {best} ({score:.3f}){against}.",
    "first is best": ", the {first} {name}",
    "difference": ", against {score:.3f} at {reference}; the difference of {mean:.3f} has a 95% interval of {lower:+.3f} to {upper:+.3f} over {over} "
    "(picking the best afterwards flatters it)",
    "nothing learned": "No fine-tuned model scored above the majority class, so nothing can be said about plasticity.",
    "claims": "Of {claims} claims of the paper, these numbers support {supports}, contradict {contradicts}, and show no effect larger than δ for {none}; "
    "for {open} they cannot tell.{holm}",
    "holm": " After correction for the number of claims (Holm), {standing} of {given} verdicts {stand}.",
    "no verdict": "One pretraining run: no verdict on any of the {claims} claims of the paper.",
    "one model each": "There is one model for every {name}, so chance in pretraining is not measured, and the intervals cover the choice of test items only.",
    "several models": "{every} has up to {seeds} models; intervals and verdicts take the model as their unit.",
    "one seed": "Every model was pretrained once, so chance in pretraining is not measured, and the intervals cover the choice of test items only.",
    "seeds": "{every} was pretrained with {seeds} seeds; intervals and verdicts take the seed as their unit.",
    "no slice": "No member of this part has finished yet.",
    # Warnings.
    "tiny": "Tiny model{plural}: {sizes} parameters{where}. The paper’s models have 500 million to 4 billion; effects need not carry over in either "
    "direction.",
    "changed": "Members differ in more than what is swept: {changes} for {names}.",
    "ended": "{name} {state}{reason}. It has no number on this page.",
    "passed over": "{name}: {warning}. Its numbers are those of a run without this.",
    "environments": "Not all {stage} runs were made alike: {what}. Such differences move last digits, and a score by chance.",
    "partial": "Partial study: {waiting} of {runs} runs have no result ({stages}).",
    "single seed": "Single pretraining seed ({seed}): a difference between two {members} may be the luck of one run, whatever its interval says.",
    "splits": "Published test or validation rows are in use: {used}. They serve comparisons within this study; never set these scores beside published "
    "ones.",
    "not learned": "No member {of_slice}learned {task}: on its {rows} rows the best one’s 95% lower bound is {bound:.3f}, the majority class {majority:.3f}. "
    "It is left out "
    "of averages and verdicts.",
}

DIFFERENCES = 3  # that a warning lists
FEW = 4  # names of models or runs in a sentence
TINY = 100_000_000  # parameters; the smallest model of the paper has five times as many
# What a row's split may be without a warning: published for training, generated, never split, or split here.
HARMLESS_SPLITS = {"train", "held_out", "generated", "none", ""}
COUNTS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _say(sentence: str, **facts) -> str:
    return SENTENCES[sentence].format(**facts)


# ------------------------------------------------------------------------------------------------------------------------------ answer


def answer(results: StudyResults, verdicts: list[Verdict]) -> list[str]:
    """Sentences: what was varied, what was found, how sure that is. For a study of several slices, only what holds for all of them."""
    found = [] if len(results.slices) > 1 else [*_found(results), *_claims(verdicts)]
    return _unbroken([*_varied(results), *found, _seeds(results)])


def slice_answer(part: StudyResults, verdicts: list[Verdict]) -> list[str]:
    """Sentences about one slice of a study: what was found in it."""
    return _unbroken([*_found(part), *_claims(verdicts)]) or [_say("no slice")]


def _unbroken(sentences: list[str]) -> list[str]:
    return [sentence.replace(" = ", "\u00a0=\u00a0") for sentence in sentences]


def _varied(results: StudyResults) -> list[str]:
    if results.existing:
        return _existing(results)
    seeds = len(results.seeds)
    runs = len({m.member.base for m in results.members}) // seeds
    finished = len({m.member.base for m in results.members if m.loss is not None}) // seeds
    done = [m.pretrain for m in results.members if m.pretrain]
    size = _size(results)
    tokens = f" on {_range([p.tokens for p in done])} tokens of text" if done else ""
    pretrained, recipes, alone = [axis for axis in _axes(results) if not axis.of_tuning], _recipes(results), _alone(results)
    if runs == 1:
        return [_say("one model", size=size, tokens=tokens, decay=results.members[0].member.weight_decay, alone=alone), *recipes]
    shared = ["from the same initial parameters"] * results.same_start + ["on the same batches"] * results.same_batches
    number = "one setting" if pretrained[0].scale == "categories" else "one number"
    models = _say(
        "models",
        runs=count(runs).capitalize(),
        size=size,
        tokens=tokens,
        shared=", " + " and ".join(shared) if shared else "",
        number=f"{count(len(pretrained))} settings" if len(pretrained) > 1 else number,
        swept=" and ".join(_swept(results, axis) for axis in pretrained),
    )
    have = "has" if finished == 1 else "have"
    so_far = [] if finished == runs else [_say("unfinished", finished=count(finished).capitalize(), have=have)]
    return [models, *_fixed_decay(results), *so_far, *recipes]


def _existing(results: StudyResults) -> list[str]:
    runs, size = len({m.member.base for m in results.members}), _size(results)
    if runs == 1:
        return [_say("existing model", size=size, alone=_alone(results)), *_recipes(results)]
    swept = " and ".join(_swept(results, axis) for axis in _axes(results) if not axis.of_tuning)
    return [_say("existing models", runs=count(runs).capitalize(), size=size, swept=swept), *_recipes(results)]


def _size(results: StudyResults) -> str:
    sizes = [m.parameters for m in results.members if m.parameters is not None]
    return f" of {_range(sizes)} parameters" if sizes else ""


def _axes(results: StudyResults) -> tuple[Axis, ...]:
    return results.axis, *facet_axes(results.config)


def _recipes(results: StudyResults) -> list[str]:
    tuned = [axis for axis in _axes(results) if axis.of_tuning]
    return [_say("recipes", swept=" and ".join(_swept(results, axis) for axis in tuned))] if tuned else []


def _alone(results: StudyResults) -> str:
    return "" if any(axis.of_tuning for axis in _axes(results)) else "; without a second there is nothing to compare"


def _swept(results: StudyResults, axis: Axis) -> str:
    """A field and the values that it takes."""
    values = list(dict.fromkeys(axis.value(m.member) for m in results.members))
    shown = ", ".join(axis.text(value) for value in (values if axis.scale == "categories" else sorted(values)))
    if axis.field == DECAY:
        return f"AdamW’s weight decay λ ({shown})"
    return f"{'the ' if ' ' in axis.name else ''}{axis.name} ({shown})"


def _fixed_decay(results: StudyResults) -> list[str]:
    """λ, where it is not what is compared: it is fixed, or follows from a timescale that is."""
    if results.axis.field == DECAY:
        return []
    decays = sorted({m.member.weight_decay for m in results.members if m.member.weight_decay is not None})
    if len(decays) == 1:
        return [_say("fixed decay", decay=decays[0])]
    return [_say("fixed timescale", timescale=next(iter(results.config.grid.timescales or (None,))), decays=", ".join(f"{d:.3g}" for d in decays))]


def _found(results: StudyResults) -> list[str]:
    sentences, equation, losses = [], results.axis.equation, results.losses
    if len(losses) > 1:
        best, worst = min(losses, key=lambda point: losses[point]), max(losses, key=lambda point: losses[point])
        near = [results.axis.text(point) for point in losses if point != best and losses[point] <= losses[best] + LOSS_MARGIN]
        tie = f", with {results.axis.symbol} = {' and '.join(near)} within {LOSS_MARGIN} of it" if near else ""
        sentences.append(_say("loss", best=equation(best), lowest=losses[best], tie=tie, worst=equation(worst), highest=losses[worst]))
    scores = {p: s for p in results.points if (s := results.task_mean(p, lambda m, t: m.after_task(t))) is not None}
    if len(scores) > 1:
        best, learned = max(scores, key=lambda point: scores[point]), results.learned
        tasks = f"the {count(len(learned))} tasks they learned" if len(learned) > 1 else f"the one task they learned, {''.join(learned)}"
        chosen = any(axis == SELECTED for axis, _ in results.facet)
        tuning = "the fine-tuning that was best for each model on validation rows" if chosen else "the same fine-tuning"
        sentences.append(_say("score", tuning=tuning, tasks=tasks, best=equation(best), score=scores[best], against=_against(results, scores, best)))
    elif any(m.after for m in results.members) and not results.learned:
        sentences.append(_say("nothing learned"))
    return sentences


def _against(results: StudyResults, scores: dict, best) -> str:
    """The best score against that of the first point."""
    reference = next(iter(scores))
    if best == reference:
        return _say("first is best", first=results.axis.first, name=results.axis.name)
    found = difference(results, score_measure(results.learned, gain=False), reference, best)
    if found.value is None or found.low is None or found.high is None:
        return ""
    over = f"{found.seeds} {found.over}" if found.effect is not None else found.over
    about = {"score": scores[reference], "reference": results.axis.equation(reference), "mean": round(found.value, 3) + 0.0}
    return _say("difference", **about, lower=found.low, upper=found.high, over=over)


def _claims(verdicts: list[Verdict]) -> list[str]:
    if not verdicts:
        return []
    if all(v.verdict == ONE_RUN for v in verdicts):
        return [_say("no verdict", claims=count(len(verdicts)))]
    words = {"supports": SUPPORTS, "contradicts": CONTRADICTS, "none": NO_EFFECT}
    found = {name: sum(v.verdict == word for v in verdicts) for name, word in words.items()}
    directed = [v for v in verdicts if v.verdict in (SUPPORTS, CONTRADICTS)]
    standing = sum(v.stands for v in directed)
    holm = _say("holm", standing=count(standing), given=count(len(directed)), stand="stands" if standing == 1 else "stand") if directed else ""
    counts = {name: count(number) for name, number in found.items()}
    return [_say("claims", claims=count(len(verdicts)), **counts, open=count(len(verdicts) - sum(found.values())), holm=holm)]


def _seeds(results: StudyResults) -> str:
    seeds = len(results.seeds)
    every = f"Every {results.axis.name}" if len(results.slices) == 1 else "Every combination"
    if results.existing:
        return _say("one model each", name=results.axis.name) if seeds == 1 else _say("several models", every=every, seeds=seeds)
    return _say("one seed") if seeds == 1 else _say("seeds", every=every, seeds=seeds)


# ---------------------------------------------------------------------------------------------------------------------------- warnings


def warnings(results: StudyResults) -> list[str]:
    """What a reader must know before believing a number; most general first."""
    declared = [guarded(stage, "warnings", stage.warnings, []) for stage in stages().values() if stage.warnings is not None]
    of_stages = [warning for of_stage in declared for warning in of_stage(results)]
    return [
        *_tiny(results),
        *_changes(results),
        *([results.no_loss] if results.no_loss else []),
        *ended_or_waiting(results),
        *_environments(results),
        *_single_seed(results),
        *_splits(results),
        *of_stages,
        *_not_learned(results),
    ]


def _tiny(results: StudyResults) -> list[str]:
    sizes = [m.parameters for m in results.members if m.parameters is not None]
    if not sizes or max(sizes) >= TINY:
        return []
    kinds = sorted({str(m.provenance["device_kind"]) for m in results.members if m.pretrain and "device_kind" in m.provenance})
    where = f" trained on {'a CPU' if kinds == ['cpu'] else ', '.join(kinds)}" if kinds else ""
    return [_say("tiny", plural="" if min(sizes) == max(sizes) else "s", sizes=_range(sizes), where=where)]


def _changes(results: StudyResults) -> list[str]:
    changed: dict[str, list[str]] = {}
    for m in results.members:
        if m.member.changes:
            changed.setdefault(", ".join(f"{name} = {value}" for name, value in m.member.changes), []).append(m.name)
    return [_say("changed", changes=changes, names=few(names)) for changes, names in changed.items()]


def ended_or_waiting(results: StudyResults) -> list[str]:
    """Which runs diverged or failed, and how many have no result yet."""
    ended = [s for state in ("diverged", "failed") for s in results.runs if s.state == state]
    found = [_say("ended", name=s.run.id.rsplit("-", 1)[0], state=s.state, reason=f": {s.reason}" if s.reason else "") for s in ended]
    found += [_say("passed over", name=s.run.id.rsplit("-", 1)[0], warning=warning) for s in results.runs for warning in s.warnings]
    waiting = [s.run.stage for s in results.runs if s.state in ("missing", "running")]
    if waiting:
        by_stage = ", ".join(f"{stage} {waiting.count(stage)}" for stage in dict.fromkeys(waiting))
        found.append(_say("partial", waiting=len(waiting), runs=len(results.runs), stages=by_stage))
    return found


def _environments(results: StudyResults) -> list[str]:
    """What changes rounding and is not the same for all runs of a stage, which are compared with one another."""
    said = []
    for stage in dict.fromkeys(s.run.stage for s in results.runs if s.run.member is not None):
        made = [s for s in results.runs if s.run.stage == stage and s.provenance]
        found = differing([s.provenance for s in made])
        facts = []
        for name, values in list(found.items())[:DIFFERENCES]:
            names = {value: [s.run.name for s, own in zip(made, values, strict=True) if own == value] for value in dict.fromkeys(values)}
            facts.append(f"{name} was " + " and ".join(f"{value[:60]} for {few(of_value)}" for value, of_value in names.items()))
        more = f", and {len(found) - DIFFERENCES} more (plasticity diff lists them)" if len(found) > DIFFERENCES else ""
        said += [_say("environments", stage=stage, what="; ".join(facts) + more)] if facts else []
    return said


def few(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def _single_seed(results: StudyResults) -> list[str]:
    seeds = results.seeds
    members = results.axis.symbol if results.axis.field == DECAY else "members"
    return [_say("single seed", seed=seeds[0], members=members)] if len(seeds) == 1 and not results.existing else []


def _splits(results: StudyResults) -> list[str]:
    used = []
    for name, summary in results.prepared.items():
        for role in ("train", "test"):
            found = summary.get("source_splits", {}).get(role, {})
            published = sorted(split for split in ({found} if isinstance(found, str) else found) if split not in HARMLESS_SPLITS)
            if published:
                label = prepared_name(name).removeprefix("task-").replace("probe-", "probe set ")
                used.append(f"{label} ({role} rows from the published {' and '.join(published)} split)")
    return [_say("splits", used="; ".join(used))] if used else []


def _not_learned(results: StudyResults) -> list[str]:
    found = []
    for part in results.slices:
        of_slice = f"with {part.title} " if part.facet else ""
        for task in results.tasks:
            bound = part.lower_bound(task)
            if bound is not None and task not in part.learned:
                found.append(_say("not learned", of_slice=of_slice, task=task, rows=part.learned_on(task), bound=bound[0], majority=bound[1]))
    return found


# ----------------------------------------------------------------------------------------------------------------------------- numbers


def millions(number: float) -> str:
    """A large number in words: 0.53 million, 2.0 billion."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size / 10:
            value = number / size
            return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f} {unit}"
    return f"{number:,.0f}"


def count(number: int) -> str:
    """A small number in words."""
    return COUNTS[number] if number < len(COUNTS) else str(number)


def prepared_name(run_id: str) -> str:
    """A prepare run's id without its stage and hash, such as "task-topic"."""
    return run_id.partition("/")[2].rpartition("-")[0]


def _range(numbers: Sequence[float]) -> str:
    low, high = millions(min(numbers)), millions(max(numbers))
    return low if low == high else f"{low} to {high}"
