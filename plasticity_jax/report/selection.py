"""The best of the swept fine-tunings of each base model, chosen on validation rows (`finetune.select`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from plasticity_jax.study.sweep import SELECTED, Axis, facet_axes, study_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.config import StudyConfig
    from plasticity_jax.report.results import MemberResults, StudyResults
    from plasticity_jax.stages.stage import Rows

CHOSEN = "chosen on validation rows"


@dataclass(frozen=True)
class Choice:
    """The fine-tuning of one base model on one task that is chosen.

    Attributes:
      member: the member of the grid that has it.
      score: its greedy accuracy on the validation rows, a mean over fine-tuning seeds.
      settings: how many fine-tunings were swept.
      scored: how many of them all fine-tuning seeds finished and were scored, from which the choice is made.
    """

    member: "MemberResults"
    task: str
    score: float
    settings: int
    scored: int


def choices(results: "StudyResults") -> list[Choice]:
    """For every base model and task, the fine-tuning with the most right validation answers; of equals the first in the config's order.

    One that a fine-tuning seed did not finish is not chosen. None where `finetune.select` is off.
    """
    return [] if results.config.finetune.select == "none" else best_on_validation(results)


def best_on_validation(results: "StudyResults") -> list[Choice]:
    """The same whether or not `finetune.select` is on; none where the tasks have no validation rows."""
    seeds, found = len(results.config.finetune.seeds), []
    for members in _by_base(results).values():
        for task in results.tasks:
            scored = [m for m in members if task in m.validation and len(m.validation[task].runs) == seeds]
            if scored:
                # Counts of right answers, because means over seeds of equal counts may differ by rounding.
                best = max(scored, key=lambda m: sum(int(outcome.greedy.sum()) for outcome in m.validation[task].outcomes))
                found.append(Choice(best, task, float(best.validation[task].greedy.mean()), len(members), len(scored)))
    return found


def selected_members(results: "StudyResults") -> "list[MemberResults]":
    """Every base model with the results of what was chosen for each task; none where `finetune.select` is off or the axis is of the fine-tuning."""
    if results.config.finetune.select == "none" or results.axis.of_tuning:
        return []
    of_base: dict[str, dict[str, MemberResults]] = {}
    for choice in choices(results):
        of_base.setdefault(choice.member.member.base, {})[choice.task] = choice.member
    return [_selected(members[0], of_base.get(base, {})) for base, members in _by_base(results).items()]


def _selected(first: "MemberResults", chosen: "dict[str, MemberResults]") -> "MemberResults":
    overrides = (*base_values(first).items(), (SELECTED.field, CHOSEN))
    return replace(
        first,
        member=replace(first.member, name=f"{first.member.base}-sft_chosen", overrides=overrides),
        after={task: m.after[task] for task, m in chosen.items() if task in m.after},
        validation={task: m.validation[task] for task, m in chosen.items()},
        found={
            stage: {name: record for name, record in records.items() if not name}
            | {task: record for task, m in chosen.items() if (record := m.record(stage, task)) is not None}
            for stage, records in first.found.items()
        },
    )


def base_values(member: "MemberResults") -> dict[str, Any]:
    """The label of a model that exists, or the swept fields of the pretraining, and their values."""
    return {name: value for name, value in (*member.member.label, *member.member.overrides) if not name.startswith("finetune.")}


def choice_rows(results: "StudyResults") -> "Rows":
    """What was chosen for every base model and task, its validation score, and its test score."""
    rows = []
    for choice in choices(results):
        member, score = choice.member.member, choice.member.after.get(choice.task)
        row = {"member": member.base, "weight_decay": member.weight_decay, **base_values(choice.member), "seed": member.seed, "task": choice.task}
        row |= {name: value for name, value in member.overrides if name not in row}
        row |= {"validation": choice.score, "test": None if score is None else float(score.greedy.mean())}
        rows.append(row | {"settings": choice.settings, "scored": choice.scored})
    return rows


def sweeps_fine_tuning(config: "StudyConfig") -> bool:
    """Whether values of the axis can be compared in several fine-tunings."""
    return not study_axis(config).of_tuning and any(axis.of_tuning for axis in facet_axes(config))


def swept_parts(results: "StudyResults") -> "dict[tuple[tuple[Axis, Any], ...], list[StudyResults]]":
    """The slices of a study by what they share of the pretraining: in each group they differ in the fine-tuning only. Empty where none is swept."""
    groups: dict[tuple[tuple[Axis, Any], ...], list[StudyResults]] = {}
    for part in results.slices if sweeps_fine_tuning(results.config) else ():
        if not any(axis == SELECTED for axis, _ in part.facet):
            groups.setdefault(tuple((axis, value) for axis, value in part.facet if not axis.of_tuning), []).append(part)
    return groups


def win_rows(results: "StudyResults") -> "Rows":
    """For every task and two points: in how many of the swept fine-tunings the later has the better test score, a mean over seeds."""
    return [
        row
        for shared, parts in swept_parts(results).items()
        for task in results.tasks
        for row in _wins({axis.field: value for axis, value in shared}, parts, task)
    ]


def sweep_rows(results: "StudyResults") -> "Rows":
    """For every task and point: the test scores of the swept fine-tunings, each a mean over seeds, and that of the ones chosen on validation rows.

    `highest` is picked on the test rows themselves, so it flatters; `chosen` is not. None where a base model has no validation score.
    """
    chosen: dict[tuple[str, str], float | None] = {
        (choice.member.member.base, choice.task): _test_score(choice.member, choice.task) for choice in best_on_validation(results)
    }
    rows = []
    for shared, parts in swept_parts(results).items():
        for task in results.tasks:
            for point in parts[0].points:
                scores = [score for part in parts if (score := part.mean(point, lambda m: _test_score(m, task))) is not None]
                if scores:
                    best = [chosen.get((m.member.base, task)) for m in parts[0].at(point) if any(task in tuned.after for tuned in _tuned(parts, m))]
                    row = {**{axis.field: value for axis, value in shared}, "task": task, parts[0].axis.field: point}
                    row |= {"settings": len(parts), "scored": len(scores), "lowest": float(min(scores)), "median": float(np.median(scores))}
                    known = [score for score in best if score is not None]
                    rows.append(row | {"highest": float(max(scores)), "chosen": float(np.mean(known)) if known and len(known) == len(best) else None})
    return rows


def _tuned(parts: "Sequence[StudyResults]", base: "MemberResults") -> "list[MemberResults]":
    """A base model in each of the parts."""
    return [m for part in parts for m in part.members if m.member.base == base.member.base]


def draw_sweep(results: "StudyResults") -> "Drawing":
    """Test score over the points by task: a gray line per fine-tuning, and the best of the sweep. A row per combination of the pretraining's other fields."""
    from plasticity_jax.report import drawing

    groups, rows = swept_parts(results), sweep_rows(results)
    shown = [
        (shared, parts, task, found)
        for shared, parts in groups.items()
        for task in results.tasks
        if (found := [row for row in rows if row["task"] == task and all(row[axis.field] == value for axis, value in shared)])
    ]
    titles = {shared: ", ".join(axis.equation(value) for axis, value in shared) for shared in groups}
    cells = [(titles[shared], task) if len(groups) > 1 else (task, "") for shared, _, task, _ in shown]
    drawn, panels = drawing.small_multiples(cells, ticks=[results.axis.text(point) for point in results.points], height=1.6)
    for axes, last, (_, parts, task, found) in zip(panels, drawing.lowest(panels), shown):
        for i, part in enumerate(parts):
            means = {p: float(v) for p in part.points if (v := part.mean(p, lambda m: _test_score(m, task))) is not None}
            drawing.line(axes, part, means, color=drawing.REFERENCE, linewidth=0.8, label=None if i else "each setting")
        highest, chosen = ({row[results.axis.field]: row[name] for row in found if row[name] is not None} for name in ("highest", "chosen"))
        style: dict[str, Any] = {"color": drawing.SERIES[1], "marker": "s", "linestyle": "--", "markersize": 3.5, "linewidth": 1.1}
        drawing.line(axes, results, highest, label="highest, picked on the test rows", **style)
        if chosen:
            drawing.line(axes, results, chosen, color=drawing.SERIES[0], marker="o", markersize=4, label="chosen on validation rows")
        drawing.swept_axis(axes, results, label=last, small=True)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    drawing.frame_multiples(drawn, list(handles.values()), results.axis.label)
    return drawn


def sweep_numbers(results: "StudyResults") -> str:
    """In how many settings the largest value is ahead of the smallest, and the best of the sweep at every value, in words."""
    sentences, rows = [], sweep_rows(results)
    for shared, parts in swept_parts(results).items():
        about = "".join(f", {axis.equation(value)}" for axis, value in shared)
        for task in results.tasks:
            ends = parts[0].points[0], parts[0].points[-1]
            for win in _wins({}, parts, task):
                if (win["from"], win["to"]) == ends:
                    low, high = map(parts[0].axis.equation, ends)
                    sentences.append(f"{task}{about}: {high} is ahead of {low} in {win['later_wins']} of {win['settings']} settings.")
            found = [row for row in rows if row["task"] == task and all(row[axis.field] == value for axis, value in shared)]
            for name, words in (("chosen", "chosen on validation rows"), ("highest", "highest on the test rows")):
                values = [f"{row[name]:.3g} at {parts[0].axis.equation(row[parts[0].axis.field])}" for row in found if row[name] is not None]
                if values:
                    sentences.append(f"{task}{about}, {words}: {', '.join(values)}.")
    return " ".join(sentences)


def _wins(shared: dict[str, Any], parts: "Sequence[StudyResults]", task: str) -> "Rows":
    rows, points = [], parts[0].points
    for i, low in enumerate(points):
        for high in points[i + 1 :]:
            pairs = [tuple(part.mean(point, lambda m: _test_score(m, task)) for point in (low, high)) for part in parts]
            scored = [pair for pair in pairs if None not in pair]
            wins, ties = sum(later > earlier for earlier, later in scored), sum(later == earlier for earlier, later in scored)
            if scored:
                row = {**shared, "task": task, "from": low, "to": high, "settings": len(scored), "later_wins": wins, "ties": ties}
                rows.append(row | {"share": wins / len(scored)})
    return rows


def _test_score(member: "MemberResults", task: str) -> float | None:
    return float(member.after[task].greedy.mean()) if task in member.after else None


def _by_base(results: "StudyResults") -> "dict[str, list[MemberResults]]":
    found: dict[str, list[MemberResults]] = {}
    for m in results.members:
        found.setdefault(m.member.base, []).append(m)
    return found
