"""Prepare: one run each for the corpus, every task and every probe set. Needs no accelerator."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import DataConfig, StudyConfig, TaskConfig
from plasticity_jax.config.schema import TABLE_FIELDS
from plasticity_jax.errors import UserError
from plasticity_jax.runs.run import Run
from plasticity_jax.stages.stage import Context, Plan, Planned, Stage

if TYPE_CHECKING:
    from plasticity_jax.data.tasks import Rows

SEED = 0  # of the choice of rows; fixed, so that a task's rows depend only on its settings


def corpus_run(config: StudyConfig) -> Run:
    """Documents, tokenizer and token records of the pretraining corpus."""
    from plasticity_jax.data.fingerprints import corpus_fields, tokenizer_fields

    fields = {"kind": "corpus", **corpus_fields(config.data), "vocab_size": config.model.vocab_size, "seq_len": config.train.seq_len}
    if config.grid.models:  # those with one tokenizer share the records, whatever else lies beside it
        fields |= tokenizer_fields(config.data.tokenizer, config.model.vocab_size)
    return STAGE.new_run(config, "corpus", fields)


def task_run(config: StudyConfig, task: str) -> Run:
    """Train, validation and test rows of a fine-tuning task."""
    from plasticity_jax.data.fingerprints import task_files
    from plasticity_jax.data.tasks import code_of, get_task
    from plasticity_jax.data.tasks.table import places

    settings, made = task_settings(config, task), get_task(task, config.tasks)
    fields = {
        "kind": "task",
        "train_rows": settings.train_rows,
        "test_rows": settings.test_rows,
        "held_out_fraction": config.data.held_out_fraction,
        "validation_rows": settings.validation_rows,
        "verifier_rows": settings.verifier_rows,
        "wheels": pinned(made.packages),
    }
    if made.version > 1:
        fields["version"] = made.version
    if files := places(settings):
        fields["files"] = task_files(files)
    if settings.of_table:
        fields["table"] = {field: getattr(settings, field) for field in TABLE_FIELDS if field not in ("rows", "grader")}
    if code := code_of(task, config.tasks):
        fields["code"] = code
    return STAGE.new_run(config, f"task-{task}", fields, task=task)


def probe_set_run(config: StudyConfig, name: str, *, train_rows: int, test_rows: int) -> Run:
    """Labeled train and test texts for linear probes."""
    from plasticity_jax.data.probe_files import content
    from plasticity_jax.data.probe_sets import get_probe_set

    files = config.probe.files.get(name)

    fields = {
        "kind": "probe-set",
        "set": name,
        "train_rows": train_rows,
        "test_rows": test_rows,
        "held_out_fraction": config.data.held_out_fraction,
        "wheels": pinned(() if files else get_probe_set(name).packages),
    }
    if files:
        fields["files"] = content(files)
    return STAGE.new_run(config, f"probe-{name}", fields)


def data_runs(config: StudyConfig) -> list[Run]:
    """The data that the runs of one member read: the corpus, the tasks, and what other stages ask for."""
    from plasticity_jax.stages import stages

    asked = [run for stage in stages().values() if stage.data is not None for run in stage.data(config)]
    corpus = [corpus_run(config)] if config.data.has_text else []
    return [*corpus, *(task_run(config, task) for task in config.tasks), *asked]


def task_settings(config: StudyConfig, task: str) -> TaskConfig:
    """The config's settings for a task. Raises UserError for a task that the config does not list."""
    from plasticity_jax.data.tasks import get_task

    get_task(task, config.tasks)  # an unknown name is refused with the nearest known one
    if task not in config.tasks:
        raise UserError(
            f"task {task!r} has no settings in this config, which lists {', '.join(config.tasks) or 'none'}; add config.tasks.{task} = task(...) to it."
        )
    return config.tasks[task]


def pinned(packages: Iterable[str]) -> dict[str, str]:
    """Package → sha256 of its pinned wheel."""
    from plasticity_jax.data.wheels import pins

    known = pins()
    return {package: known[package].sha256 for package in packages}


def _plan(plan: Plan) -> Iterable[Planned]:
    for own, _ in plan.members:
        yield from ((own, run) for run in data_runs(own))


def _check(config: StudyConfig, runs: Sequence[Run]) -> None:
    """Refuses a corpus, wheels or files of tasks and probe sets that are not here, or not what they should be."""
    from plasticity_jax.config import grid_members, member_config
    from plasticity_jax.data.probe_files import read_labeled
    from plasticity_jax.data.tasks.originals import check_places
    from plasticity_jax.data.wheels import Wheels, brought, wheels_dir

    members = [member_config(config, member) for member in grid_members(config)]
    asked = {run.id for run in runs}
    for data in {own.data for own in members if own.data.has_text and corpus_run(own).id in asked}:
        _open_stream(data)
    wheels = Wheels(wheels_dir(config.data.wheels))
    for run in runs:
        for package in () if brought(wheels.directory) else run.fields.get("wheels", ()):
            wheels.check(package)
        if run.task is not None and config.tasks[run.task].of_table:
            check_table(config, run.task)
        elif run.task is not None:
            for name, places in config.tasks[run.task].files.items():
                check_places(places, what=f"tasks.{run.task}.files.{name}")
        if run.fields["kind"] == "probe-set" and (files := config.probe.files.get(run.fields["set"])):
            read_labeled(run.fields["set"], files)


def check_table(config: StudyConfig, name: str) -> None:
    """Reads all rows of a table. Raises UserError: see `table.questions`; or the grader does not find the answer of a row in its own response, or takes
    one label for another."""
    from plasticity_jax.data.tasks import get_task
    from plasticity_jax.data.tasks.table import questions
    from plasticity_jax.evaluate.answers import check_gradable
    from plasticity_jax.evaluate.stop_strings import cut_at_stop

    rows = [question.row for _, question in questions(name, config.tasks[name])]
    check_gradable(
        [replace(row, response=cut_at_stop(row.response, config.evaluate.stop)) for row in rows], get_task(name, config.tasks), f"tasks.{name}.grader"
    )


def edited_since(config: StudyConfig, run: Run, finished: float) -> str | None:
    """Which local file of a prepared task or probe set was edited since; None where all are as they were, or not here.

    Args:
      finished: when the run was, in seconds since 1970. Files that are older are not read.
    """
    from plasticity_jax.data.content import content_hash
    from plasticity_jax.data.fingerprints import newest, task_files
    from plasticity_jax.data.probe_files import content
    from plasticity_jax.data.tasks.module import module_file
    from plasticity_jax.data.tasks.table import places

    task, probe = config.tasks.get(run.task or ""), config.probe.files.get(run.fields.get("set", ""))
    if task is not None and task.module is not None:
        file = module_file(task.module)
        if content_hash(file) not in (None, run.fields.get("code")):
            return f"{file} was edited since"
    files = {"train": probe.train, "test": probe.test} if probe is not None else {} if task is None else places(task)
    newer = {name: place for name, place in files.items() if place is not None and (newest(place) or 0) > finished}
    if not newer:
        return None
    now, before = content(probe) if probe is not None else task_files(newer), run.fields.get("files", {})
    return next((f"{place} was edited since" for name, place in newer.items() if now[name] != before.get(name)), None)


def _open_stream(data: DataConfig) -> Any:
    """The corpus in the user's own files or TFDS data set; None for the named sources."""
    if data.token_files is not None:
        from plasticity_jax.data.token_files import find_token_files

        find_token_files(data.token_files, data.token_dtype)  # raises what is wrong with them
    if data.files is None and data.tfds is None:
        return None
    from plasticity_jax.data.streaming import open_corpus

    return open_corpus(files=data.files, tfds=data.tfds, tfds_split=data.tfds_split, text_field=data.text_field)


def run(context: Context) -> dict[str, Any]:
    """Carries out one prepare run; its summary, with a content fingerprint, is the result."""
    from plasticity_jax.runs.storage import staging

    # Record files and data sets are written by libraries that know local files only.
    with staging(context.directory.path) as out:
        return _prepare(context, out)


def _prepare(context: Context, out: Path) -> dict[str, Any]:
    from plasticity_jax.data import probe_sets, tasks
    from plasticity_jax.data.wheels import Wheels, wheels_dir

    config, fields = context.config, context.run.fields
    wheels = Wheels(wheels_dir(config.data.wheels))
    if fields["kind"] == "corpus":
        summary = _corpus(config, out, wheels)
        context.directory.provenance["data_fingerprint"] = summary["fingerprint"]
        return summary
    if fields["kind"] == "task":
        return tasks.write_task(out, task_rows(config, context.task))
    rows = {name: fields[name] for name in ("train_rows", "test_rows", "held_out_fraction")}
    name, files = fields["set"], config.probe.files.get(fields["set"])
    probe_set = probe_sets.probe_set_of_files(name, files) if files else probe_sets.get_probe_set(name)
    return probe_sets.write_probe_set(out, probe_sets.build_probe_set(probe_set, wheels, **rows, seed=SEED))


def task_rows(config: StudyConfig, task: str) -> "Rows":
    """The rows of a task as the config asks for them. Raises UserError: see `build_task`."""
    from plasticity_jax.data.tasks import build_task
    from plasticity_jax.data.wheels import Wheels, wheels_dir

    settings = task_settings(config, task)
    return build_task(
        task,
        Wheels(wheels_dir(config.data.wheels)),
        train_rows=settings.train_rows,
        test_rows=settings.test_rows,
        held_out_fraction=config.data.held_out_fraction,
        seed=SEED,
        validation_rows=settings.validation_rows,
        verifier_rows=settings.verifier_rows,
        files=settings.files,
        own=config.tasks,
    )


def _corpus(config: StudyConfig, out: Path, wheels: Any) -> dict[str, Any]:
    from plasticity_jax.data.named_tokenizers import open_tokenizer
    from plasticity_jax.data.prepare import prepare_corpus
    from plasticity_jax.data.streaming import prepare_stream

    data, stream = config.data, _open_stream(config.data)
    if data.token_files is not None:
        return _tokens(config, out, wheels)
    tokenizer = open_tokenizer(data.tokenizer, wheels, vocab_size=config.model.vocab_size)
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": config.model.vocab_size,
        "seq_len": config.train.seq_len,
        "held_out_fraction": data.held_out_fraction,
    }
    if stream is None:
        return prepare_corpus(out, sources=data.sources, wheels_dir=wheels.directory, max_documents=data.max_documents, **common)
    return prepare_stream(out, stream, text_field=data.text_field, max_tokens=data.max_tokens, workers=data.workers, **common)


def _tokens(config: StudyConfig, out: Path, wheels: Any) -> dict[str, Any]:
    from plasticity_jax.data.named_tokenizers import open_tokenizer
    from plasticity_jax.data.token_files import find_token_files, prepare_tokens

    data, tokenizer = config.data, open_tokenizer(config.data.tokenizer, wheels, vocab_size=config.model.vocab_size)
    assert data.token_files is not None and tokenizer is not None  # `DataConfig.check`
    return prepare_tokens(
        out,
        find_token_files(data.token_files, data.token_dtype),
        dtype=data.token_dtype,
        eos_id=tokenizer.eos_id if data.token_eos_id is None else data.token_eos_id,
        tokenizer=tokenizer,
        seq_len=config.train.seq_len,
        held_out_fraction=data.held_out_fraction,
        max_tokens=data.max_tokens,
    )


STAGE = Stage(
    name="prepare",
    title="corpus, tokenizer, token records, task and probe files",
    run=run,
    plan=_plan,
    check=_check,
    devices="none",
    job="prepare",
)
