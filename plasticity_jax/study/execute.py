"""Carries out runs in order: skips what is done, goes on after a failure, stops when the disk does."""

import contextlib
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plasticity_jax.config import RewardConfig, StudyConfig, for_device, grid_members, member_config
from plasticity_jax.errors import UserError, reason
from plasticity_jax.parallel import processes
from plasticity_jax.runs.records import SAMPLES, Context, Run, RunDirectory, read_json, to_json
from plasticity_jax.runs.storage import AnyPath, check_writable, free_bytes, location, relative
from plasticity_jax.study.graph import corpus_run, init_run, run_configs, study_dir

log = logging.getLogger("plasticity_jax")

_TOGETHER = (
    "pretrain",
    "finetune",
    "evaluate",
    "samples",
    "verifier",
    "reward",
    "zero_shot",
)  # stages that all processes of a run carry out at once; the others are the first one's

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}
_STORAGE_WORDS = ("no space left on device", "read-only file system", "disk quota exceeded")


def stage_function(stage: str) -> Callable[[Sequence[Context]], list[dict]]:
    """The library function of a stage, as contexts → results. Imported only when it is needed."""
    if stage == "pretrain":
        from plasticity_jax.train.pretrain import run

        return run
    if stage == "prepare":
        from plasticity_jax.data.stage import run as one
    elif stage == "init":
        from plasticity_jax.train.initial import run as one
    elif stage == "finetune":
        from plasticity_jax.train.finetune import run as one
    elif stage in ("evaluate", "samples"):
        from plasticity_jax.evaluate.evaluate import run as one
    elif stage == "verifier":
        from plasticity_jax.train.verifier import run as one
    elif stage == "reward":
        from plasticity_jax.evaluate.reward import run as one
    elif stage == "zero_shot":
        from plasticity_jax.evaluate.zero_shot import run as one
    elif stage == "probe":
        from plasticity_jax.analysis.probes import run as one
    elif stage == "spectra":
        from plasticity_jax.analysis.spectra import run as one
    else:
        from plasticity_jax.analysis.gap import run as one
    return lambda contexts: [one(context) for context in contexts]


def resolve(config: StudyConfig, workdir: AnyPath) -> StudyConfig:
    """Replaces `train.compute_dtype = "auto"` by what this study uses: the value stored with it, or that of this platform."""
    if config.train.compute_dtype != "auto":
        return config
    dtype = processes.broadcast(lambda: _compute_dtype(study_dir(workdir, config) / "study.json"))
    return replace(config, train=replace(config.train, compute_dtype=dtype))


def _compute_dtype(stored: AnyPath) -> str:
    if stored.is_file():
        dtype = read_json(stored).get("resolved", {}).get("compute_dtype")
        if dtype:
            return dtype
    from plasticity_jax.train.precision import resolve_compute_dtype

    dtype = resolve_compute_dtype("auto")
    log.info("train.compute_dtype auto → %s on this platform", dtype)
    return dtype


def check_start(config: StudyConfig, workdir: AnyPath, runs: Sequence[Run]) -> None:
    """Refuses runs whose corpus is not here, or whose settings this machine's devices do not take, before anything is written. Raises UserError."""
    own = [member_config(config, member) for member in grid_members(config)]
    todo = [run for run in runs if not RunDirectory(study_dir(workdir, config) / run.id).done]
    for data in {c.data for c in own if corpus_run(c).id in {run.id for run in todo}}:
        if data.files is not None or data.tfds is not None:
            from plasticity_jax.data.streaming import open_corpus

            open_corpus(files=data.files, tfds=data.tfds, tfds_split=data.tfds_split, text_field=data.text_field)
    for run in todo:
        if run.stage == "prepare" and run.task is not None:
            _check_task_files(run.task, config.tasks[run.task].files)
    if {run.stage for run in todo} & {"pretrain", "finetune"}:
        _check_devices(own)
    if "reward" in {run.stage for run in todo} and config.reward.model is not None:
        _check_reward_model(config.reward)
    if "zero_shot" in {run.stage for run in todo}:
        from plasticity_jax.evaluate.zero_shot import check_installed

        check_installed()
    if config.max_device_hours is not None and "pretrain" in {run.stage for run in todo}:
        from plasticity_jax.train.check import refuse_over_budget

        refuse_over_budget(config)


def _check_task_files(task: str, files: dict[str, str]) -> None:
    from plasticity_jax.data.tasks.originals import check_places

    for name, places in files.items():
        check_places(places, what=f"tasks.{task}.files.{name}")


def _check_reward_model(reward: RewardConfig) -> None:
    if reward.scorer == "sequence-classification":
        from plasticity_jax.evaluate.reward_model import check_folder

        check_folder(location(reward.model))
    elif not location(reward.model).is_dir():
        raise UserError(
            f"reward.model={reward.model}: no such directory; give a finished run, a Hugging Face folder, or None for the model that wrote."
        )


def _check_devices(members: Sequence[StudyConfig]) -> None:
    import jax

    from plasticity_jax.model.kernels import choose_kernel
    from plasticity_jax.parallel.batches import check_batch_size
    from plasticity_jax.parallel.mesh import make_mesh

    device = jax.devices()[0]
    for config in (for_device(own, device.device_kind) for own in members):
        mesh = make_mesh(config.mesh)
        check_batch_size(mesh, config.train.batch_size, config.train.grad_accum_steps, "train")
        if config.tasks:
            check_batch_size(mesh, config.finetune.batch_size, config.finetune.grad_accum_steps, "finetune")
        choose_kernel(
            config.train.attention,
            platform=device.platform,
            head_dim=config.model.head_dim,
            compute_dtype=config.train.compute_dtype,
            seq_len=config.train.seq_len,
        )


def check_workdir(workdir: AnyPath, config: StudyConfig) -> None:
    """Refuses a workdir that cannot be written to, or has less room than the study's files need. Raises UserError."""
    try:
        check_writable(workdir)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to ({error.strerror}); give a folder on a writable disk with free space.") from error
    free = free_bytes(workdir)
    if free is None:
        return
    needed = _bytes_needed(config) - _held_bytes(study_dir(workdir, config))
    if free < needed:
        raise UserError(
            f"--workdir={workdir} has {free / 1e6:,.0f} MB free, and this study needs about {needed / 1e6:,.0f} MB more; make room or give another --workdir."
        )


def _held_bytes(folder: Path) -> int:
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # other jobs of the study write and delete meanwhile
                held += os.stat(os.path.join(parent, name)).st_size
    return held


def _bytes_needed(config: StudyConfig) -> int:
    """Rough size of a study on disk: float32 parameters and two moments per pretrained model (twice while one is being saved), parameters of each tuned one, data."""
    members = [(member_config(config, member), member) for member in grid_members(config)]
    tuned = len(config.tasks) * len(config.finetune.seeds)
    models = sum(_parameters(own) * (1 + tuned) for own, _ in members)
    starts = sum({init_run(own, 0).id: _parameters(own) for own, _ in members}.values())
    data = sum({corpus_run(own).id: _data_bytes(own) for own, _ in members}.values())
    return int(12 * (models + starts) + data + 10e6)


def _parameters(config: StudyConfig) -> int:
    from plasticity_jax.model.param_count import count_params

    return count_params(config.model)


def _data_bytes(config: StudyConfig) -> float:
    data, sources = config.data, len(config.data.sources)
    if data.files is not None or data.tfds is not None:
        return 4.0 * (data.max_tokens or 0)  # what is not limited is not known before it is read
    return 30e6 * sources if config.data.max_documents is None else 20e3 * config.data.max_documents * sources


def check_shared(workdir: AnyPath) -> None:
    """Refuses a workdir that the processes of a run do not share. Raises UserError on all of them."""
    if processes.count() == 1:
        return
    token = workdir / processes.broadcast(lambda: f".shared-{uuid.uuid4().hex}")
    processes.broadcast(lambda: token.write_text("shared", encoding="utf-8"))
    try:
        seen = processes.gather("shared", _appears(token))
    finally:
        processes.broadcast(lambda: token.unlink(missing_ok=True))
    blind = [str(i) for i, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"--workdir={workdir} is not the same folder for process {', '.join(blind)} as for process 0; give a folder on a disk that all hosts share."
        )


def _appears(path: AnyPath) -> bool:
    for attempt in range(20):  # a network file system shows another host's file after some seconds
        if path.exists():
            return True
        if attempt == 2:
            log.warning("waiting up to 10 s for %s, which process 0 has written", path)
        time.sleep(0.5)
    return False


@dataclass
class Outcome:
    """What became of the runs asked for: ids of those carried out, skipped as done, failed, and not reached because a parent is missing."""

    carried_out: list[str]
    skipped: list[str]
    failed: list[str]
    waiting: list[str]


def execute(config: StudyConfig, workdir: AnyPath, runs: Sequence[Run], *, external: dict[str, AnyPath] | None = None) -> Outcome:
    """Carries out the runs that are not done, parents first.

    A run that fails is recorded and the rest goes on. A diverged parent makes its children diverged: that is a result.

    Args:
      runs: in topological order, as build_graph gives them.
      external: id → directory of parents that lie outside this study's folder.
    Raises:
      UserError: the disk is full or read-only, or another process works on the same run.
      KeyboardInterrupt: passed on; what is done stays done, and the next call resumes.
    """
    folder = study_dir(workdir, config)
    outcome = Outcome([], [], [], [])
    located = {run.id: folder / run.id for run in runs} | (external or {})

    def path_of(run_id: str) -> AnyPath:
        return located.get(run_id, folder / run_id)

    done = set(processes.broadcast(lambda: [run.id for run in runs if RunDirectory(path_of(run.id)).done]))
    outcome.skipped = [run.id for run in runs if run.id in done]
    todo = [run for run in runs if run.id not in done]
    if not todo:
        return outcome
    if {run.stage for run in todo} != {"prepare"}:  # preparing needs no accelerator
        import jax

        config = for_device(config, jax.devices()[0].device_kind)
    groups, configs = _groups(config, todo), run_configs(config, todo)
    for number, group in enumerate(groups, 1):
        missing = processes.broadcast(
            lambda: [[parent for parent in run.parents.values() if not RunDirectory(path_of(parent)).done] for run in group]
        )
        for run, parents in zip(group, missing, strict=True):
            if parents:
                log.warning("%s waits for %s", run.id, ", ".join(parents))
                outcome.waiting.append(run.id)
        ready = [run for run, parents in zip(group, missing, strict=True) if not parents]
        if not ready:
            continue
        log.info("[%d/%d] %s", number, len(groups), ", ".join(run.id for run in ready))
        try:
            _carry_out(configs, ready, path_of, _refuse_storage_problems(workdir))
            outcome.carried_out += [run.id for run in ready]
        except (UserError, processes.Parted):
            raise
        except Exception as error:
            log.error("%s failed: %s (%s)", ready[0].id, reason(error), path_of(ready[0].id) / "error.log")
            outcome.failed += [run.id for run in ready]
    return outcome


def _groups(config: StudyConfig, runs: Sequence[Run]) -> list[list[Run]]:
    """Runs carried out by one call: each alone, but in vmapped mode the pretraining runs that differ in traced numbers only."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        together = config.grid.mode == "vmapped" and run.stage == "pretrain"
        groups.setdefault(_program(run) if together else run.id, []).append(run)
    return list(groups.values())


def _program(run: Run) -> str:
    """What pretraining runs of one compiled program have in common: all but the traced numbers (see `train.step.hyper_parameters`)."""
    train = {name: value for name, value in run.fields["train"].items() if name not in ("peak_lr", "warmup_fraction")}
    fields = {name: value for name, value in run.fields.items() if name != "weight_decay"}
    return to_json([fields | {"train": train}, run.parents])


def _carry_out(
    configs: dict[str, StudyConfig], group: Sequence[Run], path_of: Callable[[str], AnyPath], guarded: Callable[[Callable], Callable]
) -> None:
    """Of several processes, the first holds the runs' locks and writes their text files; the others take part in the stages of `_TOGETHER`."""
    with contextlib.ExitStack() as stack:
        contexts = []
        for run in group:
            directory = RunDirectory(path_of(run.id))
            parents = {role: path_of(parent) for role, parent in run.parents.items()}
            contexts.append(Context(configs[run.id], run, directory, parents))

        def begin() -> list[str]:
            for context in contexts:
                directory = stack.enter_context(context.directory.work(context.run, context.config))
                directory.provenance["parent_paths"] = {role: relative(path, directory.path) for role, path in context.parents.items()}
            gone = [role for role, path in contexts[0].parents.items() if RunDirectory(path).state()[0] == "diverged"]
            # A verifier learns from the samples of the members that are left.
            samples = [role for role in contexts[0].parents if role.startswith(SAMPLES)]
            return [role for role in gone if role not in samples] or (samples if samples and set(samples) <= set(gone) else [])

        def carry_out() -> None:
            start = time.monotonic()
            if diverged:
                results = [{"diverged": f"its {diverged[0]} diverged"} for _ in contexts]
            else:
                results = stage_function(group[0].stage)(contexts)
            if processes.primary():
                for context, result in zip(contexts, results, strict=True):
                    context.directory.provenance["seconds"] = time.monotonic() - start
                    context.directory.finish(result)

        # Guarded inside, so that every process hears of a storage problem as a refusal and stops.
        begin, carry_out = guarded(begin), guarded(carry_out)
        diverged = processes.broadcast(begin)
        if group[0].stage in _TOGETHER and not diverged:
            processes.together(carry_out)
        else:
            processes.broadcast(carry_out)


@contextlib.contextmanager
def _refuse_storage_problems(workdir: AnyPath) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        raise UserError(f"--workdir={workdir}: {problem}; make room or give another --workdir, then run again: it resumes.") from error


def storage_problem(error: BaseException) -> str | None:
    """Says in a few words that the disk is full or cannot be written, if that is what the error (or its cause) means."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
        for words in _STORAGE_WORDS:
            if words in str(error).lower():
                return words
        error = error.__cause__ or error.__context__
    return None
