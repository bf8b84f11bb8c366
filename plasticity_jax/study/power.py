"""Power of a study before it is paid for: which differences in accuracy between two weight decays its claims would see."""

from typing import Any

from plasticity_jax.analysis.statistics import detectable, t_power, units_needed
from plasticity_jax.config import StudyConfig, grid_seeds
from plasticity_jax.config.recipes import ALL_ROWS
from plasticity_jax.errors import UserError

# Assumed of a model's accuracy, a mean over tasks, between pretraining seeds. Rounding on another processor alone moved one task of the default study
# (addition at λ = 0: 0.803, 0.850, 0.887) by a deviation of 0.042, so a mean of three tasks by 0.024.
SEED_DEVIATION = 0.02
# Variance of a problem's difference between two models of a seed: accuracies near 0.7, outcomes correlated by one half.
PROBLEM_VARIANCE = 2 * 0.7 * 0.3 * 0.5
ASSUMED_ROWS = 1000  # of a task that takes all of its test rows, whose number only its files know
POWER = 0.8
DIFFERENCES = (0.02, 0.05)


def study_power(config: StudyConfig, seed_deviation: float | None = None) -> dict[str, Any]:
    """What a study of this config would see of a difference in accuracy after fine-tuning, as its claims test it: a t test over pretraining seeds.

    A trend over three or four evenly spaced λ has the power of the difference of two.

    Args:
      seed_deviation: of a model's accuracy, a mean over tasks, between pretraining seeds; SEED_DEVIATION by default.
    Returns:
      "pretraining_seeds", "problems" (of all tasks), "assumed_rows" (tasks whose number is assumed), "seed_deviation", "problem_deviation" (of a difference, from the choice of problems), "deviation"
      (of a paired difference between seeds), "smallest_difference" (seen with probability 0.8; None with one seed), and "differences": rows with
      "difference", "power" and "seeds_needed" for a power of 0.8 (None above 1000).
    Raises:
      UserError: the deviation is negative, or the config has no task.
    """
    noise = SEED_DEVIATION if seed_deviation is None else seed_deviation
    if not 0 <= noise < float("inf"):
        raise UserError(f"--seed-deviation={noise} must be 0 or more; it is a standard deviation of accuracies, such as 0.02.")
    if not config.tasks:
        raise UserError("tasks={} leaves no accuracy to compare; give the config a task.")
    unknown = [name for name, task in config.tasks.items() if task.test_rows >= ALL_ROWS]
    seeds, rows = len(grid_seeds(config)), [ASSUMED_ROWS if name in unknown else task.test_rows for name, task in config.tasks.items()]
    problems = (PROBLEM_VARIANCE * sum(1 / count for count in rows) / len(rows) ** 2) ** 0.5
    deviation = (2 * noise**2 + problems**2) ** 0.5
    return {
        "pretraining_seeds": seeds,
        "problems": sum(rows),
        "assumed_rows": unknown,
        "seed_deviation": noise,
        "problem_deviation": problems,
        "deviation": deviation,
        "smallest_difference": detectable(deviation, seeds, POWER) if seeds > 1 else None,
        "differences": [
            {"difference": size, "power": t_power(size, deviation, seeds), "seeds_needed": units_needed(size, deviation, POWER)}
            for size in DIFFERENCES
        ],
    }


def power_lines(found: dict[str, Any]) -> list[str]:
    """`study_power` in words, one line each."""
    seeds = found["pretraining_seeds"]
    assumed = f", {ASSUMED_ROWS:,} assumed of each of {', '.join(found['assumed_rows'])}" if found["assumed_rows"] else ""
    lines = [
        f"{seeds} pretraining seed{'s' if seeds > 1 else ''}, {found['problems']:,} problems over all tasks{assumed}",
        f"assumed: a model's mean accuracy deviates by {found['seed_deviation']:.3f} between seeds (--seed-deviation); the choice of problems adds "
        f"{found['problem_deviation']:.3f} to a difference (accuracies near 0.7, outcomes of two models correlated by 0.5)",
    ]
    if found["smallest_difference"] is None:
        lines.append("one pretraining run: no verdict, whatever the difference; set grid.seeds to two or more")
    else:
        lines.append(f"smallest difference seen with {POWER:.0%} power: {found['smallest_difference']:.3f}")
    for row in found["differences"]:
        needed = row["seeds_needed"]
        wanted = f"{needed} seeds are needed" if needed is not None else "more than 1000 seeds are needed"
        lines.append(f"a difference of {row['difference']:.2f}: power {row['power']:.0%}; for {POWER:.0%}, {wanted}")
    return lines
