"""Finished completions graded again: with the graders as they are now, or the other way, and without a model."""

from collections.abc import Iterator
from dataclasses import asdict

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes
from plasticity_jax.runs.directory import COMPLETIONS, CONFIG, RunDirectory, open_run
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages.evaluate import is_regraded, regrade, regraded_run
from plasticity_jax.study.execute import Outcome
from plasticity_jax.study.graph import study_dir


def regrade_completions(
    config: StudyConfig, workdir: AnyPath, *, model: AnyPath | None = None, task: str | None = None, faithful: bool | None = None
) -> Outcome:
    """Grades the finished completions of a study again, each into a run of its own beside the first, which stays as it is.

    Args:
      model, task: of which evaluations; None takes all.
      faithful: as the original grades, or not; None: as each evaluation was graded, with the graders as they are now.
    Raises:
      UserError: no finished completions, or no model at `model`.
    """
    folder = study_dir(workdir, config)
    # Process 0 alone: there is nothing to do for devices.
    done, skipped = processes.broadcast(lambda: _regrade_all(folder, None if model is None else _model_id(model, config), task, faithful))
    return Outcome(done, skipped, [], [], [], {run_id: folder / run_id for run_id in [*done, *skipped]})


def _regrade_all(folder: AnyPath, model: str | None, task: str | None, faithful: bool | None) -> tuple[list[str], list[str]]:
    sources = [s for s in _evaluations(folder) if task in (None, s.run().task) and model in (None, s.run().parents["model"])]
    if not sources:
        of = "".join(f" {what} {which}" for what, which in (("of task", task), ("by model", model)) if which is not None)
        raise UserError(f"--regrade: {folder / 'evaluate'} holds no finished completions{of}; run plasticity evaluate without --regrade first.")
    done, skipped = [], []
    for source in sources:
        run = regraded_run(source.run(), faithful)
        directory = RunDirectory(folder / run.id)
        if directory.done:
            skipped.append(run.id)
            continue
        with directory.work(run, source.config()):
            directory.finish(asdict(regrade(directory, run, source)))
        done.append(run.id)
    return done, skipped


def _evaluations(folder: AnyPath) -> Iterator[RunDirectory]:
    """The finished evaluate runs that generated completions."""
    for file in sorted(folder.glob(f"evaluate/*/{CONFIG}")):
        directory = RunDirectory(file.parent)
        if directory.done and (directory.path / COMPLETIONS).is_file() and not is_regraded(directory.run()):
            yield directory


def _model_id(path: AnyPath, config: StudyConfig) -> str:
    from plasticity_jax.model.hf_import import import_run, is_hugging_face

    return import_run(path, config)[0].id if is_hugging_face(path) else open_run(path).run().id
