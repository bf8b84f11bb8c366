"""The primary analysis of docs/reproduction/plan.md, recomputed from the report's CSV files with NumPy and SciPy alone.

Command:  python docs/reproduction/primary.py docs/reproduction/report/tables

For each size of model: the gain of every seed and weight decay, a mean over the tasks, with the fine-tuning that validation rows chose; its trend over
the useful range of weight decay, by a t test over seeds, with Holm's correction over the sizes; and the gain at a timescale of 0.4 less that without
decay. Beside the trend stands the report's own, which also counts problems as drawn. It was written before any score was read.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

USEFUL = 0.1  # nats above the lowest loss
CONTRAST = 0.4  # timescale, as a share of the run
LEVEL = 0.95


def rows(tables: Path, name: str) -> list[dict[str, str]]:
    with (tables / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def size_of(row: dict[str, str]) -> str:
    """The steps of a model's pretraining, which stand for its size, or in the third arm for its tokens. A study with one size does not name them."""
    return row.get("train.steps", "728")


def gains(tables: Path) -> dict[tuple[str, float, int], float]:
    """(steps, λ, seed) → test accuracy of the chosen fine-tunings less that before, a mean over tasks."""
    before = {
        (size_of(row), float(row["weight_decay"]), int(row["seed"]), row["task"]): float(row["pass@1"])
        for row in rows(tables, "scores")
        if row["when"] == "before"
    }
    found = defaultdict(list)
    for row in rows(tables, "selected"):
        model = size_of(row), float(row["weight_decay"]), int(row["seed"])
        found[model].append(float(row["test"]) - before[*model, row["task"]])
    assert len({len(values) for values in found.values()}) == 1, "every model has every task"
    return {model: float(np.mean(values)) for model, values in found.items()}


def losses(tables: Path) -> dict[tuple[str, float], float]:
    """(steps, λ) → held-out loss, a mean over seeds."""
    found = defaultdict(dict)
    for row in rows(tables, "members"):
        found[size_of(row), float(row["weight_decay"])][row["seed"]] = float(row["held_out_loss"])
    return {model: float(np.mean(list(by_seed.values()))) for model, by_seed in found.items()}


def timescales(tables: Path) -> dict[tuple[str, float], float]:
    """(steps, λ) → AdamW's timescale as a share of the run."""
    return {(size_of(row), float(row["weight_decay"])): float(row["timescale_share"] or "inf") for row in rows(tables, "members")}


def t_test(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, its interval, and the two-sided p of no difference; one number per seed."""
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(LEVEL)
    return float(differences.mean()), float(interval.low), float(interval.high), float(found.pvalue)


def trend(gain: np.ndarray) -> np.ndarray:
    """[seeds] change from the first to the last λ along a line over ranks, of gains [λ, seeds]."""
    ranks = np.arange(len(gain))
    return np.polyfit(ranks, gain, 1)[0] * (len(gain) - 1)


def holm(p: list[float]) -> list[float]:
    order, adjusted, largest = np.argsort(p), [0.0] * len(p), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, p[index] * (len(p) - place)))
        adjusted[index] = largest
    return adjusted


def said(found: tuple[float, float, float, float]) -> str:
    return f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}], p = {found[3]:.2g}"


def main(tables: Path) -> None:
    gain, loss = gains(tables), losses(tables)
    of_run = timescales(tables)
    print(f"{len({row['task'] for row in rows(tables, 'selected')})} tasks, {len(gain)} models\n")
    sizes = sorted({steps for steps, _, _ in gain}, key=int)
    seeds = sorted({seed for _, _, seed in gain})
    reported = [
        next(row for row in rows(tables, "verdicts") if size_of(row) == steps and row["finetune.select"] and "gain more" in row["claim"])
        for steps in sizes
    ]
    for steps, row, corrected in zip(sizes, reported, holm([float(row["p"]) for row in reported]), strict=True):
        decays = sorted({decay for size, decay, _ in gain if size == steps})
        table = np.array([[gain[steps, decay, seed] for seed in seeds] for decay in decays])
        lowest = min(loss[steps, decay] for decay in decays)
        useful = [decay for decay in decays if loss[steps, decay] <= lowest + USEFUL]
        print(f"## {steps} steps\n")
        print("| λ | timescale | held-out loss | gain | " + " | ".join(f"seed {seed}" for seed in seeds) + " |")
        print("| - " * (4 + len(seeds)) + "|")
        for decay, values in zip(decays, table):
            each = " | ".join(f"{value:.3f}" for value in values)
            print(f"| {decay:.4g} | {of_run[steps, decay]:.3g} | {loss[steps, decay]:.3f} | {values.mean():.3f} | {each} |")
        within = table[[decays.index(decay) for decay in useful]]
        print(f"\nUseful range: λ from {useful[0]:.4g} to {useful[-1]:.4g}.")
        if len(useful) > 1:
            print(f"Trend of the gain by hand: {said(t_test(trend(within)))}.")
        print(
            f"The report's, with problems drawn too: {float(row['effect']):+.3f} [{float(row['effect_lower']):+.3f}, {float(row['effect_upper']):+.3f}], "
            f"p = {float(row['p']):.2g}, {row['verdict']}; Holm over the sizes {corrected:.2g}."
        )
        (at,) = [decay for decay in decays if np.isclose(of_run[steps, decay], CONTRAST, rtol=1e-3)]
        print(f"Timescale {CONTRAST} less none: {said(t_test(table[decays.index(at)] - table[decays.index(0.0)]))}.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
