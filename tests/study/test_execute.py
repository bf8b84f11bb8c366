import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from running import TINY, plasticity

from plasticity_jax.config import load_config
from plasticity_jax.errors import StudyRefused, UserError
from plasticity_jax.runs import storage
from plasticity_jax.runs.directory import ERROR_LOG, LOCK, RunDirectory
from plasticity_jax.runs.locks import lock
from plasticity_jax.stages import stages as declared
from plasticity_jax.study import execute as execution
from plasticity_jax.study.execute import check_workdir, execute
from plasticity_jax.study.graph import build_graph

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "tiny.py", [("train.compute_dtype", "float32")])
RUNS = build_graph(CONFIG)


@pytest.fixture
def stages(monkeypatch):
    """Replaces every stage by one that only records its call; `fail` and `diverge` hold ids to treat so."""

    class Stages:
        called, groups, configs, fail, diverge = [], [], {}, {}, set()

    state = Stages()
    state.called, state.groups, state.configs, state.fail, state.diverge = [], [], {}, {}, set()

    def run_batch(contexts):
        state.groups.append([context.run for context in contexts])
        results = []
        for context in contexts:
            state.called.append(context.run.id)
            state.configs[context.run.id] = context.config
            assert all(RunDirectory(path).done for path in context.parents.values())
            if context.run.id in state.fail:
                raise state.fail[context.run.id]
            results.append({"diverged": "loss nan" if context.run.id in state.diverge else None})
        return results

    recording = {
        name: replace(stage, run=lambda context: run_batch([context])[0], batched=stage.batched and replace(stage.batched, run=run_batch))
        for name, stage in declared().items()
    }
    monkeypatch.setattr(execution, "stages", lambda: recording)
    return state


def states(workdir):
    return {run.id: RunDirectory(workdir / CONFIG.name / run.id).state()[0] for run in RUNS}


def test_everything_is_carried_out_once(tmp_path, stages):
    first = execute(CONFIG, tmp_path, RUNS)
    assert first.carried_out == [run.id for run in RUNS] == stages.called
    again = execute(CONFIG, tmp_path, RUNS)
    assert again.skipped == first.carried_out and not again.carried_out
    assert len(stages.called) == len(RUNS)


def test_a_failure_stops_only_what_depends_on_it(tmp_path, stages):
    bad = next(run for run in RUNS if run.stage == "finetune")
    stages.fail[bad.id] = RuntimeError("boom")
    outcome = execute(CONFIG, tmp_path, RUNS)
    children = [run.id for run in RUNS if bad.id in run.parents.values()]
    assert outcome.failed == [bad.id] and outcome.waiting == children and children
    assert len(outcome.carried_out) == len(RUNS) - 1 - len(children)
    stages.fail.clear()
    assert execute(CONFIG, tmp_path, RUNS).carried_out == [bad.id, *children]


def test_a_refusal_of_a_run_fails_that_run_alone(tmp_path, stages, caplog):
    bad = next(run for run in RUNS if run.stage == "finetune")
    stages.fail[bad.id] = UserError("no training row is left; raise the last of finetune.length_buckets.")
    outcome = execute(CONFIG, tmp_path, RUNS)
    children = [run.id for run in RUNS if bad.id in run.parents.values()]
    assert (outcome.failed, outcome.waiting, outcome.left) == ([bad.id], children, [])
    assert len(outcome.carried_out) == len(RUNS) - 1 - len(children)
    folder = tmp_path / CONFIG.name / bad.id
    assert RunDirectory(folder).state() == ("failed", "no training row is left; raise the last of finetune.length_buckets.")
    assert "Traceback" in (folder / ERROR_LOG).read_text()
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line == f"{bad.id} failed: no training row is left; raise the last of finetune.length_buckets."


def test_a_run_of_another_process_ends_the_study(tmp_path, stages):
    folder = tmp_path / CONFIG.name / RUNS[2].id
    folder.mkdir(parents=True)
    with lock(folder / LOCK), pytest.raises(StudyRefused, match="is being worked on by another process"):
        execute(CONFIG, tmp_path, RUNS)
    assert stages.called == [run.id for run in RUNS[:2]]


def exhausted():
    import jax

    error = ValueError("the step failed")
    error.__cause__ = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 98304 bytes.")
    return error


def test_a_program_that_does_not_fit_is_tried_once(tmp_path, stages, caplog):
    """Weight decay, learning rate and seeds make no other program; another width and another task do."""
    fields = "(('model.d_ff',(64,96)),('train.peak_lr',(1e-3,2e-3)))"
    overrides = [("train.compute_dtype", "float32"), ("grid.fields", fields), ("grid.weight_decay", "(0.0,0.1)"), ("grid.seeds", "(0,1)")]
    config = load_config(TINY, overrides)
    runs = build_graph(config)
    small = [run for run in runs if run.stage == "pretrain" and "d_ff64" in run.id]
    task = next(run.task for run in runs if run.stage == "finetune")
    tuned = [run for run in runs if run.stage == "finetune" and run.task == task and "d_ff96" in run.id]
    for run in (*small, *tuned):
        stages.fail[run.id] = exhausted()
    outcome = execute(config, tmp_path, runs)
    assert len(small) == 8 and [run.id for run in small if run.id in stages.called] == [small[0].id]
    assert len(tuned) == 8 and [run.id for run in tuned if run.id in stages.called] == [tuned[0].id]
    assert set(outcome.failed) == {run.id for run in (*small, *tuned)}
    for tried, *others in (small, tuned):
        for run in others:
            state, said = RunDirectory(tmp_path / config.name / run.id).state()
            assert state == "failed" and said.startswith(f"same program as {tried.id}, which ran out of device memory; raise grad_accum_steps")
        assert [f"{tried.id} failed: " in line and "or lower batch_size, then run again" in line for line in caplog.messages].count(True) == 1
    stages.fail.clear()
    assert not execute(config, tmp_path, runs).failed, "the next call tries them again"


def test_another_failure_says_nothing_about_the_next_run(tmp_path, stages):
    bases = [run for run in RUNS if run.stage == "pretrain"]
    for run in bases:
        stages.fail[run.id] = RuntimeError("boom")
    execute(CONFIG, tmp_path, RUNS)
    assert {run.id for run in bases} <= set(stages.called)


def test_a_child_of_a_diverged_run_diverges_where_its_program_did_not_fit(tmp_path, stages):
    bases = [run for run in RUNS if run.stage == "pretrain"]
    first, second = (next(run for run in RUNS if run.stage == "finetune" and run.parents["base"] == base.id) for base in bases)
    stages.fail[first.id] = exhausted()
    stages.diverge.add(bases[1].id)
    execute(CONFIG, tmp_path, RUNS)
    assert (states(tmp_path)[first.id], states(tmp_path)[second.id]) == ("failed", "diverged")


@pytest.mark.parametrize("error", [RuntimeError("boom"), UserError("no")])
def test_fail_fast_stops_at_the_first_failed_run(tmp_path, stages, error):
    stages.fail[RUNS[2].id] = error
    outcome = execute(CONFIG, tmp_path, RUNS, fail_fast=True)
    assert (outcome.carried_out, outcome.failed) == ([run.id for run in RUNS[:2]], [RUNS[2].id])
    assert outcome.left == [run.id for run in RUNS[3:]] and stages.called == [run.id for run in RUNS[:3]]


def test_a_refusal_of_the_only_run_asked_for_is_raised(tmp_path, stages):
    asked = next(run for run in RUNS if run.stage == "finetune")
    needed = [run for run in RUNS if run.stage in ("prepare", "init", "pretrain")]
    execute(CONFIG, tmp_path, needed)
    stages.fail[asked.id] = UserError("no")
    with pytest.raises(UserError, match="^no$"):
        execute(CONFIG, tmp_path, [run for run in needed if run.id in asked.parents.values()] + [asked])
    assert states(tmp_path)[asked.id] == "failed"


def test_the_last_line_names_the_failed_runs_and_the_status_is_1(tmp_path, stages):
    prepared = [run for run in RUNS if run.stage == "prepare"]
    stages.fail[prepared[1].id], stages.fail[prepared[2].id] = UserError("no"), RuntimeError("boom")
    argv = ["prepare", "--config", TINY, "--workdir", tmp_path, "--config.train.compute_dtype=float32"]
    ended = plasticity(*argv)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.endswith(f"2 failed, 0 wait for a missing parent; failed: {prepared[1].id}, {prepared[2].id}"), last
    ended = plasticity(*argv, "--fail-fast")
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.endswith(f"1 failed, 0 wait for a missing parent, 1 not reached (--fail-fast); failed: {prepared[1].id}"), last


def test_children_of_a_diverged_run_are_recorded_as_diverged(tmp_path, stages):
    bad = next(run for run in RUNS if run.stage == "pretrain")
    stages.diverge.add(bad.id)
    outcome = execute(CONFIG, tmp_path, RUNS)
    assert not outcome.failed and not outcome.waiting
    now = states(tmp_path)
    for run in RUNS:
        from_bad = run.member == bad.member
        assert now[run.id] == ("diverged" if from_bad else "done")
    assert not [run for run in RUNS if run.stage == "evaluate" and run.member == bad.member and run.id in stages.called]


def test_a_diverged_member_leaves_the_verifier_to_the_others(tmp_path, stages):
    config = load_config(
        Path(__file__).parents[2] / "configs" / "tiny.py",
        [
            ("train.compute_dtype", "float32"),
            ("reward.scorer", "verifier"),
            ("tasks.addition2.verifier_rows", "8"),
            ("tasks.topic.verifier_rows", "8"),
        ],
    )
    runs = build_graph(config)
    bad = [run for run in runs if run.stage == "pretrain"][-1]
    stages.diverge.add(bad.id)
    execute(config, tmp_path, runs)
    now = {run.id: RunDirectory(tmp_path / config.name / run.id).state()[0] for run in runs}
    assert {now[run.id] for run in runs if run.stage == "verifier"} == {"done"}
    for run in runs:
        assert now[run.id] == ("diverged" if run.member == bad.member else "done")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("write failed: No space left on device"),
        *(OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN)),
    ],
    ids=["wrapped", "full", "quota", "stale mount", "lost mount"],
)
def test_a_disk_that_cannot_be_written_stops_the_study_as_a_users_problem(tmp_path, stages, error):
    stages.fail[RUNS[1].id] = error
    words = str(error).partition(": ")[2] if isinstance(error, ValueError) else error.strerror
    with pytest.raises(StudyRefused, match=f"(?i){words}.*resumes"):
        execute(CONFIG, tmp_path, RUNS)
    assert len(stages.called) == 2
    assert states(tmp_path)[RUNS[1].id] != "done"


@pytest.mark.parametrize("left_behind", [False, True], ids=["nothing", "an empty folder"])
def test_a_lost_workdir_ends_the_study_and_nothing_is_made_in_its_place(tmp_path, stages, monkeypatch, left_behind):
    workdir, elsewhere = tmp_path / "mount" / "work", tmp_path / "elsewhere"
    workdir.mkdir(parents=True)
    real = execution.stages()

    def lose(context):
        workdir.rename(elsewhere)
        if left_behind:
            context.directory.path.mkdir(parents=True)
        return {}

    stage = RUNS[2].stage
    monkeypatch.setattr(execution, "stages", lambda: real | {stage: replace(real[stage], run=lose)})
    with pytest.raises(StudyRefused, match=r"mount/work is gone, or another folder.*bring it back.*resumes"):
        execute(CONFIG, workdir, RUNS[2:5])
    assert not stages.called
    shutil.rmtree(workdir, ignore_errors=True)
    elsewhere.rename(workdir)
    monkeypatch.setattr(execution, "stages", lambda: real)
    execute(CONFIG, workdir, RUNS)
    assert set(states(workdir).values()) == {"done"}


def test_an_interrupt_keeps_what_is_done(tmp_path, stages):
    stages.fail[RUNS[3].id] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        execute(CONFIG, tmp_path, RUNS)
    assert list(states(tmp_path).values())[:4] == ["done", "done", "done", "missing"]


def test_vmapped_mode_hands_the_members_of_a_seed_over_together(tmp_path, stages):
    config = load_config(
        Path(__file__).parents[2] / "configs" / "tiny.py",
        [("train.compute_dtype", "float32"), ("grid.mode", "vmapped"), ("grid.seeds", "(0,1)")],
    )
    execute(config, tmp_path, build_graph(config))
    assert sum(len(group) == 2 for group in stages.groups) == 2


def test_vmapped_fine_tunings_go_on_without_a_diverged_base(tmp_path, stages):
    config = load_config(TINY, [("train.compute_dtype", "float32"), ("grid.mode", "vmapped"), ("grid.seeds", "(0,1)")])
    graph = build_graph(config)
    bad = next(run for run in graph if run.stage == "pretrain")
    stages.diverge.add(bad.id)
    outcome = execute(config, tmp_path, graph)
    assert not outcome.failed and not outcome.waiting and len(outcome.carried_out) == len(graph)
    tuned = [run for run in graph if run.stage == "finetune"]
    of_bad = [run for run in tuned if bad.id in run.parents.values()]
    assert {RunDirectory(tmp_path / config.name / run.id).state()[0] for run in of_bad} == {"diverged"}
    per_task = len(tuned) // len(config.tasks)
    of_tuned = [len(group) for group in stages.groups if group[0].stage == "finetune"]
    assert of_tuned == [per_task - 1] * len(config.tasks)


@pytest.mark.parametrize("error", [UserError("damaged"), RuntimeError("boom")])
def test_a_fault_of_one_run_of_a_program_stays_with_it(tmp_path, stages, error):
    config = load_config(TINY, [("train.compute_dtype", "float32"), ("grid.mode", "vmapped")])
    graph = build_graph(config)
    bad = next(run for run in graph if run.stage == "pretrain")
    stages.fail[bad.id] = error
    outcome = execute(config, tmp_path, graph)
    after = {run.id for run in graph if bad.id in run.parents.values()}
    others = [run for run in graph if run.stage == "pretrain" and run is not bad]
    assert outcome.failed == [bad.id] and after <= set(outcome.waiting) and others
    assert all(RunDirectory(tmp_path / config.name / run.id).state()[0] == "done" for run in others)
    together = sorted(run.name for run in graph if run.stage == "pretrain")
    assert [sorted(run.name for run in group) for group in stages.groups if bad in group] == [together, [bad.name]]


def test_vmapped_programs_hold_what_differs_in_traced_numbers_only(tmp_path, stages):
    fields = (("train.peak_lr", (1e-3, 2e-3)), ("model.d_ff", (64, 96)), ("train.warmup_fraction", (0.1, 0.2)))
    config = load_config(
        Path(__file__).parents[2] / "configs" / "tiny.py",
        [("train.compute_dtype", "float32"), ("grid.mode", "vmapped"), ("grid.fields", repr(fields)), ("grid.weight_decay", "(0.0,0.1)")],
    )
    outcome = execute(config, tmp_path, [run for run in build_graph(config) if run.stage in ("prepare", "init", "pretrain")])
    together = [group for group in stages.groups if len(group) > 1]
    assert [len(group) for group in together] == [8, 8] and not outcome.waiting
    assert [{run.name.split("d_ff")[1][:2] for run in group} for group in together] == [{"64"}, {"96"}]


def test_a_stage_receives_its_members_config(tmp_path, stages):
    config = load_config(
        Path(__file__).parents[2] / "configs" / "tiny.py",
        [("train.compute_dtype", "float32"), ("grid.fields", "(('train.peak_lr',(1e-3,2e-3)),)"), ("hardware", "(('cpu',{'train.log_every':7}),)")],
    )
    execute(config, tmp_path, build_graph(config))
    for run in build_graph(config):
        own = stages.configs[run.id]
        assert own.train.log_every == 7
        assert run.member is None or f"peak_lr{own.train.peak_lr:g}" in run.member
        assert run.member is None or RunDirectory(tmp_path / config.name / run.id).config() == own


def test_room_on_disk_is_counted_member_by_member():
    def needed(*sizes, **train):
        overrides = [("grid.fields", f"(('model.d_ff',{sizes}),)"), *((f"train.{name}", str(value)) for name, value in train.items())]
        return execution._bytes_needed(load_config(TINY, overrides))

    more = 2 * 3 * 32 * 64  # weights of two layers' MLP
    models = 2 * (1 + 2)  # two members, each tuned on two tasks
    assert needed(128) - needed(64) == pytest.approx(more * (4 * (models + 1) + 32), abs=2), (
        "all models and their start; the one in training, with moments, three times"
    )
    kept = needed(128, keep_optimizer=True) - needed(64, keep_optimizer=True)
    assert kept == pytest.approx(more * (12 * models + 4 + 24), abs=2), "moments of all models, and one model saved three times"
    data, smaller = 20e3 * 400 * 2 + 10e6, execution._parameters(load_config(TINY, [("model.d_ff", "64")]))
    assert needed(64, 128) == pytest.approx(needed(64) + needed(128) - data - 32 * smaller, abs=2), "one trains at a time"
    assert needed(64, keep_steps=(1, 2)) - needed(64) == pytest.approx(2 * (2 * 4 + 8) * smaller, abs=2), (
        "two more steps of two members, one with moments"
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_finished_run_keeps_its_optimizer_only_where_asked(tmp_path, stages, monkeypatch, keep):
    def train(context):
        for name in ("params", "optimizer"):
            (context.directory.path / "checkpoints" / "8" / name).mkdir(parents=True)
        return {}

    training = {name: replace(stage, run=train) if name == "finetune" else stage for name, stage in execution.stages().items()}
    monkeypatch.setattr(execution, "stages", lambda: training)
    execute(replace(CONFIG, train=replace(CONFIG.train, keep_optimizer=keep)), tmp_path, RUNS)
    for run in RUNS:
        if run.stage == "finetune":
            kept = {path.name for path in (tmp_path / CONFIG.name / run.id / "checkpoints" / "8").iterdir()}
            assert kept == ({"params", "optimizer"} if keep else {"params"})


def test_a_workdir_that_cannot_hold_the_study_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        check_workdir(file / "below", CONFIG)
    check_workdir(tmp_path / "fine", CONFIG)
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="1 MB free"):
        check_workdir(tmp_path / "fine", CONFIG)


def test_a_stage_that_returns_no_record_fails_with_its_name(tmp_path, stages, monkeypatch):
    odd = {name: replace(stage, run=lambda context: 1.5) if name == "spectra" else stage for name, stage in execution.stages().items()}
    monkeypatch.setattr(execution, "stages", lambda: odd)
    outcome = execute(CONFIG, tmp_path, RUNS)
    assert {run.split("/")[0] for run in outcome.failed} == {"spectra"}
    reason = RunDirectory(tmp_path / CONFIG.name / outcome.failed[0]).state()[1]
    assert reason == "TypeError: stage spectra returned 1.5; return a dataclass or a dict"
