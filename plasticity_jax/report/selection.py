"""The best of the swept fine-tunings of each base model, chosen on validation rows (`finetune.select`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from plasticity_jax.study.sweep import SELECTED, facet_axes

if TYPE_CHECKING:
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
    if results.config.finetune.select == "none":
        return []
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
    """The swept fields of the pretraining, and their values."""
    return {name: value for name, value in member.member.overrides if not name.startswith("finetune.")}


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


def win_rows(results: "StudyResults") -> "Rows":
    """For every task and two points: in how many of the swept fine-tunings the later has the better test score, a mean over seeds."""
    if results.axis.of_tuning or not any(axis.of_tuning for axis in facet_axes(results.config)):
        return []
    groups: dict[tuple, list[StudyResults]] = {}
    for part in results.slices:
        if not any(axis == SELECTED for axis, _ in part.facet):
            groups.setdefault(tuple((axis.field, value) for axis, value in part.facet if not axis.of_tuning), []).append(part)
    return [row for shared, parts in groups.items() for task in results.tasks for row in _wins(dict(shared), parts, task)]


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
