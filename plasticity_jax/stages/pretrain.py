"""Pretrain: the base model of every member of the grid."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import Member, StudyConfig, result_fields
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.init import init_run
from plasticity_jax.stages.prepare import corpus_run
from plasticity_jax.stages.stage import Batched, Context, Figure, Knob, Plan, Planned, Program, Rows, Stage, Table, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.report.results import StudyResults


@dataclass(frozen=True)
class Pretrained:
    """What `train.pretrain.pretrain` returns for a member; see there."""

    diverged: str | None
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    parameters: int
    weight_decay: float
    peak_lr: float
    lr_times_decay: float
    timescale_steps: float | None
    timescale_share: float | None
    decay_table: dict[str, bool]
    compute_dtype: str
    train_loss: float | None
    held_out: dict[str, Any] | None
    norms: dict[str, float]
    mfu: float | None = None


def pretrain_run(config: StudyConfig, member: Member) -> Run:
    """The base model of a member of the grid. Members that differ in their fine-tuning only share it."""
    fields = {
        "train": result_fields(config.train),
        "decay": result_fields(config.decay),
        "isolate_documents": config.data.isolate_documents,
        "weight_decay": member.weight_decay,
        "seed": member.seed,
    }
    parents = {"corpus": corpus_run(config).id, "init": init_run(config, member.seed).id}
    return STAGE.new_run(config, member.base, fields, parents, member=member.base, seed=member.seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    return ((own, pretrain_run(own, member)) for own, member in plan.members if member.model is None)


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    """Refuses batches and kernels that the devices do not take, and a study beyond its budget."""
    from plasticity_jax.train.check import check_devices, refuse_over_budget

    check_devices(config)
    if config.max_device_hours is not None:
        refuse_over_budget(config)


def run(context: Context) -> Pretrained | None:
    """Trains one member."""
    return run_batch([context])[0]


def run_batch(contexts: Sequence[Context]) -> list[Pretrained | None]:
    """Trains members that differ in traced hyperparameters only as one program."""
    from plasticity_jax.train.pretrain import MemberRun, pretrain

    members = [MemberRun(c.run.name, c.directory.path, c.config, c.run.fields["weight_decay"], c.directory.provenance) for c in contexts]
    first = contexts[0]
    found = pretrain(members, seed=first.seed, corpus=first.parents["corpus"], init=first.parents["init"])
    return [Pretrained(**facts) if facts else None for facts in found]


def _program(run: Run) -> str:
    """What runs of one compiled program have in common: all but the traced hyperparameters (see `train.step.hyper_parameters`)."""
    train = {name: value for name, value in run.fields["train"].items() if name not in ("peak_lr", "warmup_fraction")}
    fields = {name: value for name, value in run.fields.items() if name != "weight_decay"}
    return to_json([fields | {"train": train}, run.parents])


def _bytes(config: StudyConfig, mesh: "Mesh") -> int:
    from plasticity_jax.train.memory import training_bytes
    from plasticity_jax.train.pretrain import step_settings

    return training_bytes(step_settings(config, mesh), mesh, config.train.batch_size, config.train.seq_len)


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.train.check import lower_step
    from plasticity_jax.train.pretrain import step_settings
    from plasticity_jax.train.step import state_bytes

    train = config.train
    held = sum(state_bytes(step_settings(config, mesh), mesh, members=members).values())
    what = f"training step, {train.batch_size} x {train.seq_len}"
    yield Program(what, lambda own: lower_step(own, mesh, members), training_knobs(config, mesh, "train"), held, way_out="lower train.seq_len")


def training_knobs(config: StudyConfig, mesh: "Mesh", section: str) -> tuple[Knob, Knob]:
    """More parts of a batch of a section, then more remat, which all training shares."""
    from plasticity_jax.parallel.batches import part_counts

    recipe, remat = getattr(config, section), ("none", "dots", "full")
    parts = tuple(parts for parts in part_counts(mesh, recipe.batch_size) if parts > recipe.grad_accum_steps)
    return Knob(f"{section}.grad_accum_steps", parts), Knob("train.remat", remat[remat.index(config.train.remat) + 1 :])


def _work(ahead: Ahead) -> Iterable[Work]:
    from plasticity_jax.train.check import pretraining_flops

    train = ahead.config.train
    yield Work(flops=pretraining_flops(ahead.config), tokens=train.steps * train.batch_size * train.seq_len)


# ------------------------------------------------------------------------------------------------------------------------------ report


def _member_rows(results: "StudyResults") -> Rows:
    """What each member is and what its pretraining cost: λ, further swept fields, timescale, tokens, time, held-out loss, state."""
    rows = []
    for m in results.members:
        found: Any = m.pretrain
        held_out = m.held_out or {}
        rows.append(
            member_row(
                m,
                lr_times_decay=found.lr_times_decay if found else None,
                timescale_steps=found.timescale_steps if found else None,
                timescale_share=m.member.timescale,
                tokens=found.tokens if found else None,
                tokens_per_parameter=found.tokens / found.parameters if found else None,
                tokens_per_second=found.tokens_per_second if found else None,
                mfu=found.mfu if found else None,
                seconds=found.seconds if found else None,
                train_loss=number(found.train_loss) if found else None,
                held_out_loss=number(held_out.get("loss")),
                perplexity=_perplexity(held_out.get("loss")),
                bits_per_byte=number(held_out.get("bits_per_byte")),
                state=m.state,
                reason=m.reason,
            )
        )
    return rows


def _curve_rows(results: "StudyResults") -> Rows:
    """Training and held-out loss by step."""
    return [
        member_row(
            m,
            step=row["step"],
            tokens=number(row.get("tokens")),
            loss=number(row.get("loss")),
            held_out_loss=_curve_held_out(row),
            lr=number(row.get("lr")),
        )
        for m in results.members
        for row in m.curve
    ]


def _curve_held_out(row: dict[str, Any]) -> float | None:
    return number(row["held_out"].get("loss")) if isinstance(row.get("held_out"), dict) else None


def _held_out_rows(results: "StudyResults") -> Rows:
    """Final held-out loss, over all domains ("all") and per domain."""
    rows = []
    for m in results.members:
        if m.parameters is not None:
            held_out = m.held_out or {"domains": {}}
            for domain, found in [("all", held_out), *sorted(held_out["domains"].items())]:
                values = {name: number(found.get(name)) for name in ("loss", "bits_per_byte", "tokens")} | {
                    "perplexity": _perplexity(found.get("loss"))
                }
                rows.append(member_row(m, domain=domain, **values))
    return rows


def _perplexity(loss: Any) -> float | None:
    """exp of a loss in nats per token; None where that is not a finite number."""
    found = number(loss)
    return None if found is None or found > 700 else math.exp(found)


def _draw_loss_curves(results: "StudyResults") -> "Drawing":
    import numpy as np

    from plasticity_jax.report import drawing

    drawn, panels = drawing.member_panels(results, ("Training batches", "Held-out text"), 2.4)
    for member in results.members:
        style = {"color": drawing.color(results, member.point), "alpha": 1.0 if member.state == "done" else 0.5}
        trained = [(row["step"], loss) for row in member.curve if (loss := number(row.get("loss"))) is not None]
        held_out = [(row["step"], loss) for row in member.curve if (loss := _curve_held_out(row)) is not None]
        panels[0].plot(*np.reshape(trained, (-1, 2)).T, **style, linewidth=1.1)
        panels[1].plot(*np.reshape(held_out, (-1, 2)).T, **style, marker=drawing.marker(results, member.point), markersize=4)
    for axes in panels:
        axes.set_ylabel("loss (nats per token)")
        axes.set_xlim(0, None)
        # Cuts the first plunge off the top, so that the differences at the end can be seen.
        ends = np.concatenate([np.asarray(line.get_ydata())[len(np.asarray(line.get_ydata())) // 5 :] for line in axes.lines])
        if len(ends) > 1 and np.ptp(ends) > 0:
            axes.set_ylim(ends.min() - 0.05 * np.ptp(ends), ends.max() + 0.12 * np.ptp(ends))
    panels[1].sharex(panels[0])
    panels[1].set_xlabel("step")
    return drawn


def _draw_held_out_loss(results: "StudyResults") -> "Drawing":
    import numpy as np

    from plasticity_jax.report import drawing

    drawn, panels = drawing.panels_below(2, 2.3)
    means = drawing.seed_means(panels[0], results, lambda m: m.loss, drawing.INK)
    drawing.line(panels[0], results, means, color=drawing.INK, marker="o", label="all domains")
    domains = sorted({d for m in results.members if m.loss is not None for d in (m.held_out or {})["domains"]})
    for i, domain in enumerate(domains):
        series = drawing.SERIES[i % len(drawing.SERIES)]
        means = drawing.seed_means(
            panels[1],
            results,
            lambda m, d=domain: number(m.held_out["domains"][d]["loss"]) if m.loss is not None and m.held_out else None,
            series,
        )
        drawing.line(panels[1], results, means, color=series, marker=drawing.MARKERS[i % len(drawing.MARKERS)], label=domain)
    for axes, title in zip(panels, ("All domains", "By domain")):
        axes.set_ylabel("held-out loss\n(nats per token)")
        right = axes.secondary_yaxis("right", functions=(np.exp, lambda perplexity: np.log(np.maximum(perplexity, 1e-12))))
        right.set_ylabel("perplexity")
        drawing.swept_axis(axes, results, label=axes is panels[-1])
        axes.set_title(title)
    if domains:
        drawing.legend_above(panels[1], panels[1].get_legend_handles_labels()[0])
    return drawn


def _measures(results: "StudyResults"):
    from plasticity_jax.report.verdicts import loss_measure

    return [loss_measure()]


STAGE = Stage(
    name="pretrain",
    title="base models",
    run=run,
    checkpoints=True,
    record=Pretrained,
    parents={"corpus": "prepare", "init": "init"},
    plan=_plan,
    check=_check,
    devices="all",
    batched=Batched(_program, run_batch, _bytes),
    programs=_programs,
    work=_work,
    tables={
        "members": Table(_member_rows, on_page=False),
        "curves": Table(_curve_rows, on_page=False),
        "held_out": Table(_held_out_rows, on_page=False),
    },
    figures={
        "loss_curves": Figure(
            "Loss curves",
            "Loss during pretraining; the first steps run off the top.{batches}",
            lambda results: any(number(row.get("loss")) is not None for m in results.members for row in m.curve),
            _draw_loss_curves,
            section="pretraining",
            applies=lambda config: not config.grid.models,
        ),
        "held_out_loss": Figure(
            "Final held-out loss",
            "Held-out loss and perplexity of the base models, over all domains and by domain. {seeds}",
            lambda results: any(m.loss is not None for m in results.members),
            _draw_held_out_loss,
            section="pretraining",
            applies=lambda config: config.data.has_text,
        ),
    },
    measures=_measures,
)
