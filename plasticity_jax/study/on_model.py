"""Runs of single stages on a model that is given by its directory: of this study, of another one, or a Hugging Face folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from plasticity_jax.config import Member, StudyConfig, member_config
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes
from plasticity_jax.runs.directory import ASKED, STUDY, RunDirectory, open_run
from plasticity_jax.runs.jsonfiles import write_json
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, make_folder
from plasticity_jax.stages.prepare import data_runs
from plasticity_jax.study.execute import Outcome, check_before_writing, execute, resolve
from plasticity_jax.study.graph import build_graph, read_study, run_configs, save_study, study_dir


def run_on_model(
    config: StudyConfig,
    workdir: AnyPath,
    path: AnyPath,
    flag: str,
    make: Callable[[StudyConfig, Run], Sequence[Run]],
    member: Member | None = None,
    *,
    fail_fast: bool = False,
) -> Outcome:
    """Carries out runs on a model, with the prepare runs that they need. A Hugging Face folder is imported into the study first.

    Args:
      path: directory of the model.
      flag: what the user named it with, for messages.
      make: (config to carry out with, the model's run) → runs.
      member: whose fine-tuning recipe to use.
      fail_fast: stop at the first run that fails.
    Raises:
      UserError: no model at `path`, or whatever a stage refuses.
    """
    from plasticity_jax.model.hf_import import import_model, import_run, imported_from, is_hugging_face, with_network
    from plasticity_jax.model.load import MODEL_STAGES

    given, folder = path, path if is_hugging_face(path) else None
    directory = open_run(path) if folder is None else None
    if directory is not None and directory.run().stage not in MODEL_STAGES:
        raise UserError(
            f"{flag}={path} is a {directory.run().stage} run and holds no model; give the directory of a pretrain, finetune or import run."
        )
    study = own = resolve(config, workdir)
    graph = build_graph(study)
    listed = {run.id: run for run in graph}
    if directory is None:
        model, own = import_run(path, study)
        path = study_dir(workdir, study) / model.id
    else:
        model = directory.run()
        own = run_configs(study, [model])[model.id]
        if imported_from(directory) is not None:
            own = with_network(own, directory.config().model, path)
    model = listed.get(model.id, model)  # which says whose base it is
    if member is not None:
        own = replace(own, finetune=member_config(study, member).finetune)
    runs = make(own, model)
    external = {model.id: path.resolve()}
    corpus = path.resolve().parents[1] / model.parents["corpus"] if "corpus" in model.parents else None
    if corpus is not None and corpus.is_dir():
        external[model.parents["corpus"]] = corpus
    parents = {parent for run in runs for parent in run.parents.values()}
    needed = [run for run in data_runs(own) if run.id in parents - set(external)]

    def begin() -> None:
        home = study_dir(workdir, study)
        if not (home / STUDY).is_file():
            save_study(workdir, study, graph)
        known = {run.id for run in read_study(home / STUDY)[1]}
        for run in [*needed, *runs, *([model] if folder is not None else [])]:
            if run.id not in known and not (home / run.id / ASKED).is_file():
                make_folder(home / run.id)
                write_json(home / run.id / ASKED, {"flag": flag, "model": str(given)})
        if folder is not None and not RunDirectory(path).done:
            import_model(folder, path, model, own)

    check_before_writing(own, workdir, runs, study=study)
    processes.broadcast(begin)
    return execute(own, workdir, [*needed, *runs], external=external, fail_fast=fail_fast)
