"""What the figures share: their style, the axis of the swept field, panels with a legend, lines with intervals."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from plasticity_jax.report.results import MemberResults, StudyResults
from plasticity_jax.study.sweep import DECAY, PEAK_LR

PNG_DPI = 160
WIDTH = 4.5  # inches; at 9 points the text stays readable when the page scales a figure to a phone's width
WIDE = 9.4  # inches, of a figure that takes both columns of the page, with text of the same size
STYLE: Any = {
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
SMALL_CHARACTER = 0.065  # inches, of the tick labels of small panels
LEGEND_COLUMNS, LEGEND_CHARACTERS = 4, 44  # of one row, at most
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def color(results: StudyResults, point: Any) -> tuple[float, float, float, float]:
    """Sequential in the swept field, dark for its first value; the pale end of the map is left out because it vanishes on white."""
    return matplotlib.colormaps["viridis"](0.74 * results.points.index(point) / max(len(results.points) - 1, 1))


def marker(results: StudyResults, point: Any) -> str:
    return MARKERS[results.points.index(point) % len(MARKERS)]


def positions(results: StudyResults) -> dict[Any, float]:
    """Place of each point on the axis. On a logarithmic one log10, with 0 a step to the left of the smallest positive value."""
    if results.axis.scale == "categories":
        return {point: float(i) for i, point in enumerate(results.points)}
    if results.axis.scale == "linear":
        return {point: float(point) for point in results.points}
    logs = np.log10([point for point in results.points if point > 0])
    step = float(np.clip(np.median(np.diff(logs)), 0.3, 1.0)) if len(logs) > 1 else 0.5
    places = dict(zip((point for point in results.points if point > 0), map(float, logs)))
    return {0.0: (float(logs[0]) if len(logs) else 0.0) - step} | places if 0.0 in results.points else places


def swept_axis(axes: Axes, results: StudyResults, *, label: bool, small: bool = False) -> None:
    """Ticks at the swept values, AdamW's timescale below each where it follows from them; a break in a logarithmic axis after 0.

    Args:
      small: one of many panels, without timescales and a name.
    """
    places, axis = positions(results), results.axis
    timescales = (
        not small and not results.existing and (axis.field == DECAY or axis.field == PEAK_LR and all(results.timescale(point) for point in places))
    )
    texts = [axis.text(p) + (f"\n{_short(t) if (t := results.timescale(p)) is not None else '∞'}" if timescales else "") for p in places]
    axes.set_xticks(list(places.values()), texts if label else [""] * len(texts))
    width = max(places.values()) - min(places.values()) or 1.0
    axes.set_xlim(min(places.values()) - 0.09 * width, max(places.values()) + 0.09 * width)
    axes.grid(axis="x", visible=False)
    if axis.scale == "log" and 0.0 in places and len(places) > 1:
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
    if label and not small:
        axes.set_xlabel(axis.label + ("; below: timescale, share of run" if timescales else ""))


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


class Picture(Figure):
    """A figure that a notebook shows by itself, as SVG."""

    def _repr_svg_(self) -> str:
        return render(self, "svg").decode()


def render(picture: Figure, kind: str) -> bytes:
    """A figure as "png" or "svg"; the same figure gives the same bytes."""
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        picture.savefig(out, format=kind, dpi=PNG_DPI, metadata=metadata)
    return out.getvalue()


def panels_below(count: int, height: float) -> tuple[Figure, list[Axes]]:
    drawn = Picture(figsize=(WIDTH, height * count))
    axes = drawn.subplots(count, 1, squeeze=False)[:, 0]
    return drawn, list(axes)


def small_multiples(
    cells: Sequence[tuple[str, str]], *, ticks: Sequence[str] = (), height: float = 1.25, top: float = 0.6
) -> tuple[Figure, list[Axes]]:
    """A wide figure with a small panel for each (row, column): rows named at the left, columns above. Those of one column stand in rows of three.

    The legend of the figure goes above it, the name of the x axis below: `frame_multiples`. Laid out here, because a constrained layout of dozens of
    panels takes seconds.

    Args:
      ticks: texts of the x axis; upright where they are too long to stand side by side.
      height, top: inches of a panel, and of what stands above the first ones.
    """
    rows, columns = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    flowing = len(columns) == 1
    across = 3 if flowing else len(columns)
    places = [divmod(i, across) if flowing else (rows.index(r), columns.index(c)) for i, (r, c) in enumerate(cells)]
    down = max(row for row, _ in places) + 1
    left, gap, below = (0.55, 0.5, 0.5) if flowing else (0.8, 0.44, 0.12)
    width = (WIDE - left - gap * (across - 1) - 0.08) / across
    upright = SMALL_CHARACTER * sum(len(text) + 1 for text in ticks) > width
    bottom = 0.5 + upright * SMALL_CHARACTER * max(map(len, ticks), default=0)
    whole = bottom + top + height * down + below * (down - 1)
    drawn, panels = Picture(figsize=(WIDE, whole)), []
    drawn.set_layout_engine("none")
    for (row, column), (of_row, of_column) in zip(places, cells):
        corner = left + column * (width + gap), whole - top - height - row * (height + below)
        box = (corner[0] / WIDE, corner[1] / whole, width / WIDE, height / whole)
        axes = drawn.add_axes(box, label=", ".join(name.replace("\n", " ") for name in (of_row, of_column) if name))
        axes.tick_params(labelsize=7.5, pad=2, length=2.5)
        axes.tick_params(axis="x", labelrotation=90 if upright else 0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if flowing:
            axes.set_title(of_row.replace("\n", " "))
        if not flowing and row == 0:
            axes.set_title(of_column)
        if not flowing and column == min(c for r, c in places if r == row):
            axes.set_ylabel(of_row, fontweight="bold")
            axes.yaxis.set_label_coords(-0.42 / width, 0.5)
        panels.append(axes)
    return drawn, panels


def lowest(panels: Sequence[Axes]) -> list[bool]:
    """Of every panel of a figure whether none stands below it, so that it holds the labels of the x axis."""
    boxes = [axes.get_position() for axes in panels]
    return [not any(abs(other.x0 - box.x0) < 1e-6 and other.y0 < box.y0 - 1e-6 for other in boxes) for box in boxes]


def frame_multiples(drawn: Figure, handles: Sequence[Artist], label: str) -> None:
    """The legend above small multiples, and the name of their x axis."""
    height = drawn.get_figheight()
    if handles:
        drawn.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=8, handlelength=1.8, columnspacing=1.3, borderaxespad=0.2)
    drawn.supxlabel(label, fontsize=9, color=STYLE["axes.labelcolor"], y=0.05 / height, va="bottom")


def member_panels(results: StudyResults, titles: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Panels with their titles, and one legend of the swept values above the first."""
    drawn, panels = panels_below(len(titles), height)
    for axes, title in zip(panels, titles):
        axes.set_title(title)
    handles = [
        Line2D([], [], color=color(results, p), marker=marker(results, p), label=results.axis.equation(p) + _outcome(results, p))
        for p in results.points
    ]
    legend_above(panels[0], handles)
    return drawn, panels


def _outcome(results: StudyResults, point: Any) -> str:
    """Why a point has no line, where that is its result."""
    states = {m.state for m in results.at(point)}
    return f" ({'/'.join(sorted(states))})" if states & {"diverged", "failed"} else ""


def legend_above(axes: Axes, handles: Sequence[Artist]) -> None:
    """Above the panel, where it covers no data, and below its title."""
    columns = _legend_columns([str(handle.get_label()) for handle in handles])
    axes.set_title(axes.get_title(loc="left"), pad=6 + 13 * -(-len(handles) // columns))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=1.6, columnspacing=1.1, borderaxespad=0.1)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many columns as fit a panel's width; a legend that is wider squeezes the panel."""
    for columns in range(LEGEND_COLUMNS, 1, -1):
        widths = [max(map(len, column), default=0) for column in np.array_split(np.array(labels, dtype=object), columns)]
        if sum(widths) <= LEGEND_CHARACTERS:
            return columns
    return 1


def marked_values(picture: Figure) -> dict[str, list[str]]:
    """Gives every line with markers an id for the SVG. Returns the id → what to show over each marker: the line's name, x and y."""
    found, ticks = {}, {}
    axis = picture.get_supxlabel().split(" (")[0].split(";")[0]
    for axes in reversed(picture.axes):  # panels above the last have its ticks without their texts
        texts = [text.get_text().split("\n")[0] for text in axes.get_xticklabels()]
        ticks |= {round(float(place), 9): text for place, text in zip(axes.get_xticks(), texts) if text}
    for i, axes in reversed(list(enumerate(picture.axes))):
        axis = axes.get_xlabel().split(" (")[0].split(";")[0] or axis
        of_bars = {container[0]: str(container.get_label()) for container in axes.containers if isinstance(container, ErrorbarContainer)}
        for j, line_ in enumerate(axes.lines):
            if line_.get_marker() not in ("None", "", " ", "_", "|", None):
                line_.set_gid(f"values-{i}-{j}")
                names = (str(axes.get_label()), of_bars.get(line_, str(line_.get_label())))  # small panels are named
                named = ", ".join(name for name in names if name and not name.startswith("_"))
                named = f"{named}: " if named else ""
                x, y = np.asarray(line_.get_xdata(), np.float64), np.asarray(line_.get_ydata(), np.float64)
                places = sorted(ticks) if isinstance(axes.xaxis.get_major_locator(), FixedLocator) else []
                nearest = [min(places, key=lambda place: abs(place - a)) if places else None for a in x]  # some markers stand a little to the side
                texts = [f"{axis} {f'{a:.4g}' if place is None else ticks[place]}".strip() for a, place in zip(x, nearest)]
                found[f"values-{i}-{j}"] = [f"{named}{b:.4g} at {text}" for text, b in zip(texts, y)]
    return found


def seed_means(axes: Axes, results: StudyResults, value: Callable[[MemberResults], float | None], color_: str) -> dict[Any, float]:
    """Draws each seed's value faintly where there are several, and returns point → mean."""
    places, means = positions(results), {}
    for point in results.points:
        found = [v for m in results.at(point) if (v := value(m)) is not None]
        if found:
            means[point] = float(np.mean(found))
            if len(found) > 1:
                axes.plot([places[point]] * len(found), found, ".", color=color_, alpha=0.45, markersize=4)
    return means


def task_styles(tasks: Sequence[str], mean: str) -> dict[str, dict[str, Any]]:
    """Task → color and marker of its line; `mean` is the name of their mean, which is drawn in ink."""
    styles: dict[str, dict[str, Any]] = {
        task: {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 0.9} for i, task in enumerate(tasks)
    }
    return styles | {mean: {"color": INK, "marker": "*", "linewidth": 1.6}}


def seed_lines(axes: Axes, results: StudyResults, of_seeds: dict[int, dict[Any, float]], color_: str) -> None:
    """Each pretraining seed as a faint line over the points, where there are several."""
    places = positions(results)
    for values in of_seeds.values() if len(of_seeds) > 1 else ():
        axes.plot([places[point] for point in values], list(values.values()), color=color_, alpha=0.35, linewidth=0.8, zorder=1.5)


def line(axes: Axes, results: StudyResults, means: dict[Any, float], **style) -> None:
    places = positions(results)
    axes.plot([places[point] for point in means], list(means.values()), **style)


def interval_line(axes: Axes, results: StudyResults, rows: list[dict], name: str, *, shift: float = 0.0, **style) -> None:
    places = positions(results)
    width = max(places.values()) - min(places.values())
    x = [places[row[results.axis.field]] + shift * width for row in rows]
    y = np.array([row[name] for row in rows])
    ends = np.array([[row[f"{name}_lower"], row[f"{name}_upper"]] for row in rows])
    ends = np.array([[value if end is None else end for end in pair] for value, pair in zip(y, ends)], np.float64)  # no uncertainty is known
    # The mean of a percentile interval can lie outside it by rounding.
    drawn: dict[str, Any] = {"capsize": 2.5, "elinewidth": 1.1} | style
    axes.errorbar(x, y, yerr=np.maximum([y - ends[:, 0], ends[:, 1] - y], 0.0), **drawn)
