"""Studies in memory with known effects and noise, held against the page's own rules. No model is trained, nothing is read.

python tests/report/simulated_study.py            how often each claim gets a verdict where nothing depends on λ, and where something does
"""

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from plasticity_jax.config import GridConfig, ProbeConfig, ReportConfig, StudyConfig, TaskConfig, grid_members
from plasticity_jax.report.optima import Budget, optima_move
from plasticity_jax.report.page import FAILURES
from plasticity_jax.report.results import MemberResults, Outcomes, Score, StudyResults
from plasticity_jax.report.verdicts import verdicts
from plasticity_jax.stages.pretrain import Pretrained
from plasticity_jax.study.power import study_power
from plasticity_jax.study.sweep import study_axis

DECAYS = (0.0, 0.15, 0.75, 3.0)
FLAT = (0.0,) * 4


@dataclass(frozen=True)
class Truth:
    """What a simulated study is made of. Effects are one number per λ, in its order, on top of a value that all share.

    Attributes:
      decays: λ.
      loss, before, after, rank, rank_vo, gap, probe: effects.
      seeds, tuning_seeds: pretraining seeds, and fine-tuning seeds of each.
      problems: rows of each of the two tasks and of the probe set.
      heads: of the model, in four layers.
      seed_noise: standard deviation of a model's accuracies and pseudo-ranks around what its λ gives; of its loss and gap a quarter of it.
      rounding_noise: the same for every fine-tuning, as rounding on another processor gives it.
      problem_noise: how much a problem, whatever the seed, prefers one λ to another; in the units of a logistic curve.
    """

    decays: tuple[float, ...] = DECAYS
    loss: tuple[float, ...] = (0.0, -0.01, 0.06, 0.9)
    before: tuple[float, ...] = FLAT
    after: tuple[float, ...] = FLAT
    rank: tuple[float, ...] = FLAT
    rank_vo: tuple[float, ...] = FLAT
    gap: tuple[float, ...] = FLAT
    probe: tuple[float, ...] = FLAT
    seeds: int = 3
    tuning_seeds: int = 1
    problems: int = 300
    heads: int = 32
    seed_noise: float = 0.02
    rounding_noise: float = 0.01
    problem_noise: float = 0.3


def simulated(truth: Truth, seed: int) -> StudyResults:
    """A study drawn from the truth."""
    rng = np.random.default_rng(seed)
    tasks = ("one", "two")
    config = StudyConfig(
        grid=GridConfig(weight_decay=truth.decays, timescales=None, seeds=tuple(range(truth.seeds))),
        tasks={name: TaskConfig(test_rows=truth.problems) for name in tasks},
        probe=ProbeConfig(sets=("one",)),
        report=ReportConfig(bootstrap_samples=200),
    )
    shapes = {name: _problems(truth, rng) for name in (*tasks, "probe")}
    documents = rng.normal(scale=0.3, size=(2, 80))
    members = [_member(truth, member, shapes, documents, rng) for member in grid_members(config)]
    return StudyResults(Path("simulated"), config, {}, tuple(members), tasks, {}, (), study_axis(config))


def _problems(truth: Truth, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[P] difficulty, and [Λ, P] preference for each λ."""
    return rng.normal(scale=1.5, size=truth.problems), rng.normal(scale=truth.problem_noise, size=(len(truth.decays), truth.problems))


def _right(shape: tuple[np.ndarray, np.ndarray], point: int, shift: float, rng: np.random.Generator) -> np.ndarray:
    """[P] right or wrong; `shift` is in units of accuracy, near one half."""
    difficulty, preference = shape
    slope = 0.175  # mean derivative of the logistic curve over problems of this spread
    return (rng.random(len(difficulty)) < 1 / (1 + np.exp(difficulty - preference[point] - shift / slope))).astype(float)


def _score(shape, point: int, shifts: list[float], rng) -> Score:
    greedy = [_right(shape, point, shift, rng) for shift in shifts]
    outcomes = tuple(Outcomes(found, None, None, 0, None, None) for found in greedy)
    return Score({"pass@1": float(np.mean(greedy))}, np.mean(greedy, axis=0), dict.fromkeys(FAILURES, 0.0), 0.1, (Path("simulated"),), outcomes)


def _member(truth: Truth, member: Any, shapes: dict, documents: np.ndarray, rng: np.random.Generator) -> MemberResults:
    point = truth.decays.index(member.weight_decay)

    def noise(scale: float = 1.0) -> float:
        return float(rng.normal(scale=truth.seed_noise * scale))

    own = noise()
    tuned = [truth.after[point] + own + float(rng.normal(scale=truth.rounding_noise)) for _ in range(truth.tuning_seeds)]
    base, probe = truth.before[point] - 0.3 + noise(0.5), truth.probe[point] + noise()
    ranks = {
        name: {"pseudo_rank": (0.7 + effect[point] + noise() + rng.normal(scale=0.05, size=(4, truth.heads // 4))).tolist()}
        for name, effect in (("W_QK", truth.rank), ("W_VO", truth.rank_vo))
    }
    gap = 0.05 + truth.gap[point] + noise(0.25)
    blocks = {
        side: [
            {"domain": "news" if i % 2 else "wikipedia", "document": i // 4, "record": i, "loss": float(loss), "unigram_loss": 6.0}
            for i, loss in enumerate(documents[which] + which * gap + rng.normal(scale=0.02, size=documents.shape[1]))
        ]
        for which, side in enumerate(("seen", "held_out"))
    }
    losses = [float(np.mean([block["loss"] for block in blocks[side]])) for side in ("seen", "held_out")]
    measured = losses[1] - losses[0]
    sizes = {"seen": losses[0], "held_out": losses[1], "gap": measured, "interval": (measured - 0.1, measured + 0.1)}
    control = {"passes": True, "gap": 0.0, "interval": (-0.1, 0.1)}
    loss = 3.9 + truth.loss[point] + noise(0.25)
    right, layers = _right(shapes["probe"], point, probe, rng), ["embed", "block1"]
    accuracies = dict.fromkeys(("accuracy", "accuracy_norm_free", "accuracy_shuffled", "l2"), [0.0, float(np.mean(right))])
    levels = {"bag_of_words": 0.1, "majority": 0.1, "n_train": 100, "n_test": len(right)}
    found = {
        "spectra": {"": SimpleNamespace(**ranks)},
        "gap": {"": SimpleNamespace(**sizes, blocks=blocks, control=control, seen_early=None, seen_late=None, tokens_per_side=1024)},
        "probe": {"": SimpleNamespace(sets={"one": {"layers": layers, "correct": [[0.0], right]} | accuracies | levels})},
    }
    pretrain = Pretrained(
        diverged=None,
        steps=10,
        tokens=20_000,
        seconds=1.0,
        tokens_per_second=1.0,
        parameters=1000,
        weight_decay=member.weight_decay,
        peak_lr=1e-3,
        lr_times_decay=1e-3 * member.weight_decay,
        timescale_steps=None,
        timescale_share=None,
        decay_table={},
        compute_dtype="float32",
        train_loss=loss,
        held_out={"loss": loss, "bits_per_byte": loss / 2, "domains": {}},
        norms={},
    )
    before = {name: _score(shapes[name], point, [base], rng) for name in ("one", "two")}
    after = {name: _score(shapes[name], point, tuned, rng) for name in ("one", "two")}
    return MemberResults(member, member.weight_decay, "done", "", pretrain, (), before, after, found, {})


def rates(truth: Truth, studies: int, first: int = 0) -> dict[str, Counter]:
    """Claim → how often each verdict was given."""
    found: dict[str, Counter] = {}
    for seed in range(first, first + studies):
        for verdict in verdicts(simulated(truth, seed)):
            found.setdefault(verdict.claim, Counter())[verdict.verdict] += 1
    return found


def move_rates(fewer: Truth, more: Truth, pairs: int, first: int = 0) -> Counter:
    """How often each verdict was given on whether the optima move down from one truth to the other."""
    words = Counter()
    for seed in range(first, first + pairs):
        low, high = simulated(fewer, seed), simulated(more, seed + 1_000_000)
        words[optima_move(Budget("fewer", low, 20.0), Budget("more", high, 140.0), low.tasks).verdict] += 1
    return words


MOVES = {
    "nothing depends on λ": (Truth(loss=FLAT), Truth(loss=FLAT)),
    "the same optima": (Truth(loss=(0.1, 0.0, 0.06, 0.9), after=(0.0, 0.05, 0.1, 0.0)),) * 2,
    "the same optima, sixteen times the noise in one": (
        Truth(loss=(0.02, 0.0, 0.02, 0.9), after=(0.0, 0.05, 0.05, 0.0), seed_noise=0.005),
        Truth(loss=(0.02, 0.0, 0.02, 0.9), after=(0.0, 0.05, 0.05, 0.0), seed_noise=0.08),
    ),
    "the same optima, timescales": (
        Truth(loss=(0.05, 0.01, 0.05, 0.9), after=(0.0, 0.1, 0.06, 0.0)),
        Truth(decays=(0.0, 0.1, 0.3, 1.0), loss=(0.05, 0.02, 0.0, 0.2), after=(0.0, 0.09, 0.09, 0.05)),
    ),
    "both optima move down by one λ": (
        Truth(loss=(0.2, 0.06, 0.0, 0.9), after=(0.0, 0.0, 0.15, 0.0)),
        Truth(loss=(0.2, 0.0, 0.06, 0.9), after=(0.0, 0.15, 0.0, 0.0)),
    ),
}


def _print(title: str, truth: Truth, studies: int) -> None:
    print(f"\n{title}: {truth.seeds} pretraining seeds, {studies} studies")
    for claim, counts in rates(truth, studies).items():
        print(f"  {claim[:74]:74}  " + ", ".join(f"{word} {100 * n / studies:.1f}%" for word, n in counts.most_common()))


def power_table() -> str:
    """Markdown: power of a study of three tasks of 300 problems, by seed deviation and number of seeds."""
    lines = ["| seed deviation | seeds | power at 0.02 | power at 0.05 | smallest difference seen with 80% |", "| - | - | - | - | - |"]
    for deviation in (0.005, 0.01, 0.02, 0.04):
        for seeds in (2, 3, 5, 10):
            config = StudyConfig(
                grid=GridConfig(weight_decay=DECAYS, timescales=None, seeds=tuple(range(seeds))),
                tasks={name: TaskConfig(test_rows=300) for name in ("one", "two", "three")},
            )
            found = study_power(config, deviation)
            at = " | ".join(f"{row['power']:.0%}" for row in found["differences"])
            lines.append(f"| {deviation:g} | {seeds} | {at} | {found['smallest_difference']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags = argparse.ArgumentParser()
    flags.add_argument("--studies", type=int, default=400)
    flags.add_argument("--power", action="store_true", help="print the table of power instead; it is computed, not simulated")
    arguments = flags.parse_args()
    if arguments.power:
        print(power_table())
    else:
        for seeds in (1, 3, 5):
            _print("nothing depends on λ but the loss", Truth(seeds=seeds), arguments.studies)
            _print("nothing depends on λ", Truth(seeds=seeds, loss=FLAT), arguments.studies)
        _print("704 heads", Truth(heads=704), arguments.studies)
        for title, (fewer, more) in MOVES.items():
            for seeds in (3, 5, 8):
                counts = move_rates(replace(fewer, seeds=seeds), replace(more, seeds=seeds), arguments.studies)
                print(f"{title}, {seeds} seeds: " + ", ".join(f"{word} {100 * n / arguments.studies:.1f}%" for word, n in counts.most_common()))
