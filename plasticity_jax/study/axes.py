"""What the figures share: their style, the axis of weight decays, panels with a legend, lines with intervals."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plasticity_jax.study.results import MemberResults, StudyResults

WIDTH = 4.5  # inches; at 9 points the text stays readable when the page scales a figure to a phone's width
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
LEGEND_COLUMNS = 4
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def colour(results: StudyResults, decay: float) -> tuple[float, float, float, float]:
    """Sequential in λ, dark for none; the pale end of the map is left out because it vanishes on white."""
    return matplotlib.colormaps["viridis"](0.74 * results.decays.index(decay) / max(len(results.decays) - 1, 1))


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
            axes.plot(
                [gap + (shift - 0.008) * width, gap + (shift + 0.008) * width],
                [-0.022, 0.022],
                transform=axes.get_xaxis_transform(),
                color=axes.spines["bottom"].get_edgecolor(),
                linewidth=1.0,
                clip_on=False,
            )
    if label:
        axes.set_xlabel("weight decay λ (log); below: timescale, share of run")


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def panels_below(count: int, height: float) -> tuple[Figure, list[Axes]]:
    drawn = Figure(figsize=(WIDTH, height * count))
    axes = drawn.subplots(count, 1, squeeze=False)[:, 0]
    return drawn, list(axes)


def member_panels(results: StudyResults, titles: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Panels with their titles, and one legend of λ above the first."""
    drawn, panels = panels_below(len(titles), height)
    for axes, title in zip(panels, titles):
        axes.set_title(title)
    handles = [
        Line2D([], [], color=colour(results, d), marker=marker(results, d), label=f"λ = {d:.3g}{_outcome(results, d)}") for d in results.decays
    ]
    legend_above(panels[0], handles)
    return drawn, panels


def _outcome(results: StudyResults, decay: float) -> str:
    """Why a λ has no line, where that is its result."""
    states = {m.state for m in results.at(decay)}
    return f" ({'/'.join(sorted(states))})" if states & {"diverged", "failed"} else ""


def legend_above(axes: Axes, handles: Sequence[Artist]) -> None:
    """Above the panel, where it covers no data, and below its title."""
    rows = -(-len(handles) // LEGEND_COLUMNS)
    axes.set_title(axes.get_title(loc="left"), pad=6 + 13 * rows)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=LEGEND_COLUMNS, handlelength=1.6, columnspacing=1.1, borderaxespad=0.1
    )


def seed_means(axes: Axes, results: StudyResults, value: Callable[[MemberResults], float | None], colour_: str) -> dict[float, float]:
    """Draws each seed's value faintly where there are several, and returns λ → mean."""
    places, means = positions(results), {}
    for decay in results.decays:
        found = [v for m in results.at(decay) if (v := value(m)) is not None]
        if found:
            means[decay] = float(np.mean(found))
            if len(found) > 1:
                axes.plot([places[decay]] * len(found), found, ".", color=colour_, alpha=0.45, markersize=4)
    return means


def line(axes: Axes, results: StudyResults, means: dict[float, float], **style) -> None:
    places = positions(results)
    axes.plot([places[d] for d in means], list(means.values()), **style)


def interval_line(axes: Axes, results: StudyResults, rows: list[dict], name: str, *, shift: float = 0.0, **style) -> None:
    places = positions(results)
    width = max(places.values()) - min(places.values())
    x = [places[row["weight_decay"]] + shift * width for row in rows]
    y = np.array([row[name] for row in rows])
    ends = np.array([[row[f"{name}_lower"], row[f"{name}_upper"]] for row in rows])
    # The mean of a percentile interval can lie outside it by rounding.
    axes.errorbar(x, y, yerr=np.maximum([y - ends[:, 0], ends[:, 1] - y], 0.0), capsize=2.5, elinewidth=1.1, **style)
