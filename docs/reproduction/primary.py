"""The primary analysis of docs/reproduction/plan.md, recomputed from the report's CSV files with NumPy and SciPy alone.

Command:  python docs/reproduction/primary.py docs/reproduction/tables/reproduction [TASK ...]          (tasks that are left out)

For each size of model: the gain of every seed and weight decay, a mean over the tasks, with the fine-tuning that validation rows chose; its trend over
the useful range of weight decay, by a t test over seeds, with Holm's correction over the sizes; and the gain at a timescale of 0.4 less that without
decay. Beside the trend stands the report's own, which also counts problems as drawn. It was written before any score was read.
"""

import csv
import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

USEFUL = 0.1  # nats above the lowest loss
CONTRAST = 0.4  # timescale, as a share of the run
LEVEL = 0.95

Model = tuple[str, float, int]  # steps, λ, seed


@functools.cache
def rows(tables: Path, name: str) -> list[dict[str, str]]:
    with (tables / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def size_of(row: dict[str, str]) -> str:
    """The steps of a model's pretraining, which stand for its size, or in the third arm for its tokens. A study with one size does not name them."""
    return row.get("train.steps", "728")


def model_of(row: dict[str, str]) -> Model:
    return size_of(row), float(row["weight_decay"]), int(row["seed"])


def gains_by_task(tables: Path) -> dict[str, dict[Model, float]]:
    """Task → model → test accuracy of the chosen fine-tuning less that before."""
    before = {(model_of(row), row["task"]): float(row["pass@1"]) for row in rows(tables, "scores") if row["when"] == "before"}
    found = defaultdict(dict)
    for row in rows(tables, "selected"):
        found[row["task"]][model_of(row)] = float(row["test"]) - before[model_of(row), row["task"]]
    return dict(sorted(found.items()))


def gains(tables: Path, without: Sequence[str] = ()) -> dict[Model, float]:
    """Model → its gain, a mean over the tasks but those left out."""
    of_tasks = [gain for task, gain in gains_by_task(tables).items() if task not in without]
    (models,) = {tuple(gain) for gain in of_tasks}  # every model has every task
    return {model: float(np.mean([gain[model] for gain in of_tasks])) for model in models}


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


@dataclass(frozen=True)
class Size:
    """What is found of the models of one size.

    Attributes:
      gain: [λ, seeds] of all `decays`.
      useful: the λ whose loss is within USEFUL of the lowest.
      trend: of the gain over them: mean, interval, p. None if there is only one.
      contrast: likewise, of the timescale CONTRAST less none.
      reported: the report's verdict on "gain more", with the fine-tunings that were chosen.
      corrected: its p after Holm's correction over the sizes.
    """

    steps: str
    decays: list[float]
    seeds: list[int]
    gain: np.ndarray
    useful: list[float]
    trend: tuple[float, float, float, float] | None
    contrast: tuple[float, float, float, float]
    reported: dict[str, str]
    corrected: float


def analyzed(tables: Path, without: Sequence[str] = ()) -> list[Size]:
    gain, loss, of_run = gains(tables, without), losses(tables), timescales(tables)
    sizes, seeds = sorted({steps for steps, _, _ in gain}, key=int), sorted({seed for _, _, seed in gain})
    reported = [
        next(row for row in rows(tables, "verdicts") if size_of(row) == steps and row["finetune.select"] and "gain more" in row["claim"])
        for steps in sizes
    ]
    found = []
    for steps, row, corrected in zip(sizes, reported, holm([float(row["p"] or 1) for row in reported]), strict=True):
        decays = sorted({decay for size, decay, _ in gain if size == steps})
        table = np.array([[gain[steps, decay, seed] for seed in seeds] for decay in decays])
        lowest = min(loss[steps, decay] for decay in decays)
        useful = [decay for decay in decays if loss[steps, decay] <= lowest + USEFUL]
        within = table[[decays.index(decay) for decay in useful]]
        (at,) = [decay for decay in decays if np.isclose(of_run[steps, decay], CONTRAST, rtol=1e-3)]
        contrast = t_test(table[decays.index(at)] - table[decays.index(0.0)])
        found.append(Size(steps, decays, seeds, table, useful, t_test(trend(within)) if len(useful) > 1 else None, contrast, row, corrected))
    return found


def main(tables: Path, without: Sequence[str] = ()) -> None:
    loss, of_run = losses(tables), timescales(tables)
    print(f"{len(gains_by_task(tables).keys() - set(without))} tasks, {len(gains(tables))} models\n")
    for size in analyzed(tables, without):
        print(f"## {size.steps} steps\n")
        print("| λ | timescale | held-out loss | gain | " + " | ".join(f"seed {seed}" for seed in size.seeds) + " |")
        print("| - " * (4 + len(size.seeds)) + "|")
        for decay, values in zip(size.decays, size.gain):
            each = " | ".join(f"{value:.3f}" for value in values)
            of_model = size.steps, decay
            print(f"| {decay:.4g} | {of_run[of_model]:.3g} | {loss[of_model]:.3f} | {values.mean():.3f} | {each} |")
        print(f"\nUseful range: λ from {size.useful[0]:.4g} to {size.useful[-1]:.4g}.")
        if size.trend is not None:
            print(f"Trend of the gain by hand: {said(size.trend)}.")
        if not without and size.reported["p"]:
            effect, low, high = (float(size.reported[name]) for name in ("effect", "effect_lower", "effect_upper"))
            print(
                f"The report's, with problems drawn too: {effect:+.3f} [{low:+.3f}, {high:+.3f}], p = {float(size.reported['p']):.2g}, "
                f"{size.reported['verdict']}; Holm over the sizes {size.corrected:.2g}."
            )
        print(f"Timescale {CONTRAST} less none: {said(size.contrast)}.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
