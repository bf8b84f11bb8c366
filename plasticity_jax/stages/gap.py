"""Gap: a base model's loss on text seen in training against held-out text."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import PositiveInt, execution, result
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.stages.stage import Column, Context, Figure, Knob, Program, Rows, Stage, Table, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.analysis.statistics import Blocks
    from plasticity_jax.report.comparisons import Interval
    from plasticity_jax.report.results import MemberResults, StudyResults
    from plasticity_jax.report.verdicts import Verdict

GAP_MARGIN = 0.01  # nats per token: a rise of the gap between neighboring λ up to this still counts as falling


@dataclass(frozen=True)
class GapConfig:
    """Loss on text seen in training against held-out text, on equal tokens per domain."""

    tokens_per_side: PositiveInt = result(65536, "tokens per domain, seen and held out each")
    seed: int = result(0, "seed of the choice of records")
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
    yield Work(flops=2 * forward_flops(config.model, config.gap.tokens_per_side // seq_len, seq_len))


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


def gap_falls(results: "StudyResults") -> "Verdict":
    """The claim about the train-validation gap."""
    from plasticity_jax.report.verdicts import Verdict

    verdict, evidence = _gap(results)
    return Verdict(
        "The gap between held-out loss and loss on text seen in training shrinks as weight decay grows.",
        "train-validation gap",
        "Gap at the smallest λ less gap at the largest, on the same blocks, documents resampled: consistent if the interval is above 0 and the "
        f"gap never rises by more than {GAP_MARGIN} nats from one λ to the next; inconsistent if the interval is below 0. Cannot tell unless a "
        "unigram model scores both sides equally within its interval.",
        evidence,
        verdict,
    )


def _gap(results: "StudyResults") -> tuple[str, str]:
    from plasticity_jax.report.verdicts import CANNOT_TELL, CONSISTENT, falls, interval_text, word

    gaps = {d: float(g) for d in results.points if (g := results.mean(d, gap_of)) is not None}
    if len(gaps) < 2:
        return CANNOT_TELL, "Fewer than two λ have a gap."
    shown = ", ".join(f"{gap:.3f} at λ={d:.4g}" for d, gap in sorted(gaps.items()))
    if failing_controls(results):
        return CANNOT_TELL, f"The unigram control fails: the two sides differ in difficulty. Gap in nats per token: {shown}."
    difference = gap_difference(results, min(gaps), max(gaps))
    verdict = word(difference)
    if verdict == CONSISTENT and not falls(gaps, GAP_MARGIN):
        verdict = CANNOT_TELL
    return verdict, f"Gap in nats per token: {shown}. Smallest less largest λ: {interval_text(difference)}. The unigram control passes."


def failing_controls(results: "StudyResults") -> list[str]:
    """Members whose unigram control has a gap."""
    return [m.name for m in results.members if (found := m.record("gap")) and not found.control["passes"]]


def _warnings(results: "StudyResults") -> list[str]:
    failing = failing_controls(results)
    if not failing:
        return []
    return [
        f"The unigram control of the seen / held-out gap fails for {', '.join(failing)}: the two sides differ in difficulty, so the gap’s size "
        "means little."
    ]


def gap_difference(results: "StudyResults", low: Any, high: Any) -> "Interval | None":
    """Gap at `low` − gap at `high`, paired block by block; documents are resampled within each domain and side.

    Members of a seed are scored on the same blocks, so the difference of their losses is free of how hard each block is: the gap of that
    difference is the difference of the gaps.

    Returns:
      (mean, lower, upper); None if no seed has both, or if two members were not scored on the same blocks.
    """
    from plasticity_jax.analysis.statistics import Blocks, cluster_bootstrap_gap

    highs = {m.member.seed: found for m in results.at(high) if (found := m.record("gap"))}
    pairs = [(m.member.seed, found, highs[m.member.seed]) for m in results.at(low) if (found := m.record("gap")) and m.member.seed in highs]
    sides = {side: [_paired_blocks(a.blocks[side], b.blocks[side], seed) for seed, a, b in pairs] for side in ("seen", "held_out")}
    if not pairs or any(blocks is None for found in sides.values() for blocks in found):
        return None
    joined = {side: Blocks(*(sum(field, []) for field in zip(*found))) for side, found in sides.items()}
    settings = results.config.report
    gap, low, high = cluster_bootstrap_gap(joined["seen"], joined["held_out"], samples=settings.bootstrap_samples, seed=settings.seed)
    return gap, low, high


def _paired_blocks(lows: list[dict], highs: list[dict], seed: int) -> "Blocks | None":
    """Losses of one member less those of the other, block by block. Seeds see other blocks of a document, so they count as documents of their own."""
    from plasticity_jax.analysis.statistics import Blocks

    domains, documents = ([b[key] for b in lows] for key in ("domain", "document"))
    if (domains, documents) != tuple([b[key] for b in highs] for key in ("domain", "document")):
        return None
    losses = [float(a["loss"]) - float(b["loss"]) for a, b in zip(lows, highs)]
    return Blocks(losses, domains, [f"{seed}/{document}" for document in documents])


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
            lambda results: any(m.record("gap") for m in results.members),
            _draw,
        )
    },
    columns={"gap": Column(gap_of, "gap", unit="nats/token")},
    claims=(gap_falls,),
    warnings=_warnings,
)
