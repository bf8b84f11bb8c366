"""Evaluate: a base model (before) or a fine-tuned one (after) scored on the test rows of a task."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import StudyConfig, result_fields
from plasticity_jax.runs.directory import CONFIG, RunDirectory
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.prepare import task_run, task_settings
from plasticity_jax.stages.stage import Batched, Context, Figure, Knob, Plan, Planned, Program, Rows, Stage, Table, batch_fields, member_row
from plasticity_jax.stages.work import Ahead, Work, padded_to

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.figure import Figure as Drawing

    from plasticity_jax.report.results import MemberResults, StudyResults


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate.evaluate.evaluate` returns, see there; and seconds of wall time."""

    metrics: dict[str, float]
    problems: int
    n_samples: int
    failures: dict[str, dict[str, float]]
    per_problem: dict[str, list[float]]
    majority_class: float
    source_splits: list[str]
    seconds: float
    subsets: dict[str, dict[str, float]] = field(default_factory=dict)
    macro: dict[str, float] = field(default_factory=dict)
    cut_prompts: int = 0
    unended: float | None = None


def by_likelihood(config: StudyConfig, task: str) -> bool:
    """Whether a task's options are compared, and nothing is generated."""
    from plasticity_jax.data.tasks import get_task

    return get_task(task, config.tasks).grader == "likelihood"


ELSEWHERE = "elsewhere"  # a fine-tuned model on a test that no model is fine-tuned on


def is_trained(config: StudyConfig, task: str) -> bool:
    """Whether models are fine-tuned on a task; otherwise it is a test out of domain."""
    from plasticity_jax.data.tasks import get_task

    return get_task(task, config.tasks).trained


def of_grading(config: StudyConfig, task: str) -> dict[str, Any]:
    """What defines a result of graded completions beside the task's rows: the grader, where a config names it."""
    grader = config.tasks[task].grader
    return {} if grader is None else {"grader": grader}


def evaluate_run(config: StudyConfig, model: Run, task: str) -> Run:
    """A base model (before), one fine-tuned on the task (after) or on another one (elsewhere, out of domain) scored on a task's test rows."""
    tuned_on_it = model.stage == "finetune" and model.task == task
    when = "after" if tuned_on_it else ELSEWHERE if model.stage == "finetune" and not is_trained(config, task) else "before"
    name = f"{model.name}-after" if tuned_on_it else f"{model.name}-{task}-{when}"
    fields = {"when": when, "split": "test", "faithful": config.faithful, "compute_dtype": config.train.compute_dtype}
    fields |= batch_fields(config.train.compute_dtype, config.evaluate.batch_size)
    if not by_likelihood(config, task):
        fields |= result_fields(config.evaluate) | {"max_new_tokens": task_settings(config, task).max_new_tokens} | of_grading(config, task)
    parents = {"model": model.id, "task": task_run(config, task).id}
    return STAGE.new_run(config, name, fields, parents, member=model.member or model.name, task=task, seed=model.seed)


def _plan(plan: Plan) -> Iterable[Planned]:
    for task in plan.config.tasks:
        yield from ((own, evaluate_run(own, base, task)) for own, base in plan.bases)
    for own, tuned in plan.of("finetune"):
        yield own, evaluate_run(own, tuned, tuned.task_name)
        yield from ((own, evaluate_run(own, tuned, task)) for task in plan.config.tasks if not is_trained(plan.config, task))


def run(context: Context) -> Evaluated | None:
    """Scores the parent "model" on rows of the parent "task"; the field "split" says which rows: "test", "validation" or "verifier"."""
    return run_batch([context])[0]


def run_batch(contexts: Sequence[Context]) -> list[Evaluated | None]:
    """Scores models of one network and tokenizer on the same rows as one program."""
    from plasticity_jax.data.tasks import get_task, read_task
    from plasticity_jax.evaluate.evaluate import Protocol, Scored, evaluate

    first = contexts[0]
    fields, rows = first.run.fields, read_task(first.parents["task"])
    protocol = Protocol(fields.get("n_samples", 0), fields.get("max_new_tokens", 0), first.config.faithful)
    programs: dict[Any, list[tuple[Context, Scored]]] = {}
    for context in contexts:
        model = context.model(with_tokenizer=True, dtype=context.compute_dtype)
        scored = Scored(model, context.directory.path, f"{context.run.stage} {context.run.name}")
        programs.setdefault((model.config, model.text_tokenizer.fingerprint), []).append((context, scored))
    found: dict[str, Evaluated | None] = {}
    for program in programs.values():
        start, models = time.monotonic(), [scored for _, scored in program]
        forward = first.forward(models[0].model)
        scores = evaluate(
            models, get_task(first.task, first.config.tasks), getattr(rows, fields["split"]), first.config.evaluate, protocol, forward=forward
        )
        seconds = (time.monotonic() - start) / len(models)
        for (context, _), results in zip(program, scores, strict=True):
            found[context.run.id] = Evaluated(**results, seconds=seconds) if results else None
    return [found[context.run.id] for context in contexts]


def _program(run: Run) -> str:
    """What runs of one compiled program have in common: the task's rows and how they are answered. The model may be another."""
    return to_json([run.stage, run.fields, run.parents["task"], "max_new_tokens" not in run.fields and run.id])  # options are compared by one


def _bytes(config: StudyConfig, mesh: "Mesh") -> int:
    """The matrices, and for every sequence keys and values of prompt and completion, and a few copies of the logits."""
    from plasticity_jax.evaluate.generate import largest_shapes, layout_for
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.param_count import count_params
    from plasticity_jax.parallel.batches import row_shards

    model, settings = config.model, config.evaluate
    width, tensor = 2 if config.train.compute_dtype == "bfloat16" else 4, mesh.shape["tensor"]
    sharded = layout_for(settings.weights, model, Forward.of(config, model, mesh)).sharded
    longest = max(map(sum, largest_shapes(settings, _longest_completion(config), settings.n_samples + 1)))
    of_row = 2 * model.n_kv_heads * model.head_dim * model.n_layers * longest * width + 12 * model.vocab_size
    weights = width * count_params(model) / tensor / (mesh.shape["fsdp"] if sharded else 1)
    return int(weights + of_row * settings.batch_size / row_shards(mesh) / tensor)


def _longest_completion(config: StudyConfig) -> int | None:
    """The largest `max_new_tokens` of the tasks that generate; None: only `evaluate.max_length` bounds it."""
    limits = [task_settings(config, task).max_new_tokens for task in config.tasks if not by_likelihood(config, task)]
    return None if None in limits else max(filter(None, limits), default=None)


def regraded_run(source: Run, faithful: bool | None) -> Run:
    """The run that grades the completions of another one again: as the original, or not; None: as they were graded. Its field "graded" says which."""
    way = "faithful" if (source.fields.get("faithful", False) if faithful is None else faithful) else "clean"
    fields, parents = source.fields | {"graded": way}, {"completions": source.id}
    return replace(source, name=f"{source.name}-graded-{way}", fields=fields, parents=parents, version=STAGE.version)


def is_regraded(run: Run) -> bool:
    """Whether a run graded the completions of another one."""
    return run.stage == STAGE.name and "graded" in run.fields


def regrade(directory: RunDirectory, run: Run, source: RunDirectory) -> Evaluated:
    """Grades the completions of a finished evaluate run again.

    Writes problems.jsonl and completions.jsonl as the source has them, with the new answers, verdicts and majorities.

    Args:
      directory, run: of the run that `regraded_run` gives.
      source: where the completions are; it stays as it is.
    Returns:
      The new record. What no grader decides is that of the source: cut prompts, and seconds, which generation took.
    """
    from plasticity_jax.data.tasks import get_task
    from plasticity_jax.evaluate.evaluate import regraded

    before, task = STAGE.read(source.results()), get_task(run.task_name, source.config().tasks)
    results = regraded(source.path, directory.path, task, run.fields["graded"] == "faithful", source.config().evaluate.grade_workers)
    kept = {"n_samples": before.n_samples, "cut_prompts": before.cut_prompts, "source_splits": before.source_splits, "seconds": before.seconds}
    return Evaluated(**results, **kept)


def _programs(config: StudyConfig, mesh: "Mesh", members: int) -> Iterable[Program]:
    import jax

    from plasticity_jax.evaluate.generate import largest_shapes, layout_for, lower_completions
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.batches import smaller_batches
    from plasticity_jax.parallel.sharding import device_bytes, inference_shardings

    if all(by_likelihood(config, task) for task in config.tasks):
        return
    settings, dtype = config.evaluate, config.train.compute_dtype
    params, forward = abstract_loaded(config.model, mesh, dtype), Forward.of(config, config.model, mesh, dtype)
    layout = layout_for(settings.weights, config.model, forward)
    whole = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, inference_shardings(mesh, params))
    for shape in largest_shapes(settings, _longest_completion(config), settings.n_samples + 1):
        yield Program(
            f"generation, {settings.batch_size} x ({shape[0]} + {shape[1]})",
            lambda own, shape=shape: lower_completions(own.model, params, own.evaluate, shape, forward, members=members),
            (
                Knob("evaluate.batch_size", smaller_batches(mesh, settings.batch_size, settings.n_samples + 1)),
                Knob("evaluate.weights", () if layout.sharded else ("sharded",)),
            ),
            members * device_bytes(params if layout.sharded else whole),
            axis="fsdp" if layout.sharded else "tensor",  # over fsdp matrices are whole
            way_out="lower evaluate.max_length or max_new_tokens",
        )


def work(ahead: Ahead) -> Iterable[Work]:
    """Reading the prompts and decoding to the last token; for tasks whose options are compared, reading them all."""
    return _likelihood_work(ahead) if by_likelihood(ahead.config, ahead.run.task_name) else _generation_work(ahead)


def _generation_work(ahead: Ahead) -> Iterable[Work]:
    """Decoding reads the weights on every device and all caches once per token, or computes, whichever takes longer."""
    from plasticity_jax.evaluate.generate import completion_slots
    from plasticity_jax.model.flops import cached_values, decode_flops, forward_flops
    from plasticity_jax.model.param_count import count_matmul_params
    from plasticity_jax.parallel.batches import row_shards

    config, fields, task, mesh = ahead.config, ahead.run.fields, ahead.task(), ahead.mesh
    model, settings, split = config.model, config.evaluate, fields["split"]
    slots_of = completion_slots(settings.paddings, settings.max_length, fields["max_new_tokens"])
    per_prompt, longest, shards = fields["n_samples"] + 1, settings.paddings[-1], row_shards(mesh)
    prompts = max(1, settings.batch_size // per_prompt // shards) * shards
    lengths = task.prompt_lengths(split, longest=longest)
    if lengths is not None:
        buckets, assumes = padded_to(lengths, settings.paddings, prompts), ()
    else:
        # Of a text of `max_length` tokens, decoding takes longer than reading: the longest completions bound the work.
        shape = max(slots_of.items(), key=lambda shape: (shape[1], shape[0]))
        buckets = [(shape[0], -(-task.counts[split] // prompts) * prompts)]
        assumes = (*task.assumes(split), f"prompts of {shape[0]} tokens")
    size = 2 if config.train.compute_dtype == "bfloat16" else 4
    weights = size * count_matmul_params(model) * mesh.size / mesh.shape["tensor"]
    reading, decoding, read, prompted, written = 0.0, 0.0, 0.0, 0, 0
    for length, rows in buckets:
        slots = slots_of[length]
        prompted += rows * length
        written += rows * per_prompt * slots
        steps = (slots - 1) * rows // prompts
        reading += forward_flops(model, rows, length, outputs=1)
        decoding += steps * decode_flops(model, prompts * per_prompt, length + slots)
        read += steps * (weights + size * cached_values(model) * prompts * (length + per_prompt * slots))
    yield Work(flops=reading, tokens=prompted, assumes=assumes)
    assumes = (*assumes, f"{task.name}: completions of {max(slots_of[length] for length, _ in buckets)} tokens")
    yield Work(flops=decoding, tokens=written, bytes=read, assumes=assumes)


MOST_OPTIONS = 5  # of a row of the tasks that come with the package, some of ARC's


def _likelihood_work(ahead: Ahead) -> Iterable[Work]:
    from plasticity_jax.data.batching import power_of_two_buckets
    from plasticity_jax.evaluate.likelihood import MIN_LENGTH
    from plasticity_jax.model.flops import forward_flops

    config, task, split = ahead.config, ahead.task(), ahead.run.fields["split"]
    lengths, longest, size, assumes = task.option_lengths(split), config.finetune.length_buckets[-1], config.evaluate.batch_size, ()
    buckets = power_of_two_buckets([range(longest if lengths is None else max(lengths))], MIN_LENGTH)
    if lengths is not None:
        batches = padded_to(lengths, buckets, size)
    else:
        batches = [(buckets[-1], -(-MOST_OPTIONS * task.counts[split] // size) * size)]
        assumes = (*task.assumes(split), f"{task.name}: {MOST_OPTIONS} options per row, each of {longest} tokens with its prompt")
    flops = sum(forward_flops(config.model, n, length) for length, n in batches)
    yield Work(flops=flops, tokens=sum(n * length for length, n in batches), assumes=assumes)


# ------------------------------------------------------------------------------------------------------------------------------ report


def _score_rows(results: "StudyResults") -> Rows:
    """Every metric of every member on every task, before and after fine-tuning."""
    rows = []
    for m in results.members:
        for task in results.tasks:
            for when, scores in (("before", m.before), ("after", m.after)):
                if task in scores:
                    score = scores[task]
                    failures = {name.replace(" ", "_"): share for name, share in score.failures.items()}
                    about = {"task": task, "when": when, "problems": len(score.greedy), "finetune_seeds": len(score.runs)}
                    rows.append(member_row(m, **about, **score.metrics, **failures, scorer=score.scorer, majority_class=score.majority_class))
    return rows


def _metric_rows(results: "StudyResults") -> Rows:
    """Every metric with its 95% interval over problems, and its difference from the first point's, paired by problem; of each test set the value only."""
    from plasticity_jax.report.comparisons import metric_difference, metric_interval, with_interval

    settings, rows = results.config.report, []
    for part in results.slices:
        for task in results.tasks:
            for when in ("before", "after"):
                of_seed: dict[int, MemberResults] = {}
                for m in (m for point in part.points for m in part.at(point)):
                    score = getattr(m, when).get(task)
                    if score is None:
                        continue
                    first = of_seed.setdefault(m.member.seed, m)
                    for metric, value in score.metrics.items():
                        row = member_row(m, task=task, when=when, test_set="", metric=metric)
                        row |= with_interval("value", metric_interval(score, metric, settings) or (value, None, None))
                        difference = None if first is m else metric_difference(getattr(first, when)[task], score, metric, settings)
                        rows.append(row | {"reference": first.name} | with_interval("difference", difference))
                    for name, metrics in score.subsets.items():
                        rows += [member_row(m, task=task, when=when, test_set=name, metric=metric, value=value) for metric, value in metrics.items()]
    return rows


def regraded_rows(results: "StudyResults") -> Rows:
    """Every metric of completions that were graded again, beside its value as first graded."""
    first, members = {s.run.id: s for s in results.runs}, {name: m for m in results.members for name in (m.member.base, m.name)}
    rows = []
    for file in sorted(results.path.glob(f"{STAGE.name}/*/{CONFIG}")):
        again = RunDirectory(file.parent)
        source = first.get(again.run().parents.get("completions", "")) if again.done and is_regraded(again.run()) else None
        if source is None or source.run.member not in members:
            continue
        run, before, after = again.run(), STAGE.read(RunDirectory(source.path).results()).metrics, STAGE.read(again.results()).metrics
        about = {"task": run.task, "when": run.fields["when"], "finetune_seed": source.run.seed, "graded": run.fields["graded"]}
        rows += [
            member_row(members[source.run.member], **about, metric=metric, first=before.get(metric), again=value) for metric, value in after.items()
        ]
    return rows


def out_of_domain_rows(results: "StudyResults") -> Rows:
    """Every metric of every fine-tuned model on the tests that no model is fine-tuned on, less that of its base model."""
    models, members, rows = {run.id: run for run in (s.run for s in results.runs)}, {m.name: m for m in results.members}, []
    for s in results.runs:
        if s.run.stage != STAGE.name or s.run.fields.get("when") != ELSEWHERE or s.state != "done" or s.run.member not in members:
            continue
        tuned, m, found = models[s.run.parents["model"]], members[s.run.member], STAGE.read(RunDirectory(s.path).results())
        before = m.before[s.run.task_name].metrics if s.run.task_name in m.before else {}
        about = {"task": s.run.task_name, "finetuned_on": tuned.task_name, "finetune_seed": tuned.seed, "problems": found.problems}
        for metric, value in found.metrics.items():
            rise = None if metric not in before else value - before[metric]
            rows.append(member_row(m, **about, metric=metric, value=value, before=before.get(metric), rise=rise))
    return rows


def macro_rows(results: "StudyResults") -> Rows:
    """Mean over the tasks of each metric that all of a member's tasks have, before and after fine-tuning; no row until every task is scored."""
    from plasticity_jax.evaluate.metrics import macro_average

    rows = []
    for m in results.members:
        for when, scores in (("before", m.before), ("after", m.after)):
            if results.tasks and all(task in scores for task in results.tasks):
                found = macro_average({task: scores[task].metrics for task in results.tasks})
                rows.append(member_row(m, when=when, tasks=len(results.tasks), **found))
    return rows


MANY_UNENDED = 0.5  # share of a task's completions after fine-tuning


def _warnings(results: "StudyResults") -> list[str]:
    """Tasks on which most completions after fine-tuning did not end by themselves."""
    found = []
    for task in results.tasks:
        of_models = [m.after[task].unended for m in results.members if task in m.after]
        shares = [share for share in of_models if share is not None]
        share = sum(shares) / len(shares) if shares else 0.0
        if share > MANY_UNENDED:
            limit = results.config.tasks[task].max_new_tokens
            at = f"at {limit} tokens (tasks.{task}.max_new_tokens)" if limit else f"by evaluate.max_length = {results.config.evaluate.max_length}"
            found.append(
                f"After fine-tuning, {share:.0%} of the completions of {task} were cut {at} before they ended; an answer after that counts as none."
            )
    return found


def gain_rows(results: "StudyResults") -> Rows:
    from plasticity_jax.report import scores

    return scores.gain_rows(results)


def correlation_rows(results: "StudyResults") -> Rows:
    from plasticity_jax.report import scores

    return scores.correlation_rows(results)


def aggregate_rows(results: "StudyResults") -> Rows:
    from plasticity_jax.report import scores

    return scores.aggregate_rows(results)


def _heading(metric: str) -> str:
    """Of a metric, with its unit where that is not a share."""
    from plasticity_jax.evaluate.metrics import metric_of

    about = metric_of(metric)
    return about.heading + (f"\n({about.unit})" if about.unit else "")


def _draw_scores(results: "StudyResults") -> "Drawing":
    """A row per metric, a column per task and one for the mean over the learned tasks: before and after fine-tuning."""
    from plasticity_jax.report import drawing, scores

    drawn, panels = _over_points(results, "after")
    for axes, (metric, task, tasks), found in panels:
        drawing.seed_lines(axes, results, scores.by_seed(results, tasks, metric), drawing.SERIES[0])
        drawing.interval_line(axes, results, found, "after", color=drawing.SERIES[0], marker="o", label="after", **_SMALL)
        before = {row[results.axis.field]: row["before"] for row in found if row["before"] is not None}
        if before:
            drawing.line(axes, results, before, color=drawing.SERIES[1], marker="s", linestyle="--", label="before", markersize=3, linewidth=1.1)
        scored = [s for m in results.members for s in (m.after.get(task),) if s]
        if scored and scored[0].outcomes[0].counts == metric:
            axes.axhline(scored[0].majority_class, color=drawing.MUTED, linewidth=1.0, linestyle=":", label="majority class", zorder=1)
    _frame(drawn, results, [axes for axes, _, _ in panels])
    return drawn


_SMALL: dict[str, Any] = {"markersize": 3.5, "linewidth": 1.3, "elinewidth": 0.9, "capsize": 0}


def _draw_gains(results: "StudyResults") -> "Drawing":
    """As `_draw_scores`: after less before."""
    from plasticity_jax.report import drawing, scores

    drawn, panels = _over_points(results, "gain")
    for axes, (metric, _, tasks), found in panels:
        axes.axhline(0.0, color=drawing.REFERENCE, linewidth=1.0, zorder=1)
        drawing.seed_lines(axes, results, scores.by_seed(results, tasks, metric, gain=True), drawing.SERIES[0])
        drawing.interval_line(axes, results, found, "gain", color=drawing.SERIES[0], marker="o", label="gain", **_SMALL)
        differences = [row for row in found if row["gain_difference"] is not None]
        if differences:
            label = f"less the gain at {results.axis.equation(differences[0][f'reference_{results.axis.field}'])}"
            style: dict[str, Any] = _SMALL | {"color": drawing.SERIES[4], "marker": "D", "linestyle": "none", "label": label, "shift": 0.02}
            drawing.interval_line(axes, results, differences, "gain_difference", **style)
    _frame(drawn, results, [axes for axes, _, _ in panels])
    return drawn


def _over_points(results: "StudyResults", name: str) -> tuple["Drawing", list[tuple[Any, tuple[str, str, tuple[str, ...]], Rows]]]:
    """Small multiples of the rows that have a number: the figure, and of every panel its axes, (metric, task, tasks) and rows."""
    from plasticity_jax.report import drawing, scores

    shown = [
        ((metric, task, tasks), found)
        for metric in scores.compared_metrics(results)
        for task, tasks in scores.tasks_with(results, metric).items()
        if (found := [row for row in gain_rows(results) if (row["metric"], row["task"]) == (metric, task) and row[name] is not None])
    ]
    cells = [
        (_heading(metric), task + ("" if task in results.learned or task == scores.MEAN else " (not learned)")) for (metric, task, _), _ in shown
    ]
    drawn, panels = drawing.small_multiples(cells, ticks=[results.axis.text(point) for point in results.points])
    return drawn, [(axes, about, found) for axes, (about, found) in zip(panels, shown)]


def _frame(drawn: "Drawing", results: "StudyResults", panels: Sequence[Any]) -> None:
    """The x axes of small multiples over the points, and their legend."""
    from plasticity_jax.report import drawing

    for axes, last in zip(panels, drawing.lowest(panels)):
        drawing.swept_axis(axes, results, label=last, small=True)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    ordered = sorted(handles, key=lambda label: label not in ("after", "gain"))  # those with intervals come last by themselves
    drawing.frame_multiples(drawn, [handles[label] for label in ordered], results.axis.label)


def _draw_correlation(results: "StudyResults") -> "Drawing":
    """A panel per metric: score against held-out loss, a line per task over the points, means over seeds; faint dots: each model."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    from plasticity_jax.report import drawing, scores

    metrics = [metric for metric in scores.compared_metrics(results) if scores.tasks_with(results, metric)]
    drawn, panels = drawing.small_multiples([(_heading(metric), "") for metric in metrics], height=1.9, top=0.85)
    styles = drawing.task_styles(results.tasks, scores.MEAN)
    losses = {m.member.seed: {} for m in results.members}
    for m in results.members:
        losses[m.member.seed] |= {m.point: m.loss} if m.loss is not None else {}
    for axes, metric in zip(panels, metrics):
        for task, tasks in scores.tasks_with(results, metric).items():
            of_seeds, style = scores.by_seed(results, tasks, metric), styles[task]
            means = sorted((results.losses[p], score) for p, score in scores.seed_mean(of_seeds, results.losses).items())
            axes.plot([x for x, _ in means], [y for _, y in means], markersize=4, label=task, **style)
            models = [(losses[seed][p], y) for seed, found in of_seeds.items() for p, y in found.items() if p in losses[seed]]
            if len(of_seeds) > 1 and models:
                axes.scatter(*zip(*models), s=8, color=style["color"], alpha=0.35, linewidths=0)
        _mark_losses(axes, results, labels=axes.get_position().y1 > 0.99 * max(other.get_position().y1 for other in panels))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes, last in zip(panels, drawing.lowest(panels)):
        axes.tick_params(axis="x", labelbottom=last)
    shown = [task for task in styles if any(task in scores.tasks_with(results, metric) for metric in metrics)]
    handles = [Line2D([], [], markersize=4, label=task, **styles[task]) for task in shown]
    drawing.frame_multiples(drawn, handles, f"held-out loss (nats per token); above the panels: {results.axis.symbol}")
    return drawn


def _mark_losses(axes: Any, results: "StudyResults", *, labels: bool) -> None:
    """A line at each point's loss, and its value along the top, in as many rows as neighbors need that are too close for one."""
    from plasticity_jax.report import drawing

    rows: list[float] = []  # the last loss of each row
    near = 0.08 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for point, loss in sorted(results.losses.items(), key=lambda item: item[1]):
        axes.axvline(loss, color=drawing.REFERENCE, linewidth=0.7, linestyle=":", zorder=1)
        row = next((i for i, last in enumerate(rows) if loss - last > near), min(len(rows), 2))
        rows[row : row + 1] = [loss]
        if labels:
            style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(results.axis.text(point), (loss, 1.0), xytext=(0, 9 * row), fontsize=7, color=drawing.INK, annotation_clip=False, **style)
    if labels:
        axes.set_title(axes.get_title(loc="left"), pad=4 + 9 * len(rows))


def _correlation_numbers(results: "StudyResults") -> str:
    from plasticity_jax.report import scores

    losses = f"Held-out loss: {scores.spoken(results, results.losses, 4)}. Score after fine-tuning: "
    return losses + scores.spoken_rows(results, "after")


def _draw_aggregate(results: "StudyResults") -> "Drawing":
    """Mean rank, 1 at the top, and mean z-score over the points."""
    from plasticity_jax.report import drawing, scores

    found = scores.aggregate(results)
    drawn, panels = drawing.panels_below(2, 2.1)
    for axes, (of, label) in zip(panels, (("ranks", "mean rank"), ("z", "mean z-score"))):
        values: dict[str, float] = getattr(found, of)
        drawing.seed_means(axes, results, values_of(values), drawing.SERIES[0])
        rows = [
            {results.axis.field: p, "value": one.value, "value_lower": one.low, "value_upper": one.high}
            for p, one in scores.aggregate_contrasts(results, of).items()
        ]
        drawing.interval_line(axes, results, rows, "value", color=drawing.SERIES[0], marker="o", label=label)
        axes.set_ylabel(label)
        drawing.swept_axis(axes, results, label=axes is panels[-1])
    panels[0].set_ylim(found.models + 0.4, 0.6)  # intervals of few seeds reach beyond any rank
    panels[0].set_title(f"1: best of {found.models}")
    panels[1].set_title("Above 0: better than the mean model")
    panels[1].axhline(0.0, color=drawing.REFERENCE, linewidth=1.0, zorder=1)
    return drawn


def values_of(values: dict[str, float]) -> "Callable[[MemberResults], float | None]":
    """Looks a model up by its name."""
    return lambda m: values.get(m.name)


def _aggregate_numbers(results: "StudyResults") -> str:
    from plasticity_jax.report import scores

    found = {of: {p: one.value for p, one in scores.aggregate_contrasts(results, of).items()} for of in ("ranks", "z")}
    return f"Mean rank: {scores.spoken(results, found['ranks'])}. Mean z-score: {scores.spoken(results, found['z'])}."


def _aggregate_notes(results: "StudyResults") -> list[str]:
    from plasticity_jax.report import scores

    return list(scores.aggregate(results).notes)


def _reward_notes(results: "StudyResults") -> list[str]:
    rated = [score.scorer for m in results.members for score in m.after.values() if score.scorer is not None]
    if not rated:
        return [
            "No rewards, so neither RM nor ORM Score: "
            + ("no run has finished." if results.config.reward.scorer != "none" else "reward.scorer is none.")
        ]
    before = any(score.scorer is not None for m in results.members for score in m.before.values())
    return [] if before else ["Base models are rated only with faithful=True, so RM and ORM Score have no value before fine-tuning."]


def _spoken(name: str) -> "Callable[[StudyResults], str]":
    """A column of the gains in words."""

    def numbers(results: "StudyResults") -> str:
        from plasticity_jax.report import scores

        return scores.spoken_rows(results, name)

    return numbers


def _has_aggregate(results: "StudyResults") -> bool:
    from plasticity_jax.report import scores

    return bool(scores.aggregate(results).ranks)


def _measures(results: "StudyResults"):
    from plasticity_jax.report.verdicts import score_measure

    return [score_measure(results.learned, gain=False), score_measure(results.learned, gain=True)]


STAGE = Stage(
    name="evaluate",
    title="answers to the test rows of every task, graded",
    version=3,
    run=run,
    record=Evaluated,
    parents={"model": ("pretrain", "finetune"), "task": "prepare"},
    plan=_plan,
    devices="all",
    batched=Batched(_program, run_batch, _bytes),
    programs=_programs,
    work=work,
    tables={
        "scores": Table(_score_rows, on_page=False),
        "metrics": Table(_metric_rows, on_page=False),
        "macro": Table(macro_rows, on_page=False),
        "out_of_domain": Table(out_of_domain_rows, on_page=False, optional=True),
        "regraded": Table(
            regraded_rows,
            title="Completions graded again",
            caption="Metrics of the same completions as first graded, and graded again the clean way or as the original does (evaluate --regrade).",
            optional=True,
        ),
        "gains": Table(gain_rows, on_page=False),
        "aggregate": Table(
            aggregate_rows,
            title="All tasks and metrics as one number",
            caption="Means over learned tasks x metrics of a model’s rank (1 is the best) and z-score among the models of its pretraining seed; `scores` "
            "counts them, `models` those compared. What is left out stands below the figure (docs/statistics.md).",
            optional=True,
        ),
        "correlation": Table(correlation_rows, on_page=False),
    },
    figures={
        "scores": Figure(
            "Score after fine-tuning, every metric",
            "By task, and averaged over the tasks that were learned: after fine-tuning, and before it with the same prompts and grader. 95% intervals, over "
            "pretraining seeds where there are several, over problems only where there is one. {seeds}",
            lambda results: any(m.after for m in results.members),
            _draw_scores,
            section="finetuning",
            of_base=False,
            wide=True,
            notes=_reward_notes,
            numbers=_spoken("after"),
        ),
        "gains": Figure(
            "Gain from fine-tuning, every metric",
            "After less before, paired by problem. Diamonds: difference from the gain at the {first} {symbol}, paired by seed and problem. 95% intervals, "
            "over pretraining seeds where there are several, over problems only where there is one. {seeds}",
            lambda results: any(row["gain"] is not None for row in gain_rows(results)),
            _draw_gains,
            section="finetuning",
            of_base=False,
            wide=True,
            numbers=_spoken("gain"),
        ),
        "correlation": Figure(
            "Loss against score, every metric",
            "Does a lower held-out loss go with a better score after fine-tuning? One point per {symbol} and task, a mean over pretraining seeds. {seeds}",
            lambda results: bool(results.losses) and any(m.after for m in results.members),
            _draw_correlation,
            section="finetuning",
            of_base=False,
            wide=True,
            numbers=_correlation_numbers,
        ),
        "aggregate": Figure(
            "All tasks and metrics as one number",
            "Mean over learned tasks and metrics of a model’s rank and of its z-score among the models of its pretraining seed. 95% intervals over seeds "
            "where there are several. {seeds}",
            _has_aggregate,
            _draw_aggregate,
            section="finetuning",
            of_base=False,
            notes=_aggregate_notes,
            numbers=_aggregate_numbers,
        ),
    },
    measures=_measures,
    warnings=_warnings,
)
