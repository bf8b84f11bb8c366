"""The figures of docs/reproduction/README.md, from the CSV files of the reports alone.

Command:  python docs/reproduction/figures.py          (reads docs/reproduction/tables, writes docs/reproduction/figures)

Points are means over pretraining seeds, bars 95% intervals of a t test over them, thin lines the seeds. The fine-tuning rate of every model and task is
the one that validation rows chose, unless a figure says otherwise. Gray: outside of the useful range, where pretraining has lost more than 0.1 nats.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from primary import USEFUL, Model, gains, gains_by_task, losses, model_of, rows, t_test, timescales

from plasticity_jax.report.drawing import MARKERS, REFERENCE, SERIES, STYLE

HERE = Path(__file__).parent
EQUAL = 1e-9  # numbers that are nearer are one
MAIN, MATRICES, TOKENS = "reproduction", "reproduction-matrices", "reproduction-tokens"
SIZES = {"728": "0.15M parameters", "1306": "0.27M parameters"}
LENGTHS = {"431": "20 tokens per parameter", "3020": "140 tokens per parameter"}
AXIS = "weight decay, as AdamW's timescale (share of the run)"


def means(found: Iterable[tuple[Model, float]]) -> dict[Model, float]:
    """The mean of what belongs to one model."""
    of_model = defaultdict(list)
    for key, value in found:
        of_model[key].append(value)
    return {key: float(np.mean(values)) for key, values in of_model.items()}


def of_models(tables: Path, name: str, column: str, **wanted: str) -> dict[Model, float]:
    """A column of a table, for each model a mean over the rows in which the other columns are as wanted; no model whose cell is empty."""
    chosen = (row for row in rows(tables, name) if row[column] and all(row[key] == value for key, value in wanted.items()))
    return means((model_of(row), float(row[column])) for row in chosen)


def of_size(values: Mapping[Model, float], size: str) -> dict[float, dict[int, float]]:
    """λ → seed → value, in the order of λ."""
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for (steps, decay, seed), value in sorted(values.items()):
        if steps == size:
            found[decay][seed] = value
    return found


def curve(
    axes: Axes,
    values: Mapping[float, Mapping[int, float]],
    label: str,
    number: int = 0,
    *,
    places: Mapping[float, int] | None = None,
    shift: float = 0.0,
) -> None:
    """Means over seeds with their intervals.

    Args:
      values: λ → seed → value.
      places: λ → place on the axis, where some λ have no value; by default those of `values` stand side by side. A λ with one seed is not shown.
    """
    places = places or {decay: place for place, decay in enumerate(values)}
    shown = [decay for decay, of_seed in values.items() if len(of_seed) > 1]
    at = np.array([places[decay] for decay in shown]) + shift
    found = np.array([interval(np.array(list(values[decay].values()))) for decay in shown])
    ends = np.abs(found[:, 1:].T - found[:, 0])
    axes.errorbar(at, found[:, 0], ends, color=SERIES[number], marker=MARKERS[number], label=label, elinewidth=1, capsize=2)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """A mean and the ends of its interval; of equal values none is wider than a point."""
    return (values[0],) * 3 if np.ptp(values) < EQUAL else t_test(values)[:3]


def seed_lines(axes: Axes, values: Mapping[float, Mapping[int, float]], number: int = 0) -> None:
    """A thin line per seed."""
    for seed in sorted({seed for of_seed in values.values() for seed in of_seed}):
        axes.plot([of_seed[seed] for of_seed in values.values()], color=SERIES[number], alpha=0.3, linewidth=0.8)


def decay_axis(axes: Axes, tables: Path, size: str, decays: Iterable[float], *, label: bool = True) -> None:
    """Weight decays side by side, named by their timescale; gray where pretraining has lost more than the useful range allows."""
    of_run, loss, decays = timescales(tables), losses(tables), list(decays)
    timescale_axis(axes, ["none" if decay == 0 else f"{of_run[size, decay]:.3g}" for decay in decays], label=label)
    lowest = min(loss[size, decay] for decay in decays)
    for place, decay in enumerate(decays):
        if loss[size, decay] > lowest + USEFUL:
            axes.axvspan(place - 0.5, place + 0.5, color=REFERENCE, alpha=0.15, linewidth=0)


def timescale_axis(axes: Axes, names: list[str], *, label: bool) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.grid(axis="x", visible=False)
    if label:
        axes.set_xlabel(AXIS)


def panels(count_rows: int, columns: int, height: float = 2.1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(9, height * count_rows))
    return figure, figure.subplots(count_rows, columns, squeeze=False)


def draw_gain(tables: Path) -> Figure:
    """The answer: the gain from fine-tuning above, the held-out loss below."""
    figure, grid = panels(2, 2)
    loss = of_models(tables, "members", "held_out_loss")
    for column, (size, title) in zip(grid.T, SIZES.items()):
        gain = of_size(gains(tables), size)
        for number, (axes, values) in enumerate(zip(column, (gain, of_size(loss, size)))):
            seed_lines(axes, values, number)
            curve(axes, values, "", number)
        column[0].set_title(title)
        for axes, last in zip(column, (False, True)):
            decay_axis(axes, tables, size, gain, label=last)
    grid[0, 0].set_ylabel("gain from fine-tuning")
    grid[1, 0].set_ylabel("held-out loss (nats/token)")
    return figure


def draw_tasks(tables: Path) -> Figure:
    """The gain of each task."""
    of_tasks = gains_by_task(tables)
    figure, grid = panels(len(SIZES), len(of_tasks), 1.9)
    for line, (size, title) in zip(grid, SIZES.items()):
        for axes, (task, of_task) in zip(line, of_tasks.items()):
            gain = of_size(of_task, size)
            seed_lines(axes, gain)
            curve(axes, gain, task)
            axes.set_title(task)
            decay_axis(axes, tables, size, gain, label=False)
            axes.tick_params(axis="x", labelsize=6.5)
        line[0].set_ylabel(f"gain, {title.split()[0]}")
    figure.supxlabel(AXIS, fontsize=9)
    return figure


def draw_rates(tables: Path) -> Figure:
    """The mean accuracy at each fine-tuning rate, and with the one that validation rows chose."""
    figure, grid = panels(1, 2, 2.8)
    scores = [row for row in rows(tables, "scores") if row["when"] == "after"]
    chosen = of_models(tables, "selected", "test")
    for axes, (size, title) in zip(grid[0], SIZES.items()):
        for number, rate in enumerate(sorted({row["finetune.peak_lr"] for row in scores}, key=float), 1):
            at_rate = means((model_of(row), float(row["pass@1"])) for row in scores if row["finetune.peak_lr"] == rate)
            curve(axes, of_size(at_rate, size), f"rate {float(rate):g}", number, shift=0.05 * number)
        curve(axes, of_size(chosen, size), "chosen on validation rows")
        axes.set_title(title)
        decay_axis(axes, tables, size, of_size(chosen, size))
    grid[0, 0].set_ylabel("accuracy after fine-tuning")
    grid[0, 0].legend()
    return figure


def draw_inside(tables: Path) -> Figure:
    """Ranks, probes and the gap between seen and held-out text."""
    figure, grid = panels(len(SIZES), 3, 2.2)
    of_base = {"finetuned_on": "(base)"}
    ranks = {product: of_models(tables, "ranks", "pseudo_rank", product=product, **of_base) for product in ("W_QK", "W_VO")}
    sets = sorted({row["set"] for row in rows(tables, "probes")})
    probes = {
        name: means((model_of(r), float(r["accuracy"])) for r in rows(tables, "probes") if r["set"] == name and r["layer"] != "embed")
        for name in sets
    }
    gap = {"held-out less seen": of_models(tables, "gap", "gap")}
    for line, (size, title) in zip(grid, SIZES.items()):
        places = {decay: place for place, decay in enumerate(of_size(gap["held-out less seen"], size))}
        for axes, found, label in zip(line, (ranks, gap, probes), ("pseudo-rank", "gap (nats/token)", "probe accuracy")):
            for number, (name, values) in enumerate(found.items()):
                curve(axes, of_size(values, size), name, number, places=places, shift=0.05 * number)
            decay_axis(axes, tables, size, places, label=False)
            axes.set_ylabel(label)
            axes.legend()
        line[0].set_title(title)
    figure.supxlabel(AXIS, fontsize=9)
    return figure


def draw_arms(tables: Path, matrices: Path, tokens: Path) -> Figure:
    """The second arms: what is decayed, and for how long is trained."""
    figure, grid = panels(2, 2)
    other = of_size(gains(matrices), "728")
    seeds = {seed for of_seed in other.values() for seed in of_seed}
    same = {
        decay: {seed: value for seed, value in of_seed.items() if seed in seeds}
        for decay, of_seed in of_size(gains(tables), "728").items()
        if decay in other
    }
    curve(grid[0, 0], same, "all parameters")
    curve(grid[0, 0], other, "matrices only", 1, shift=0.06)
    for number, (study, name) in enumerate(((tables, "all parameters"), (matrices, "matrices only"))):
        found = of_size({key: loss for key, loss in of_models(study, "members", "held_out_loss").items() if key[2] in seeds}, "728")
        curve(grid[1, 0], {decay: found[decay] for decay in other}, name, number, shift=0.06 * number)
    for axes, last in zip(grid[:, 0], (False, True)):
        decay_axis(axes, matrices, "728", other, label=last)
    gain, loss = gains(tokens), of_models(tokens, "members", "held_out_loss")
    for number, (size, name) in enumerate(LENGTHS.items()):
        for axes, values in zip(grid[:, 1], (gain, loss)):
            curve(axes, {place: of_seed for place, of_seed in enumerate(of_size(values, size).values())}, name, number, shift=0.06 * number)
    for axes, last in zip(grid[:, 1], (False, True)):
        timescale_axis(axes, ["none", "0.4", "0.1"], label=last)
    grid[0, 0].set_title("What is decayed (0.15M)")
    grid[0, 1].set_title("Tokens per parameter (0.09M)")
    grid[0, 0].set_ylabel("gain from fine-tuning")
    grid[1, 0].set_ylabel("held-out loss (nats/token)")
    for axes in grid[0]:
        axes.legend()
    return figure


def main(tables: Path, out: Path) -> None:
    with matplotlib.rc_context(STYLE):
        own = tables / MAIN
        drawn = {"gain": draw_gain(own), "tasks": draw_tasks(own), "rates": draw_rates(own), "inside": draw_inside(own)}
        drawn["arms"] = draw_arms(own, tables / MATRICES, tables / TOKENS)
        out.mkdir(exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
            figure.savefig(out / f"{name}.png", dpi=150, metadata={"Software": None})
            print(out / f"{name}.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3])) if len(sys.argv) == 3 else main(HERE / "tables", HERE / "figures")
