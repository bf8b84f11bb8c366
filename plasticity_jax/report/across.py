"""Figures and tables that rest on several stages, declared as a stage declares its own: forgetting against gain, learning rates, seeds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from plasticity_jax.config import StudyConfig
from plasticity_jax.evaluate.metrics import metric_of
from plasticity_jax.report import drawing
from plasticity_jax.report.effects import measured, measures
from plasticity_jax.report.results import MemberResults, StudyResults, once
from plasticity_jax.report.scores import CONSTANT, MEAN, compared_metrics, value_of
from plasticity_jax.stages import Figure, Table, member_row, number
from plasticity_jax.stages.forgetting import held_out_rise_rows
from plasticity_jax.stages.stage import Rows
from plasticity_jax.stages.zero_shot import forgetting_rows
from plasticity_jax.study.sweep import DECAY, PEAK_LR, Axis, facet_axes, study_axis

FORGOTTEN = {"loss_rise": "rise of the held-out loss (nats per token)", "zero_shot_drop": "drop of the zero-shot accuracy"}

# ----------------------------------------------------------------------------------------------------------------- gain and forgetting


def stability_rows(results: StudyResults) -> Rows:
    """Of every fine-tuned model its gain in accuracy, the rise of its held-out loss, and the drop of its zero-shot accuracy, a mean over the sets."""
    return [row for row in _stability_rows(results) if any(row[name] is not None for name in FORGOTTEN)]


@once
def _stability_rows(results: StudyResults) -> Rows:
    rises = {(row["member"], row["task"]): row["loss_rise"] for row in held_out_rise_rows(results) if row["domain"] == "all"}
    drops: dict[tuple[str, str], list[float]] = {}
    for row in forgetting_rows(results):
        if row["acc_drop"] is not None:
            drops.setdefault((row["member"], row["task"]), []).append(row["acc_drop"])
    rows = []
    for m in results.members:
        for task in results.tasks:
            gain, dropped = m.gain(task), drops.get((m.name, task))
            row = member_row(m, task=task, gain=None if gain is None else number(gain.mean()), loss_rise=rises.get((m.name, task)))
            rows.append(row | {"zero_shot_drop": float(np.mean(dropped)) if dropped else None})
    return rows


def _planes(results: StudyResults) -> dict[str, dict[str, dict[Any, dict[int, tuple[float, float]]]]]:
    """What is forgotten → task, or the mean over the learned ones → point → pretraining seed → (forgotten, gain)."""
    of = {(row["member"], row["task"]): row for row in _stability_rows(results)}
    shown = {task: (task,) for task in results.tasks} | ({MEAN: results.learned} if len(results.learned) > 1 else {})
    found: dict[str, dict[str, dict[Any, dict[int, tuple[float, float]]]]] = {}
    for name in FORGOTTEN:
        for label, tasks in shown.items():
            for m in results.members:
                pairs = [(of[m.name, task][name], of[m.name, task]["gain"]) for task in tasks]
                if all(None not in pair for pair in pairs):
                    x, y = np.mean(pairs, axis=0)
                    found.setdefault(name, {}).setdefault(label, {}).setdefault(m.point, {})[m.member.seed] = (float(x), float(y))
    return found


def _draw_stability(results: StudyResults) -> Drawing:
    planes = _planes(results)
    drawn, panels = drawing.panels_below(len(planes), 2.7)
    styles = drawing.task_styles(results.tasks, MEAN)
    for axes, (name, of_task) in zip(panels, planes.items()):
        for label, of_point in of_task.items():
            means = {p: np.mean(list(of_point[p].values()), axis=0) for p in results.points if p in of_point}
            axes.plot(*zip(*means.values()), markersize=4, label=label, **styles[label])
            dots = [pair for of_seed in of_point.values() for pair in of_seed.values() if len(of_seed) > 1]
            if dots:
                axes.scatter(*zip(*dots), s=8, color=styles[label]["color"], alpha=0.35, linewidths=0)
            if label == list(of_task)[-1]:
                for point, (x, y) in means.items():
                    axes.annotate(results.axis.text(point), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7.5, color=drawing.INK)
        axes.margins(0.1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(FORGOTTEN[name])
        axes.set_ylabel("gain in accuracy")
    drawing.legend_above(panels[0], panels[0].get_legend_handles_labels()[0])
    return drawn


def _stability_numbers(results: StudyResults) -> str:
    sentences = []
    for name, of_task in _planes(results).items():
        label, of_point = list(of_task.items())[-1]
        pairs = {point: np.mean(list(of_point[point].values()), axis=0) for point in results.points if point in of_point}
        values = ", ".join(f"{x:.3g} and {y:.3g} at {results.axis.equation(point)}" for point, (x, y) in pairs.items())
        sentences.append(f"{FORGOTTEN[name].capitalize()} and gain, {'mean over the learned tasks' if label == MEAN else label}: {values}.")
    return " ".join(sentences)


# -------------------------------------------------------------------------------------------------------------------- learning rates


def _sweeps_rates(config: StudyConfig) -> bool:
    if config.grid.models:
        return False
    decays = config.grid.weight_decay if config.grid.timescales is None else config.grid.timescales
    return study_axis(config).field == DECAY and len(decays or ()) > 1 and any(axis.field == PEAK_LR for axis in facet_axes(config))


def _quantities(results: StudyResults) -> dict[str, Callable[[MemberResults], float | None]]:
    """What is shown over λ and learning rate: the held-out loss, and every metric as a mean over the learned tasks that have it."""
    found: dict[str, Callable[[MemberResults], float | None]] = {"held-out loss": lambda m: m.loss}
    for metric in compared_metrics(results):
        tasks = [t for t in results.learned if any(value_of(m.after.get(t), metric) is not None for m in results.members)]
        if tasks:
            found[metric_of(metric).heading] = lambda m, metric=metric, tasks=tasks: _mean([value_of(m.after.get(t), metric) for t in tasks])
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _groups(results: StudyResults) -> dict[str, list[MemberResults]]:
    """The members by the other swept fields of the pretraining, in words; fine-tunings that are swept stay together."""
    others = [axis for axis in facet_axes(results.config) if axis.field != PEAK_LR and not axis.of_tuning]
    found: dict[str, list[MemberResults]] = {}
    for m in results.members:
        found.setdefault(", ".join(axis.equation(axis.value(m.member)) for axis in others), []).append(m)
    return found


def _rate(results: StudyResults) -> Axis:
    return next(axis for axis in facet_axes(results.config) if axis.field == PEAK_LR)


def _cells(results: StudyResults, members: list[MemberResults], value: Callable[[MemberResults], float | None]) -> dict[tuple[Any, Any], float | str]:
    """(λ or timescale, learning rate) → mean over seeds and fine-tunings, or why there is none in a word."""
    rate, found = _rate(results), {}
    for m in members:
        found.setdefault((_decay(results, m), rate.value(m.member)), []).append(m)
    means = {key: [v for m in of if (v := value(m)) is not None] for key, of in found.items()}
    return {key: float(np.mean(values)) if values else _state(found[key]) for key, values in means.items()}


def _decay(results: StudyResults, m: MemberResults) -> float | None:
    """Its λ, or its timescale where the grid is one of timescales and λ follows from the learning rate."""
    return m.member.weight_decay if results.config.grid.timescales is None else m.member.timescale


def _state(members: list[MemberResults]) -> str:
    states = {m.state for m in members}
    return "div." if "diverged" in states else "–"


def _decay_text(results: StudyResults, value: float | None) -> str:
    return results.axis.text(value) if results.config.grid.timescales is None else "∞" if value is None else f"{value:.3g}"


def _decay_name(results: StudyResults) -> str:
    return results.axis.symbol if results.config.grid.timescales is None else "timescale"


def _maps(results: StudyResults) -> list[tuple[str, str, dict[tuple[Any, Any], float | str]]]:
    """(quantity, other fields in words, cells) of every heat map that has a number."""
    quantities = _quantities(results).items()
    found = [(name, group, _cells(results, members, value)) for group, members in _groups(results).items() for name, value in quantities]
    return [one for one in found if any(isinstance(value, float) for value in one[2].values())]


def _draw_heat_map(results: StudyResults) -> Drawing:
    """A panel per quantity: λ upwards, learning rate to the right; brighter is better, and the best is framed."""
    shown = _maps(results)
    decays = sorted({_decay(results, m) for m in results.members}, key=lambda d: float("inf") if d is None else d)
    rates = sorted({_rate(results).value(m.member) for m in results.members})
    titles = [name + (f", {group}" if group else "") for name, group, _ in shown]
    texts = [f"{rate:.3g}" for rate in rates]
    drawn, panels = drawing.small_multiples([(title, "") for title in titles], ticks=texts, height=0.3 + 0.27 * len(decays), top=0.3)
    for axes, last, (name, _, cells) in zip(panels, drawing.lowest(panels), shown):
        lower_is_better = name == "held-out loss"
        grid = np.array([[v if isinstance(v := cells.get((d, r)), float) else np.nan for r in rates] for d in decays])
        lowest, highest = float(np.nanmin(grid)), float(np.nanmax(grid))
        same = highest - lowest <= CONSTANT
        shade = (0.5 + 0.0 * grid) if same else (highest - grid if lower_is_better else grid - lowest) / (highest - lowest)
        edges = np.arange(len(rates) + 1) - 0.5, np.arange(len(decays) + 1) - 0.5
        axes.pcolormesh(*edges, np.ma.masked_invalid(shade), vmin=0, vmax=1, cmap=colormaps["viridis"])
        for i, decay in enumerate(decays):
            for j, rate in enumerate(rates):
                value = cells.get((decay, rate), "")
                text, color = (f"{value:.3f}", "black" if shade[i, j] > 0.5 else "white") if isinstance(value, float) else (str(value), drawing.INK)
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
        if not same:
            i, j = np.unravel_index(np.nanargmax(shade), shade.shape)
            axes.plot(
                j + np.array([-0.47, 0.47, 0.47, -0.47, -0.47]), i + np.array([-0.45, -0.45, 0.45, 0.45, -0.45]), color="#b91c1c", linewidth=1.6
            )
        axes.grid(visible=False)
        axes.set_xticks(range(len(rates)), texts if last else [""] * len(rates))
        axes.set_yticks(range(len(decays)), [_decay_text(results, d) for d in decays])
    panels[0].set_ylabel(_decay_name(results))
    drawing.frame_multiples(drawn, [], _rate(results).name)
    return drawn


def _heat_map_notes(results: StudyResults) -> list[str]:
    known = [(name, [v for v in cells.values() if isinstance(v, float)]) for name, _, cells in _maps(results)]
    same = [name for name, values in known if np.ptp(values) <= CONSTANT]
    return [f"The same in every cell, so none is the best: {', '.join(same)}."] if same else []


def _heat_map_numbers(results: StudyResults) -> str:
    sentences, rate, name_of_row = [], _rate(results), _decay_name(results)
    for name, group, cells in _maps(results):
        said = [f"{v:.3g} at {name_of_row} = {_decay_text(results, d)}, {rate.equation(r)}" for (d, r), v in cells.items() if isinstance(v, float)]
        sentences.append(f"{name}{f', {group}' if group else ''}: {'; '.join(said)}.")
    return " ".join(sentences)


def _draw_collapse(results: StudyResults) -> Drawing:
    """Loss and scores against λ at the left, against the timescale at the right: a line per learning rate. λ = 0 stands apart."""
    groups, quantities = _groups(results), list(_quantities(results).items())[:2]
    sides: tuple[tuple[str, Callable[[MemberResults], float | None]], ...] = (
        (f"weight decay {results.axis.symbol} (log)", lambda m: m.member.weight_decay or None),
        ("timescale, share of run (log)", lambda m: m.member.timescale),
    )
    rate = _rate(results)
    rates = sorted({rate.value(m.member) for m in results.members})
    drawn, panels = drawing.small_multiples([(name, side.split(" (")[0]) for name, _ in quantities for side, _ in sides], height=1.9)
    places = [(quantity, side) for quantity in quantities for side in sides]
    for axes, last, ((_, value), (label, x_of)) in zip(panels, drawing.lowest(panels), places):
        finite = [x for m in results.members if (x := x_of(m)) is not None]
        apart = (min(finite) / 3 if x_of is sides[0][1] else max(finite) * 3) if finite else 1.0
        for members, linestyle in zip(groups.values(), ("-", "--", ":", "-.") * len(groups)):
            for i, one in enumerate(rates):
                _draw_rate(axes, [m for m in members if rate.value(m.member) == one], x_of, value, apart, linestyle, i / max(len(rates) - 1, 1), i)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}" if last else NullFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        if any(x_of(m) is None for m in results.members):
            text, limits = ("0", (apart / 1.5, None)) if x_of is sides[0][1] else ("∞", (None, apart * 1.5))
            axes.set_xlim(*limits)
            style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "va": "top"}
            axes.annotate(text if last else "", (apart, 0.0), xytext=(0, -4), fontsize=9, **style)
        if not last:
            axes.xaxis.label.set_visible(False)
    handles: list[Any] = [
        Line2D([], [], color=_shade(i / max(len(rates) - 1, 1)), marker=drawing.MARKERS[i % len(drawing.MARKERS)], label=rate.equation(one))
        for i, one in enumerate(rates)
    ]
    handles += [
        Line2D([], [], color=drawing.MUTED, linestyle=style, label=group)
        for group, style in zip(groups, ("-", "--", ":", "-.") * len(groups))
        if group
    ]
    drawing.frame_multiples(drawn, handles, "")
    return drawn


def _shade(share: float) -> tuple[float, float, float, float]:
    return colormaps["viridis"](0.74 * share)


def _draw_rate(
    axes: Axes,
    members: list[MemberResults],
    x_of: Callable[[MemberResults], float | None],
    value: Callable[[MemberResults], float | None],
    apart: float,
    linestyle: str,
    share: float,
    index: int,
) -> None:
    """The means of one learning rate over seeds and fine-tunings; models without decay lie at `apart`, not on the line."""
    found: dict[float | None, list[float]] = {}
    for m in members:
        if (v := value(m)) is not None:
            found.setdefault(x_of(m), []).append(v)
    means = sorted((x, float(np.mean(values))) for x, values in found.items() if x is not None)
    color, marker = _shade(share), drawing.MARKERS[index % len(drawing.MARKERS)]
    label = _rate_label(members)
    axes.plot([x for x, _ in means], [y for _, y in means], color=color, marker=marker, linestyle=linestyle, markersize=4, label=label)
    if None in found:
        axes.scatter([apart], [np.mean(found[None])], color=[color], marker=marker, s=18, zorder=3)


def _rate_label(members: list[MemberResults]) -> str:
    return f"peak lr = {dict(members[0].member.overrides)[PEAK_LR]:.3g}" if members else ""


def _collapse_notes(results: StudyResults) -> list[str]:
    """Where every learning rate has its lowest loss: at one timescale, if that is what counts."""
    rate, sentences = _rate(results), []
    for group, members in _groups(results).items():
        said = []
        for one in sorted({rate.value(m.member) for m in members}):
            losses: dict[float | None, list[MemberResults]] = {}
            for m in members:
                if rate.value(m.member) == one and m.loss is not None:
                    losses.setdefault(m.member.weight_decay, []).append(m)
            if losses:
                best = losses[min(losses, key=lambda d: float(np.mean([m.loss or 0.0 for m in losses[d]])))][0].member
                timescale = "no decay" if best.timescale is None else f"timescale {best.timescale:.2g}"
                said.append(f"{rate.equation(one)} at λ = {best.weight_decay:.3g} ({timescale})")
        if said:
            sentences.append(f"Lowest held-out loss{f', {group}' if group else ''}: {'; '.join(said)}.")
    return sentences


# ------------------------------------------------------------------------------------------------------------------------------- seeds


def spread_rows(results: StudyResults) -> Rows:
    """Of every measure at every point: mean, standard deviation, lowest and highest over pretraining seeds, and the deviation over fine-tuning seeds.

    None where there is one seed; a measure without several of either has no row.
    """
    rows: Rows = []
    for part in results.slices:
        for measure in measures(part):
            for point, mean in measured(part, measure, part.points).items():
                values = [v for m in part.at(point) if (v := measure.value(m)) is not None]
                tuned = [found for m in part.at(point) if (found := measure.finite(m)) is not None and all(len(group) > 1 for group in found)]
                within = [
                    float(np.mean([group.mean(axis=1) for group in found], axis=0).std(ddof=1))
                    for found in tuned
                    if len({len(g) for g in found}) == 1
                ]
                if len(values) > 1 or within:
                    row = {"measure": measure.name, "unit": measure.unit, **part.swept(point), "seeds": len(values), "mean": mean}
                    row |= {"deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None, "lowest": min(values), "highest": max(values)}
                    rows.append(row | {"finetune_deviation": float(np.mean(within)) if within else None})
    return rows


FIGURES = {
    "stability": Figure(
        "Gain against forgetting",
        "Upwards: more learned; to the right: more of the pretraining forgotten. A line per task over {symbol}, whose values stand at the last one; means over "
        "pretraining seeds. {seeds}",
        lambda results: bool(_planes(results)),
        _draw_stability,
        section="finetuning",
        of_base=False,
        applies=lambda config: config.forgetting.held_out_loss or bool(config.zero_shot.sets),
        needs="no model has a gain and a held-out loss or a zero-shot accuracy, each before and after fine-tuning",
        numbers=_stability_numbers,
    ),
    "heat_map": Figure(
        "Weight decay and learning rate",
        "Held-out loss, and scores after fine-tuning as means over the learned tasks; means over seeds, and over fine-tunings where they are swept. Brighter "
        "is better, and the best is framed. “div.”: diverged.",
        lambda results: any(m.loss is not None for m in results.members),
        _draw_heat_map,
        section="pretraining",
        of_study=True,
        wide=True,
        applies=_sweeps_rates,
        notes=_heat_map_notes,
        numbers=_heat_map_numbers,
    ),
    "collapse": Figure(
        "One timescale for every learning rate?",
        "The same numbers against λ, and against AdamW’s timescale 1/(peak learning rate · λ) as a share of the run: where the lines of all learning rates lie "
        "on each other, it is the timescale that counts. λ = 0 stands apart.",
        lambda results: any(m.loss is not None for m in results.members),
        _draw_collapse,
        section="pretraining",
        of_study=True,
        wide=True,
        applies=_sweeps_rates,
        notes=_collapse_notes,
        numbers=_heat_map_numbers,
    ),
}

TABLES = {
    "stability": Table(stability_rows, on_page=False, optional=True),
    "seed_spread": Table(
        spread_rows,
        title="Spread between seeds",
        caption="Standard deviation (n − 1), lowest and highest value over the pretraining seeds of a point; and the deviation between fine-tuning seeds of a "
        "model, averaged over models. In the unit of the measure.",
        optional=True,
    ),
}
