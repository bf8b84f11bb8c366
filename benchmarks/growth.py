"""How a training step grows: tokens per second and memory against parameters, sequence length, members and vocabulary, and members of every size.

Command: python benchmarks/growth.py          (writes docs/figures/growth.svg and members.svg too)

One thing grows at a time, the others stay those of a model of two million parameters with 2,048 tokens in a step; members grow at each size of model.
Memory is the compiler's count: arguments, temporaries and outputs, without what is donated. float32, one device, layers not in a loop, every point the
median of its rounds; what grows along one axis is measured in turns. A program that would take more than half of the memory is left out.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from side_by_side import ROOT, finish

from plasticity_jax.config import ModelConfig, StudyConfig, TrainConfig
from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.flops import flops_per_token
from plasticity_jax.model.transformer import count_params, init_params
from plasticity_jax.parallel.allocator import keep_freed_memory
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.train.check import program_bytes
from plasticity_jax.train.pretrain import step_settings
from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, stack

ROUNDS, TOKENS, SEQ_LEN = 2, 2048, 256
FIGURES = ROOT / "docs" / "figures"


def llama(d_model: int, n_layers: int, vocab_size: int = 2048) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_heads=d_model // 32, n_kv_heads=d_model // 64, d_ff=8 * d_model // 3 // 8 * 8
    )


BASE = llama(192, 3)
SIZES = (llama(64, 5), BASE, llama(320, 3), llama(448, 5), llama(576, 7))
MEMBERS = (1, 2, 4, 8)
TIMES = "times one by one"


@dataclasses.dataclass(frozen=True)
class Point:
    """A step: what grows, and how large it is."""

    axis: str
    size: int
    model: ModelConfig = BASE
    seq_len: int = SEQ_LEN
    members: int = 1


POINTS = (
    *(Point("parameters", count_params(model), model) for model in SIZES),
    *(Point("sequence length", length, seq_len=length) for length in (64, 128, 256, 512, 1024, 2048)),
    *(Point("members", members, model, members=members) for model in SIZES for members in MEMBERS),
    *(Point("vocabulary", size, dataclasses.replace(BASE, vocab_size=size)) for size in (512, 2048, 8192, 32768)),
)


class Step:
    """A compiled step of a point, and its state."""

    def __init__(self, point: Point):
        train = TrainConfig(batch_size=TOKENS // point.seq_len, seq_len=point.seq_len, compute_dtype="float32")
        config = StudyConfig(model=point.model, train=train)
        mesh = make_mesh(config.mesh)
        settings = step_settings(config, mesh)
        members = point.members > 1
        hyper: Any = hyper_parameters(weight_decay=0.1, peak_lr=1e-3, warmup=10, total=100)
        state: Any = initial_state(settings, init_params(point.model, 0))
        if members:
            state, hyper = stack([state] * point.members), stack([hyper] * point.members)
        batch = as_batch(np.random.default_rng(0).integers(0, point.model.vocab_size, (train.batch_size, train.seq_len + 1)))
        start = time.perf_counter()
        self._program = compile_train_step(settings, mesh, members=members).lower(state, batch, hyper).compile()
        self.compile_seconds = time.perf_counter() - start  # next to nothing for a step that another axis has compiled
        self.memory = program_bytes(self._program.memory_analysis(), "cpu")
        self._state, self._batch, self._hyper = state, batch, hyper

    def seconds(self) -> float:
        start = time.perf_counter()
        self._state, metrics = self._program(self._state, self._batch, self._hyper)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start


def measured(points: Sequence[Point]) -> list[dict]:
    """A row for each point of an axis, in turns."""
    half, steps = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2, []
    for point in points:
        if point.members == 1 or point.members * steps[0].memory < half:
            steps.append(Step(point))
    taken = [[step.seconds() for step in steps] for _ in range(ROUNDS + 1)][1:]
    rows = []
    for i, (point, step) in enumerate(zip(points, steps)):
        speed = point.members * TOKENS / statistics.median(round_[i] for round_ in taken)
        rows.append(
            {
                point.axis: point.size,
                "tokens/s": speed,
                "model GFLOP/s": speed * flops_per_token(point.model, point.seq_len) / 1e9,
                "memory, MB": step.memory / 1e6,
                "compile, s": step.compile_seconds if step.compile_seconds > 0.1 else None,
            }
        )
    return rows


def members_of(model: ModelConfig, rows: list[dict]) -> list[dict]:
    """Of a model's rows along the members: how many times as fast as one after the other they are in one program."""
    about = {"parameters": count_params(model)}
    return [
        about | {name: row[name] for name in ("members", "tokens/s", "memory, MB")} | {TIMES: row["tokens/s"] / rows[0]["tokens/s"]} for row in rows
    ]


def draw_members(rows: list[dict]) -> None:
    """One line per size of model: above 1, one program is faster than member by member."""
    import matplotlib
    from matplotlib.figure import Figure

    from plasticity_jax.report.drawing import SERIES, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6))
        panel = figure.subplots()
        panel.axhline(1, color="0.6", linewidth=1)
        for model, color in zip(SIZES, SERIES):
            own = [row for row in rows if row["parameters"] == count_params(model)]
            panel.semilogx([row["members"] for row in own], [row[TIMES] for row in own], marker="o", color=color, label=short(count_params(model)))
        panel.set_xticks(MEMBERS, [str(members) for members in MEMBERS])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("members in one program")
        panel.set_ylabel("times as fast as one by one")
        panel.legend(title="parameters")
        save(figure, "members.svg")


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, metadata={"Date": None})


def draw(tables: dict[str, list[dict]]) -> None:
    """One column per axis: speed above, memory below; all logarithmic, so that a straight line is a power law and its bend is where another one begins."""
    import matplotlib
    from matplotlib.figure import Figure

    from plasticity_jax.report.drawing import SERIES, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2))
        panels = figure.subplots(2, len(tables), sharex="col", sharey="row")
        for column, (axis, rows) in zip(panels.T, tables.items()):
            sizes = [row[axis] for row in rows]
            for panel, name, color in zip(column, ("tokens/s", "memory, MB"), SERIES):
                panel.loglog(sizes, [row[name] for row in rows], marker="o", color=color)
            column[1].set_xlabel(axis)
            column[1].set_xticks(sizes, [short(size) for size in sizes])
            column[1].minorticks_off()
        panels[0, 0].set_ylabel("tokens/s")
        panels[1, 0].set_ylabel("memory (MB)")
        panels[1, 0].set_yticks([200, 500, 1000, 2000], ["200", "500", "1,000", "2,000"])
        save(figure, "growth.svg")


def short(size: int) -> str:
    return f"{size / 1e6:.2g}M" if size >= 1e5 else f"{size:,}"


def main() -> None:
    keep_freed_memory()
    found: dict[tuple[str, ModelConfig | None], list[Point]] = {}
    for point in POINTS:  # members are compared with those of their own size
        found.setdefault((point.axis, point.model if point.axis == "members" else None), []).append(point)
    rows = {key: measured(points) for key, points in found.items()}
    tables = {axis: own for (axis, model), own in rows.items() if model in (None, BASE)}
    draw(tables)
    members = [row for (_, model), own in rows.items() if model is not None for row in members_of(model, own)]
    draw_members(members)
    finish("Growth", {f"Against {axis}": own for axis, own in tables.items()} | {"Members of every size": members})


if __name__ == "__main__":
    main()
