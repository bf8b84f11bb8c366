"""Gap: a base model's loss on text seen in training against held-out text."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveInt, Seed, execution, result
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.stages.stage import Column, Context, Figure, Knob, Program, Rows, Stage, Table, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.analysis.statistics import Blocks
    from plasticity_jax.report.effects import Measure
    from plasticity_jax.report.results import MemberResults, StudyResults
    from plasticity_jax.report.verdicts import Found, Verdict

GAP_MARGIN = 0.01  # nats per token: a change of the gap up to this counts as no effect


@dataclass(frozen=True)
class GapConfig:
    """Loss on text seen in training against held-out text, on equal tokens per domain."""

    tokens_per_side: PositiveInt = result(65536, "tokens per domain, seen and held out each")
    seed: Seed = result(0, "seed of the choice of records")
    batch_size: PositiveInt = execution(32, "sequences scored at once; rounded up for the mesh")

    def check(self, config: StudyConfig) -> None:
        if self.tokens_per_side < config.train.seq_len:
            raise UserError(f"gap.tokens_per_side={self.tokens_per_side} is below train.seq_len={config.train.seq_len}, one sequence; raise it.")


@dataclass(frozen=True)
class Gap:
    """What `analysis.gap.measure_gap` returns, see there; and seconds of wall time."""

    seen: float
    held_out: float
    gap: float
    interval: tuple[float, float]
    domains: dict[str, dict[str, float]]
    seen_early: float | None
    seen_late: float | None
    control: dict[str, Any]
    adjusted: dict[str, Any]
    blocks: dict[str, list[dict[str, Any]]]
    tokens_per_side: int
    left_out_domains: list[str]
    seconds: float


def run(context: Context) -> Gap | None:
    """Measures the gap of the parent "model", a pretraining run, on the parent "corpus"."""
    from plasticity_jax.analysis.gap import measure_gap

    start, settings, model = time.monotonic(), context.section, context.model(dtype=context.compute_dtype)
    made_by = RunDirectory(context.parents["model"])
    if made_by.run().stage != "pretrain":
        raise UserError(f"{model.path} is a run of stage {made_by.run().stage}; the gap needs one of stage pretrain, whose reading order is known.")
    facts = measure_gap(
        model,
        made_by.config(),
        context.parents["corpus"],
        forward=context.forward(model),
        reading_seed=made_by.run().seed or 0,
        tokens_per_side=settings.tokens_per_side,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    return Gap(**facts, seconds=time.monotonic() - start) if facts else None


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.model.forward import Forward, lower_record_nats
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.batches import smaller_batches
    from plasticity_jax.parallel.sharding import device_bytes

    train, params = config.train, abstract_loaded(config.model, mesh, config.train.compute_dtype)
    options = {"seq_len": train.seq_len, "isolate": config.data.isolate_documents, "loss_chunks": train.loss_chunks}
    forward = Forward.of(config, config.model, mesh)
    yield Program(
        f"loss, {forward.batch_size(config.gap.batch_size)} x {train.seq_len}",
        lambda own: lower_record_nats(forward, config.model, params, batch_size=own.gap.batch_size, **options),
        (Knob("gap.batch_size", smaller_batches(mesh, config.gap.batch_size)),),
        device_bytes(params),
        way_out="raise train.loss_chunks",
    )


def _work(ahead: Ahead) -> Iterable[Work]:
    from plasticity_jax.model.flops import forward_flops

    config, seq_len = ahead.config, ahead.config.train.seq_len
    blocks = config.gap.tokens_per_side // seq_len
    yield Work(flops=2 * forward_flops(config.model, blocks, seq_len), tokens=2 * blocks * seq_len)


def gap_of(member: "MemberResults") -> float | None:
    """held-out − seen loss in nats per token; None where it is missing."""
    found = member.record("gap")
    return None if found is None else number(found.gap)


def _rows(results: "StudyResults") -> Rows:
    """Loss on seen and on held-out text, their gap with its interval, and the same of the unigram control."""
    from plasticity_jax.report.comparisons import with_interval

    rows = []
    for m in results.members:
        found = m.record("gap")
        if found:
            row = member_row(m, seen=number(found.seen), held_out=number(found.held_out))
            row |= with_interval("gap", (number(found.gap), *map(number, found.interval)))
            row |= {"seen_early": number(found.seen_early), "seen_late": number(found.seen_late)}
            row |= with_interval("control_gap", (number(found.control["gap"]), *map(number, found.control["interval"])))
            rows.append(row | {"control_passes": found.control["passes"], "tokens_per_side": found.tokens_per_side})
    return rows


def _draw(results: "StudyResults") -> "Drawing":
    import numpy as np

    from plasticity_jax.report import drawing

    drawn, (axes,) = drawing.panels_below(1, 2.9)
    places = drawing.positions(results)
    width = max(places.values()) - min(places.values())
    axes.axhline(0.0, color=drawing.REFERENCE, linewidth=1.0, zorder=1)
    measured = [(m.point, m.record("gap")) for m in results.members if gap_of(m) is not None]
    model = [(found.gap, found.interval) for _, found in measured]
    control = [(found.control["gap"], found.control["interval"]) for _, found in measured]
    sides: list[tuple[list, float, dict[str, Any]]] = [
        (model, 0.0, {"color": drawing.SERIES[0], "marker": "o", "label": "model"}),
        (control, 0.02 * width, {"color": drawing.MUTED, "marker": "s", "label": "unigram control", "alpha": 0.9}),
    ]
    for found, shift, style in sides:
        y, ends = np.array([float(gap) for gap, _ in found]), np.array([[float(end) for end in interval] for _, interval in found])
        x = [places[point] + shift for point, _ in measured]
        axes.errorbar(x, y, yerr=np.maximum([y - ends[:, 0], ends[:, 1] - y], 0.0), linestyle="none", capsize=2.5, elinewidth=1.1, **style)
    means = {point: float(gap) for point in results.points if (gap := results.mean(point, gap_of)) is not None}
    drawing.line(axes, results, means, color=drawing.SERIES[0])
    axes.set_ylabel("held-out − seen loss\n(nats per token)")
    drawing.swept_axis(axes, results, label=True)
    drawing.legend_above(axes, axes.get_legend_handles_labels()[0])
    return drawn


def gap_measure() -> "Measure":
    """Held-out less seen loss, one number per model; documents are resampled for its uncertainty within a run."""
    from plasticity_jax.report.effects import Measure

    return Measure("gap", lambda m: None if (gap := gap_of(m)) is None else [[[gap]]], "", GAP_MARGIN, "nats/token", gap_variance)


def gap_falls(results: "StudyResults") -> "Verdict":
    """The claim about the train-validation gap."""
    from plasticity_jax.report.verdicts import TREND_RULE, WORDS_RULE, judged

    return judged(
        results,
        "The gap between held-out loss and loss on text seen in training shrinks as weight decay grows.",
        "train-validation gap",
        f"{TREND_RULE}. Seeds are not taken to agree better than resampled documents let them. {WORDS_RULE.format(delta=GAP_MARGIN)} Cannot tell unless "
        "a unigram model scores both sides equally within its interval.",
        _gap(results),
    )


def _gap(results: "StudyResults") -> "Found":
    from plasticity_jax.report.effects import measured
    from plasticity_jax.report.verdicts import Found, trend_found

    if results.existing:
        return Found("Models that exist do not say which text they have seen in which order, so their gap is not known.")
    measure = gap_measure()
    if failing_controls(results):
        shown = ", ".join(f"{gap:.3f} at λ={d:.4g}" for d, gap in measured(results, measure, results.points).items())
        return Found(f"The unigram control fails: the two sides differ in difficulty. Gap in nats per token: {shown}.")
    return trend_found(results, [measure], -1, "a gap")


def failing_controls(results: "StudyResults") -> list[str]:
    """Members whose unigram control has a gap."""
    return [m.name for m in results.members if (found := m.record("gap")) and not found.control["passes"]]


def _warnings(results: "StudyResults") -> list[str]:
    from plasticity_jax.report.sentences import few

    failing = failing_controls(results)
    if not failing:
        return []
    return [
        f"The unigram control of the seen / held-out gap fails for {few(failing)}: the two sides differ in difficulty, so the gap’s size "
        "means little."
    ]


def gap_variance(results: "StudyResults", members: "list[tuple[MemberResults, float]]") -> float | None:
    """Variance of a weighted sum of gaps of members of one seed, block by block; documents are resampled within each domain and side.

    These members are scored on the same blocks, so the weighted sum of their losses is free of how hard each block is where the weights add up to 0:
    the gap of that sum is the sum of the gaps.

    Returns:
      None if two members were not scored on the same blocks.
    """
    from plasticity_jax.analysis.statistics import cluster_bootstrap_gap
    from plasticity_jax.report.effects import NORMAL

    found = [(record, weight) for m, weight in members if (record := m.record("gap")) is not None]
    sides = [_weighted_blocks([(record.blocks[side], weight) for record, weight in found]) for side in ("seen", "held_out")]
    if sides[0] is None or sides[1] is None:
        return None
    settings = results.config.report
    _, low, high = cluster_bootstrap_gap(sides[0], sides[1], samples=settings.bootstrap_samples, seed=settings.seed)
    return ((high - low) / (2 * NORMAL)) ** 2


def _weighted_blocks(found: list[tuple[list[dict], float]]) -> "Blocks | None":
    """Weighted sum of the members' losses, block by block; None if their blocks differ."""
    from plasticity_jax.analysis.statistics import Blocks

    keys = [[(block["domain"], block["document"]) for block in blocks] for blocks, _ in found]
    if not keys or not keys[0] or any(other != keys[0] for other in keys):
        return None
    losses = [sum(weight * float(blocks[i]["loss"]) for blocks, weight in found) for i in range(len(keys[0]))]
    return Blocks(losses, [domain for domain, _ in keys[0]], [document for _, document in keys[0]])


STAGE = Stage(
    name="gap",
    title="the gap between seen and held-out text",
    run=run,
    devices="all",
    programs=_programs,
    work=_work,
    fields=lambda config, model: {"compute_dtype": config.train.compute_dtype},
    record=Gap,
    config=GapConfig,
    parents={"model": "pretrain", "corpus": "prepare"},
    tables={"gap": Table(_rows, on_page=False)},
    figures={
        "gap": Figure(
            "Seen / held-out gap",
            "Loss on held-out text less loss on text seen in training, on equal tokens. A unigram model must show no gap. 95% intervals over documents.",
            lambda results: any(gap_of(m) is not None for m in results.members),
            _draw,
            applies=lambda config: not config.grid.models,
        )
    },
    columns={"gap": Column(gap_of, "gap", unit="nats/token")},
    claims=(gap_falls,),
    measures=lambda results: [gap_measure()],
    warnings=_warnings,
)
