"""The figures of a study. Each is one column wide, with its panels below each other, so that it reads on a phone as on a desk."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plasticity_jax.errors import UserError
from plasticity_jax.study.results import MemberResults, StudyResults, number
from plasticity_jax.study.tables import gain_rows

WIDTH = 4.9  # inches; at 9 points the text stays readable when the page scales a figure to a phone's width
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "svg.hashsalt": "plasticity",
    "figure.constrained_layout.use": True,
}
INK, MUTED, REFERENCE = "#1f2937", "#6b7280", "#9ca3af"
SERIES = ("#0b5394", "#b45309", "#3f7d20", "#7e3794", "#8a1c3b", "#00707a")  # all at least 4.5:1 on white
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


@dataclass(frozen=True)
class FigureKind:
    """A figure of the report.

    Attributes:
      title, caption: for the page.
      available: whether the study has what it shows.
      draw: draws it; called only when available.
    """

    title: str
    caption: str
    available: Callable[[StudyResults], bool]
    draw: Callable[[StudyResults], Figure]


def figure(results: StudyResults, name: str) -> Figure:
    """Draws one of FIGURES.

    Raises:
      UserError: an unknown name, or a figure whose stage has not finished for any member.
    """
    if name not in FIGURES:
        near = difflib.get_close_matches(name, FIGURES, n=1, cutoff=0.4)
        raise UserError(f"figure {name!r} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(FIGURES)}."))
    kind = FIGURES[name]
    if not kind.available(results):
        raise UserError(f"figure {name!r} has nothing to show yet; run plasticity study until a member has finished the stage it reads.")
    with matplotlib.rc_context(STYLE):
        return kind.draw(results)


# ------------------------------------------------------------------------------------------------------------------------ shared pieces


def colour(results: StudyResults, decay: float) -> tuple[float, float, float, float]:
    """Sequential in λ, dark for none; the palest yellow end of the map is left out because it vanishes on white."""
    return matplotlib.colormaps["viridis"](0.85 * results.decays.index(decay) / max(len(results.decays) - 1, 1))


def marker(results: StudyResults, decay: float) -> str:
    return MARKERS[results.decays.index(decay) % len(MARKERS)]


def positions(results: StudyResults) -> dict[float, float]:
    """Place of each λ on the axis: log10, with 0 a step to the left of the smallest positive one."""
    logs = np.log10([d for d in results.decays if d > 0])
    step = float(np.clip(np.median(np.diff(logs)), 0.3, 1.0)) if len(logs) > 1 else 0.5
    places = dict(zip((d for d in results.decays if d > 0), map(float, logs)))
    return {0.0: (float(logs[0]) if len(logs) else 0.0) - step} | places if 0.0 in results.decays else places


def decay_axis(axes: Axes, results: StudyResults, *, label: bool) -> None:
    """Ticks at the grid's λ, the timescale below each; a break in the axis after 0."""
    places = positions(results)
    texts = [f"{d:.3g}" + (f"\n{_short(t)}" if (t := results.timescale(d)) is not None else "\n∞") for d in places]
    axes.set_xticks(list(places.values()), texts if label else [""] * len(texts))
    width = max(places.values()) - min(places.values()) or 1.0
    axes.set_xlim(min(places.values()) - 0.09 * width, max(places.values()) + 0.09 * width)
    axes.grid(axis="x", visible=False)
    if 0.0 in places and len(places) > 1:
        ordered = sorted(places.values())
        gap = (ordered[0] + ordered[1]) / 2
        for shift in (-0.008, 0.008):
            axes.plot([gap + (shift - 0.008) * width, gap + (shift + 0.008) * width], [-0.022, 0.022], transform=axes.get_xaxis_transform(),
                      color=axes.spines["bottom"].get_edgecolor(), linewidth=1.0, clip_on=False)
    if label:
        axes.set_xlabel("weight decay λ, log scale; below: timescale, share of the run")


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _label(results: StudyResults, decay: float) -> str:
    return f"λ = {decay:.3g}"


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    drawn = Figure(figsize=(WIDTH, height * count))
    axes = drawn.subplots(count, 1, squeeze=False)[:, 0]
    return drawn, list(axes)


def _legend_above(axes: Axes, columns: int) -> None:
    """Above the panel, where it covers no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=1.6, columnspacing=1.1, borderaxespad=0.1)


def _seed_points(axes: Axes, results: StudyResults, value: Callable[[MemberResults], float | None], colour_: str) -> dict[float, float]:
    """Draws each seed's value faintly where there are several, and returns λ → mean."""
    places, means = positions(results), {}
    for decay in results.decays:
        found = [v for m in results.at(decay) if (v := value(m)) is not None]
        if found:
            means[decay] = float(np.mean(found))
            if len(found) > 1:
                axes.plot([places[decay]] * len(found), found, ".", color=colour_, alpha=0.45, markersize=4)
    return means


def _line(axes: Axes, results: StudyResults, means: dict[float, float], **style) -> None:
    places = positions(results)
    axes.plot([places[d] for d in means], list(means.values()), **style)


# ------------------------------------------------------------------------------------------------------------------------------ figures


def _loss_curves(results: StudyResults) -> Figure:
    drawn, panels = _panels(2, 2.5)
    shown = set()
    for member in results.members:
        style = {"color": colour(results, member.weight_decay), "alpha": 1.0 if member.state == "done" else 0.6}
        label = None if member.weight_decay in shown else _label(results, member.weight_decay) + ("" if member.state == "done" else f" ({member.state})")
        rows = [(row["step"], number(row.get("loss"))) for row in member.curve]
        rows = [(step, loss) for step, loss in rows if loss is not None]
        if rows:
            panels[0].plot(*zip(*rows), **style, label=label, linewidth=1.1)
            shown.add(member.weight_decay)
        held = [(row["step"], number(row["held_out"].get("loss"))) for row in member.curve if isinstance(row.get("held_out"), dict)]
        held = [(step, loss) for step, loss in held if loss is not None]
        if held:
            panels[1].plot(*zip(*held), **style, marker=marker(results, member.weight_decay), markersize=4)
    panels[0].set_ylabel("training loss\n(nats per token)")
    panels[1].set_ylabel("held-out loss\n(nats per token)")
    panels[1].set_xlabel("step")
    for axes in panels:
        _focus(axes)
    _legend_above(panels[0], 3)
    return drawn


def _focus(axes: Axes) -> None:
    """Cuts the first plunge off the top, so that the differences at the end can be seen."""
    ends = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 6 :] for line in axes.lines] or [np.zeros(0)])
    if len(ends) > 1 and np.ptp(ends) > 0:
        axes.set_ylim(ends.min() - 0.05 * np.ptp(ends), ends.max() + 0.12 * np.ptp(ends))


def _held_out_loss(results: StudyResults) -> Figure:
    drawn, panels = _panels(2, 2.3)
    _line(panels[0], results, _seed_points(panels[0], results, lambda m: m.loss, INK), color=INK, marker="o", label="all domains")
    domains = sorted({d for m in results.members if m.pretrain for d in m.pretrain["held_out"]["domains"]})
    for i, domain in enumerate(domains):
        means = _seed_points(panels[1], results, lambda m, d=domain: number(m.pretrain["held_out"]["domains"][d]["loss"]) if m.pretrain else None, SERIES[i % len(SERIES)])
        _line(panels[1], results, means, color=SERIES[i % len(SERIES)], marker=MARKERS[i % len(MARKERS)], label=domain)
    for axes, title in zip(panels, ("All domains", "By domain")):
        axes.set_ylabel("held-out loss\n(nats per token)")
        decay_axis(axes, results, label=axes is panels[-1])
        axes.set_title(title, pad=20 if axes is panels[1] and domains else 6)
    if domains:
        _legend_above(panels[1], 4)
    return drawn


def _scores(results: StudyResults) -> Figure:
    rows = gain_rows(results)
    tasks = [task for task in results.tasks if any(row["task"] == task for row in rows)]
    drawn, panels = _panels(len(tasks), 2.1)
    for axes, task in zip(panels, tasks):
        found = [row for row in rows if row["task"] == task]
        _interval_line(axes, results, found, "after", color=SERIES[0], marker="o", label="after")
        before = {row["weight_decay"]: row["before"] for row in found if row["before"] is not None}
        _line(axes, results, before, color=SERIES[1], marker="s", linestyle="--", label="before")
        majority = next(s.majority_class for m in results.members for s in (m.after.get(task),) if s)
        axes.axhline(majority, color=MUTED, linewidth=1.0, linestyle=":", label="majority class", zorder=1)
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("greedy accuracy")
        axes.set_title(task + ("" if task in results.learnt else " (not learnt)"), pad=20 if axes is panels[0] else 6)
        decay_axis(axes, results, label=axes is panels[-1])
    _legend_above(panels[0], 3)
    return drawn


def _gains(results: StudyResults) -> Figure:
    rows = gain_rows(results)
    tasks = [task for task in results.tasks if any(row["task"] == task and row["gain"] is not None for row in rows)]
    drawn, panels = _panels(len(tasks), 2.1)
    for axes, task in zip(panels, tasks):
        found = [row for row in rows if row["task"] == task and row["gain"] is not None]
        axes.axhline(0.0, color=REFERENCE, linewidth=1.0, zorder=1)
        _interval_line(axes, results, found, "gain", color=SERIES[0], marker="o", label="gain")
        differences = [row for row in found if row["gain_difference"] is not None]
        if differences:
            reference = differences[0]["reference_weight_decay"]
            _interval_line(axes, results, differences, "gain_difference", color=SERIES[4], marker="D", linestyle="none", label=f"less the gain at λ = {reference:.3g}", shift=0.02)
        axes.set_ylabel("gain in accuracy")
        axes.set_title(task + ("" if task in results.learnt else " (not learnt)"), pad=20 if axes is panels[0] else 6)
        decay_axis(axes, results, label=axes is panels[-1])
    _legend_above(panels[0], 2)
    return drawn


def _interval_line(axes: Axes, results: StudyResults, rows: list[dict], name: str, *, shift: float = 0.0, **style) -> None:
    places = positions(results)
    width = max(places.values()) - min(places.values())
    x = [places[row["weight_decay"]] + shift * width for row in rows]
    y = np.array([row[name] for row in rows])
    ends = np.array([[row[f"{name}_lower"], row[f"{name}_upper"]] for row in rows])
    # The mean of a percentile interval can lie outside it by rounding.
    axes.errorbar(x, y, yerr=np.maximum([y - ends[:, 0], ends[:, 1] - y], 0.0), capsize=2.5, elinewidth=1.1, **style)


def _probes(results: StudyResults) -> Figure:
    sets = [name for name in results.config.probe.sets if any(m.probe and name in m.probe["sets"] for m in results.members)]
    drawn, panels = _panels(len(sets), 2.4)
    for axes, name in zip(panels, sets):
        for decay in results.decays:
            found = [m.probe["sets"][name] for m in results.at(decay) if m.probe and name in m.probe["sets"]]
            if found:
                accuracy = np.mean([[float(a) for a in f["accuracy"]] for f in found], axis=0)
                axes.plot(range(len(accuracy)), accuracy, color=colour(results, decay), marker=marker(results, decay), label=_label(results, decay))
                axes.set_xticks(range(len(accuracy)), [layer.replace("block", "block ") for layer in found[0]["layers"]])
                majority = found[0]["majority"]
        axes.axhline(majority, color=MUTED, linewidth=1.0, linestyle=":", label="majority", zorder=1)
        axes.set_ylabel("probe accuracy")
        axes.set_title(name, pad=34 if axes is panels[0] else 6)
    panels[-1].set_xlabel("state after")
    _legend_above(panels[0], 3)
    return drawn


def _pseudo_rank(results: StudyResults) -> Figure:
    drawn, panels = _panels(2, 2.4)
    for axes, product in zip(panels, ("W_QK", "W_VO")):
        for decay in results.decays:
            rank = results.mean(decay, lambda m: m.pseudo_rank(product))
            if rank is not None:
                layers = np.arange(1, len(rank) + 1)
                axes.plot(layers, rank.mean(axis=1), color=colour(results, decay), marker=marker(results, decay), label=_label(results, decay))
                axes.set_xticks(layers)
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("pseudo-rank")
        axes.set_title(product, pad=34 if axes is panels[0] else 6)
    panels[-1].set_xlabel("layer (mean over heads)")
    _legend_above(panels[0], 3)
    return drawn


def _gap(results: StudyResults) -> Figure:
    drawn, panels = _panels(1, 2.9)
    places, axes = positions(results), panels[0]
    width = max(places.values()) - min(places.values())
    axes.axhline(0.0, color=REFERENCE, linewidth=1.0, zorder=1)
    measured = [m for m in results.members if m.gap and number(m.gap["gap"]) is not None]
    for pick, style in (
        (lambda gap: gap, {"color": SERIES[0], "marker": "o", "label": "model"}),
        (lambda gap: gap["control"], {"color": MUTED, "marker": "s", "label": "unigram control", "alpha": 0.9}),
    ):
        shift = 0.02 * width if style["marker"] == "s" else 0.0
        x = [places[m.weight_decay] + shift for m in measured]
        y = np.array([float(pick(m.gap)["gap"]) for m in measured])
        ends = np.array([[float(end) for end in pick(m.gap)["interval"]] for m in measured])
        axes.errorbar(x, y, yerr=np.maximum([y - ends[:, 0], ends[:, 1] - y], 0.0), linestyle="none", capsize=2.5, elinewidth=1.1, **style)
    means = {d: float(g) for d in results.decays if (g := results.mean(d, lambda m: None if m.gap is None else number(m.gap["gap"]))) is not None}
    _line(axes, results, means, color=SERIES[0])
    axes.set_ylabel("held-out − seen loss\n(nats per token)")
    decay_axis(axes, results, label=True)
    _legend_above(axes, 2)
    return drawn


def _correlation(results: StudyResults) -> Figure:
    drawn, panels = _panels(1, 2.9)
    axes = panels[0]
    for i, task in enumerate(results.tasks):
        points = [(loss, float(np.mean(score)), d) for d, loss in results.losses.items() if (score := results.mean(d, lambda m: m.after_task(task))) is not None]
        if points:
            points.sort()
            axes.plot([p[0] for p in points], [p[1] for p in points], color=SERIES[i % len(SERIES)], linewidth=0.9, alpha=0.7, marker=MARKERS[i % len(MARKERS)], label=task)
    # Every task stands at the same losses, so λ is written once, along the top.
    for rank, (decay, loss) in enumerate(sorted(results.losses.items(), key=lambda item: item[1])):
        axes.axvline(loss, color=REFERENCE, linewidth=0.7, linestyle=":", zorder=1)
        axes.annotate(f"{decay:.3g}", (loss, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 1 + 9 * (rank % 2)), textcoords="offset points", ha="center", va="bottom",
                      fontsize=7.5, color=INK, annotation_clip=False)
    axes.set_xlabel("held-out loss (nats per token); above the panel: λ")
    axes.set_ylabel("greedy accuracy after")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)
    return drawn


def _any(value: Callable[[MemberResults], object]) -> Callable[[StudyResults], bool]:
    return lambda results: any(value(m) for m in results.members)


FIGURES: dict[str, FigureKind] = {
    "loss_curves": FigureKind("Loss curves", "Loss during pretraining; the first steps run off the top. All members see the same batches in the same order.",
                              _any(lambda m: any(number(r.get("loss")) is not None for r in m.curve)), _loss_curves),
    "held_out_loss": FigureKind("Final held-out loss", "Held-out loss at the end of pretraining, over all domains and by domain.", _any(lambda m: m.loss is not None), _held_out_loss),
    "scores": FigureKind("Fine-tuned score", "Greedy accuracy after fine-tuning with 95% bootstrap intervals over problems, and before it with the same prompts and grader.",
                         _any(lambda m: m.after), _scores),
    "gains": FigureKind("Gain from fine-tuning", "After less before, paired by problem. Diamonds: difference to the gain of the smallest λ, paired by problem. 95% bootstrap intervals.",
                        _any(lambda m: any(m.gain(t) is not None for t in m.after)), _gains),
    "probes": FigureKind("Linear probes", "Test accuracy of a linear classifier on the last token's state of the base model, by layer.", _any(lambda m: m.probe and m.probe["sets"]), _probes),
    "pseudo_rank": FigureKind("Attention pseudo-rank", "Share of the singular values that holds most of their sum, for the query-key and the value-output products of the base model.",
                              _any(lambda m: m.spectra), _pseudo_rank),
    "gap": FigureKind("Seen / held-out gap", "Loss on held-out text less loss on text seen in training, on equal tokens. A unigram model must show no gap. 95% intervals over documents.",
                      _any(lambda m: m.gap), _gap),
    "correlation": FigureKind("Loss against score", "Does a lower held-out loss go with a better score after fine-tuning? One point per λ and task.",
                              lambda results: bool(results.losses) and any(m.after for m in results.members), _correlation),
}
