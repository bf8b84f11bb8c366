"""The figures of a study. Each is one column wide, with its panels below each other, so that it reads on a phone as on a desk."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plasticity_jax.errors import UserError
from plasticity_jax.report.drawing import (
    INK,
    LEGEND_COLUMNS,
    MARKERS,
    MUTED,
    REFERENCE,
    SERIES,
    STYLE,
    colour,
    interval_line,
    legend_above,
    line,
    marker,
    member_panels,
    panels_below,
    positions,
    seed_means,
    swept_axis,
)
from plasticity_jax.report.results import MemberResults, StudyResults, number
from plasticity_jax.report.tables import gain_rows


@dataclass(frozen=True)
class FigureKind:
    """A figure of the report.

    Attributes:
      title, caption: for the page; in the caption {symbol} and {least} stand for those of the study's axis, {batches} for what members share.
      available: whether the study has what it shows.
      draw: draws it; called only when available.
      of_base: whether it is about the base models alone.
    """

    title: str
    caption: str
    available: Callable[[StudyResults], bool]
    draw: Callable[[StudyResults], Figure]
    of_base: bool = False

    def says(self, results: StudyResults) -> str:
        """The caption, for this study."""
        batches = " All members see the same batches in the same order." if results.same_batches else ""
        return self.caption.format(symbol=results.axis.symbol, least=results.axis.least, batches=batches)


def figure(results: StudyResults, name: str) -> Figure:
    """Draws one of FIGURES.

    Raises:
      UserError: an unknown name, a figure whose stage has not finished for any member, or a study of several slices, which have their own figures.
    """
    if len(results.slices) > 1:
        raise UserError(f"figure {name!r} is drawn for one part of this study at a time; name one of {', '.join(s.title for s in results.slices)}.")
    if name not in FIGURES:
        near = difflib.get_close_matches(name, FIGURES, n=1, cutoff=0.4)
        raise UserError(f"figure {name!r} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(FIGURES)}."))
    kind = FIGURES[name]
    if not kind.available(results):
        raise UserError(f"figure {name!r} has nothing to show yet; run plasticity study until a member has finished the stage it reads.")
    with matplotlib.rc_context(STYLE):
        drawn = kind.draw(results)
        # Laid out once, not again for every file format.
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    return drawn


def _loss_curves(results: StudyResults) -> Figure:
    drawn, panels = member_panels(results, ("Training batches", "Held-out text"), 2.4)
    for member in results.members:
        style = {"color": colour(results, member.point), "alpha": 1.0 if member.state == "done" else 0.5}
        trained = [(row["step"], loss) for row in member.curve if (loss := number(row.get("loss"))) is not None]
        held_out = [
            (row["step"], loss)
            for row in member.curve
            if isinstance(row.get("held_out"), dict) and (loss := number(row["held_out"].get("loss"))) is not None
        ]
        panels[0].plot(*np.reshape(trained, (-1, 2)).T, **style, linewidth=1.1)
        panels[1].plot(*np.reshape(held_out, (-1, 2)).T, **style, marker=marker(results, member.point), markersize=4)
    for axes in panels:
        axes.set_ylabel("loss (nats per token)")
        axes.set_xlim(0, None)
        _focus(axes)
    panels[1].sharex(panels[0])
    panels[1].set_xlabel("step")
    return drawn


def _focus(axes: Axes) -> None:
    """Cuts the first plunge off the top, so that the differences at the end can be seen."""
    ends = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 5 :] for line in axes.lines])
    if len(ends) > 1 and np.ptp(ends) > 0:
        axes.set_ylim(ends.min() - 0.05 * np.ptp(ends), ends.max() + 0.12 * np.ptp(ends))


def _held_out_loss(results: StudyResults) -> Figure:
    drawn, panels = panels_below(2, 2.3)
    line(panels[0], results, seed_means(panels[0], results, lambda m: m.loss, INK), color=INK, marker="o", label="all domains")
    domains = sorted({d for m in results.members if m.pretrain for d in m.pretrain["held_out"]["domains"]})
    for i, domain in enumerate(domains):
        means = seed_means(
            panels[1],
            results,
            lambda m, d=domain: number(m.pretrain["held_out"]["domains"][d]["loss"]) if m.pretrain else None,
            SERIES[i % len(SERIES)],
        )
        line(panels[1], results, means, color=SERIES[i % len(SERIES)], marker=MARKERS[i % len(MARKERS)], label=domain)
    for axes, title in zip(panels, ("All domains", "By domain")):
        axes.set_ylabel("held-out loss\n(nats per token)")
        swept_axis(axes, results, label=axes is panels[-1])
        axes.set_title(title)
    if domains:
        legend_above(panels[1], panels[1].get_legend_handles_labels()[0])
    return drawn


def _scores(results: StudyResults) -> Figure:
    rows = gain_rows(results)
    tasks = [task for task in results.tasks if any(row["task"] == task for row in rows)]
    drawn, panels = panels_below(len(tasks), 2.1)
    for axes, task in zip(panels, tasks):
        found = [row for row in rows if row["task"] == task]
        interval_line(axes, results, found, "after", color=SERIES[0], marker="o", label="after")
        before = {row[results.axis.field]: row["before"] for row in found if row["before"] is not None}
        line(axes, results, before, color=SERIES[1], marker="s", linestyle="--", label="before")
        majority = next(s.majority_class for m in results.members for s in (m.after.get(task),) if s)
        axes.axhline(majority, color=MUTED, linewidth=1.0, linestyle=":", label="majority class", zorder=1)
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("greedy accuracy")
        axes.set_title(task + ("" if task in results.learnt else " (not learnt)"))
        swept_axis(axes, results, label=axes is panels[-1])
    legend_above(panels[0], panels[0].get_legend_handles_labels()[0])
    return drawn


def _gains(results: StudyResults) -> Figure:
    rows = gain_rows(results)
    tasks = [task for task in results.tasks if any(row["task"] == task and row["gain"] is not None for row in rows)]
    drawn, panels = panels_below(len(tasks), 2.1)
    for axes, task in zip(panels, tasks):
        found = [row for row in rows if row["task"] == task and row["gain"] is not None]
        axes.axhline(0.0, color=REFERENCE, linewidth=1.0, zorder=1)
        interval_line(axes, results, found, "gain", color=SERIES[0], marker="o", label="gain")
        differences = [row for row in found if row["gain_difference"] is not None]
        if differences:
            reference = differences[0][f"reference_{results.axis.field}"]
            interval_line(
                axes,
                results,
                differences,
                "gain_difference",
                color=SERIES[4],
                marker="D",
                linestyle="none",
                label=f"less the gain at {results.axis.said(reference)}",
                shift=0.02,
            )
        axes.set_ylabel("gain in accuracy")
        axes.set_title(task + ("" if task in results.learnt else " (not learnt)"))
        swept_axis(axes, results, label=axes is panels[-1])
    legend_above(panels[0], panels[0].get_legend_handles_labels()[0])
    return drawn


def _probes(results: StudyResults) -> Figure:
    sets = [name for name in results.config.probe.sets if any(m.probe and name in m.probe["sets"] for m in results.members)]
    drawn, panels = member_panels(results, sets, 2.4)
    for axes, name in zip(panels, sets):
        for point in results.points:
            found = [m.probe["sets"][name] for m in results.at(point) if m.probe and name in m.probe["sets"]]
            if found:
                accuracy = np.mean([[float(a) for a in f["accuracy"]] for f in found], axis=0)
                axes.plot(range(len(accuracy)), accuracy, color=colour(results, point), marker=marker(results, point))
                axes.set_xticks(range(len(accuracy)), [layer.replace("block", "block ") for layer in found[0]["layers"]])
                majority = found[0]["majority"]
        axes.axhline(majority, color=MUTED, linewidth=1.0, linestyle=":", zorder=1)
        axes.annotate(
            "majority class",
            (1.0, majority),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color=MUTED,
        )
        axes.set_ylabel("probe accuracy")
    panels[-1].set_xlabel("state after")
    return drawn


def _pseudo_rank(results: StudyResults) -> Figure:
    drawn, panels = member_panels(results, ("W_QK, query-key product", "W_VO, value-output product"), 2.4)
    for axes, product in zip(panels, ("W_QK", "W_VO")):
        for point in results.points:
            rank = results.mean(point, lambda m: m.pseudo_rank(product))
            if rank is not None:
                layers = np.arange(1, len(rank) + 1)
                axes.plot(layers, rank.mean(axis=1), color=colour(results, point), marker=marker(results, point))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("pseudo-rank")
    panels[-1].set_xlabel("layer (mean over heads)")
    return drawn


def _gap(results: StudyResults) -> Figure:
    drawn, panels = panels_below(1, 2.9)
    places, axes = positions(results), panels[0]
    width = max(places.values()) - min(places.values())
    axes.axhline(0.0, color=REFERENCE, linewidth=1.0, zorder=1)
    measured = [m for m in results.members if m.gap and number(m.gap["gap"]) is not None]
    for pick, style in (
        (lambda gap: gap, {"color": SERIES[0], "marker": "o", "label": "model"}),
        (lambda gap: gap["control"], {"color": MUTED, "marker": "s", "label": "unigram control", "alpha": 0.9}),
    ):
        shift = 0.02 * width if style["marker"] == "s" else 0.0
        x = [places[m.point] + shift for m in measured]
        y = np.array([float(pick(m.gap)["gap"]) for m in measured])
        ends = np.array([[float(end) for end in pick(m.gap)["interval"]] for m in measured])
        axes.errorbar(x, y, yerr=np.maximum([y - ends[:, 0], ends[:, 1] - y], 0.0), linestyle="none", capsize=2.5, elinewidth=1.1, **style)
    means = {d: float(g) for d in results.points if (g := results.mean(d, lambda m: None if m.gap is None else number(m.gap["gap"]))) is not None}
    line(axes, results, means, color=SERIES[0])
    axes.set_ylabel("held-out − seen loss\n(nats per token)")
    swept_axis(axes, results, label=True)
    legend_above(axes, axes.get_legend_handles_labels()[0])
    return drawn


def _correlation(results: StudyResults) -> Figure:
    drawn, panels = panels_below(1, 2.9)
    axes = panels[0]
    for i, task in enumerate(results.tasks):
        points = [
            (loss, float(np.mean(score)))
            for point, loss in results.losses.items()
            if (score := results.mean(point, lambda m: m.after_task(task))) is not None
        ]
        if points:
            points.sort()
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                color=SERIES[i % len(SERIES)],
                linewidth=0.9,
                alpha=0.7,
                marker=MARKERS[i % len(MARKERS)],
                label=task,
            )
    # Every task stands at the same losses, so the swept value is written once, along the top; neighbours too close for one line take two.
    span, last, raised = max(results.losses.values()) - min(results.losses.values()), -np.inf, False
    for point, loss in sorted(results.losses.items(), key=lambda item: item[1]):
        raised = not raised and loss - last < 0.08 * span
        last = loss
        axes.axvline(loss, color=REFERENCE, linewidth=0.7, linestyle=":", zorder=1)
        axes.annotate(
            results.axis.text(point),
            (loss, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 10 if raised else 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=INK,
            annotation_clip=False,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"held-out loss (nats per token); above the panel: {results.axis.symbol}")
    axes.set_ylabel("greedy accuracy after")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=LEGEND_COLUMNS, handlelength=1.6, columnspacing=1.1)
    return drawn


def _any(value: Callable[[MemberResults], object]) -> Callable[[StudyResults], bool]:
    return lambda results: any(value(m) for m in results.members)


FIGURES: dict[str, FigureKind] = {
    "loss_curves": FigureKind(
        "Loss curves",
        "Loss during pretraining; the first steps run off the top.{batches}",
        _any(lambda m: any(number(r.get("loss")) is not None for r in m.curve)),
        _loss_curves,
        of_base=True,
    ),
    "held_out_loss": FigureKind(
        "Final held-out loss",
        "Held-out loss at the end of pretraining, over all domains and by domain.",
        _any(lambda m: m.loss is not None),
        _held_out_loss,
        of_base=True,
    ),
    "scores": FigureKind(
        "Fine-tuned score",
        "Greedy accuracy after fine-tuning with 95% bootstrap intervals over problems, and before it with the same prompts and grader.",
        _any(lambda m: m.after),
        _scores,
    ),
    "gains": FigureKind(
        "Gain from fine-tuning",
        "After less before, paired by problem. Diamonds: difference to the gain of the {least} {symbol}, paired by problem. 95% bootstrap intervals.",
        _any(lambda m: any(m.gain(t) is not None for t in m.after)),
        _gains,
    ),
    "probes": FigureKind(
        "Linear probes",
        "Test accuracy of a linear classifier on the last token's state of the base model, by layer.",
        _any(lambda m: m.probe and m.probe["sets"]),
        _probes,
        of_base=True,
    ),
    "pseudo_rank": FigureKind(
        "Attention pseudo-rank",
        "Share of the singular values that holds most of their sum, for the query-key and the value-output products of the base model.",
        _any(lambda m: m.spectra),
        _pseudo_rank,
        of_base=True,
    ),
    "gap": FigureKind(
        "Seen / held-out gap",
        "Loss on held-out text less loss on text seen in training, on equal tokens. A unigram model must show no gap. 95% intervals over documents.",
        _any(lambda m: m.gap),
        _gap,
        of_base=True,
    ),
    "correlation": FigureKind(
        "Loss against score",
        "Does a lower held-out loss go with a better score after fine-tuning? One point per {symbol} and task.",
        lambda results: bool(results.losses) and any(m.after for m in results.members),
        _correlation,
    ),
}
