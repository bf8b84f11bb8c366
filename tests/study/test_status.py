"""What `plasticity status` says of a run that is being worked on."""

import json
import os
import time
from dataclasses import replace

import pytest
from running import TINY

from plasticity_jax.config import StudyConfig, load_config
from plasticity_jax.progress import Progress, watched
from plasticity_jax.runs import directory as directories
from plasticity_jax.runs.directory import PROGRESS, RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import stages
from plasticity_jax.study import execute as execution
from plasticity_jax.study.graph import build_graph, save_study
from plasticity_jax.study.outline import outline
from plasticity_jax.study.status import study_status

CONFIG = StudyConfig()
STAGES = ("pretrain", "finetune", "evaluate", "probe", "prepare")


@pytest.fixture(params=STAGES)
def directory(tmp_path, request):
    """A run in progress."""
    run = Run(CONFIG.name, request.param, "wd0", {}, {}, version=1, member="wd0")
    save_study(tmp_path, CONFIG, [run])
    with RunDirectory(tmp_path / CONFIG.name / run.id).work(run, CONFIG) as directory:
        yield directory


def said(directory) -> tuple[str, str]:
    [row] = study_status(directory.path.parents[2])
    return row["state"], row["reason"]


def test_a_run_says_how_far_it_is_whatever_its_stage(directory):
    assert said(directory) == ("running", "")
    with watched(lambda progress: directory.write_progress(progress) or "", every=0.0):
        with Progress("first part", total=8, unit="rows") as progress:
            progress.update(1)
            assert said(directory) == ("running", "first part: 1 of 8 rows (12%)"), "one update tells no pace"
            progress._paced_from = (1, time.monotonic() - 60)
            progress.update(1, note="step 2 of 8")
            assert said(directory) == ("running", "first part: 2 of 8 rows (25%), step 2 of 8, 6 min 0 s left")
            with Progress("within", total=3, unit="parts") as inner:
                inner.update(2)
            assert "first part" in said(directory)[1]
        with Progress("second part", total=None, unit="lines") as progress:
            progress.update(1200)
            assert said(directory) == ("running", "second part: 1,200 lines")


def test_it_is_written_every_few_seconds_and_not_more_often(directory, monkeypatch):
    now, written = [1000.0], []
    monkeypatch.setattr(directories.time, "monotonic", lambda: now[0])
    with watched(lambda progress: written.append(progress.done) or "", every=2.0), Progress("part", total=100, unit="rows") as progress:
        for _ in range(50):
            now[0] += 0.1
            progress.update(1)
    assert written == [1, 21, 41]


def test_the_next_part_is_written_at_once(directory):
    written = []
    with watched(lambda progress: written.append(progress.what) or "", every=3600.0):
        for what in ("first part", "second part"):
            with Progress(what, total=2, unit="rows") as progress:
                progress.update(1)
                progress.update(1)
    assert written == ["first part", "second part"]


def test_a_record_that_stands_still_says_its_age(directory):
    text = json.dumps({"what": "part", "done": 1, "total": 4, "unit": "rows", "note": "", "seconds_left": None, "time": time.time() - 600.4})
    (directory.path / PROGRESS).write_text(text)
    assert said(directory) == ("running", "part: 1 of 4 rows (25%), 10 min 0 s ago")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"done": "x", "total": 1, "unit": 1}', "\xff", '{"what": 1, "done": 1e999}'])
def test_a_damaged_record_says_nothing(tmp_path, content):
    run = Run(CONFIG.name, "gap", "wd0", {}, {}, version=1, member="wd0")
    save_study(tmp_path, CONFIG, [run])
    with RunDirectory(tmp_path / CONFIG.name / run.id).work(run, CONFIG) as directory:
        (directory.path / PROGRESS).write_bytes(content.encode("latin-1"))
        assert said(directory) == ("running", "")


def test_the_record_is_no_part_of_a_finished_run_and_an_interrupted_one_says_nothing(tmp_path):
    run = Run(CONFIG.name, "gap", "wd0", {}, {}, version=1, member="wd0")
    save_study(tmp_path, CONFIG, [run])
    directory = RunDirectory(tmp_path / CONFIG.name / run.id)
    with pytest.raises(RuntimeError), directory.work(run, CONFIG):
        directory.write_progress(Progress("part", total=4, unit="rows"))
        assert (directory.path / PROGRESS).is_file()
        raise RuntimeError("boom")
    assert not (directory.path / PROGRESS).exists()
    directory.write_progress(Progress("part", total=4, unit="rows"))  # as a kill leaves it
    (directory.path / "FAILED").unlink()
    assert said(directory) == ("missing", "interrupted; it resumes when run again")
    with directory.work(run, CONFIG):
        assert said(directory) == ("running", ""), "what was left behind is gone"
        directory.write_progress(Progress("part", total=4, unit="rows"))
        directory.finish({})
    assert said(directory) == ("done", "") and not list(directory.path.glob(f"*{PROGRESS}*"))
    assert PROGRESS not in directory.recorded() and study_status(tmp_path, verify=True)[0]["state"] == "done"


def test_a_disk_that_is_full_keeps_no_run_from_going_on(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    directory, progress = RunDirectory(tmp_path), Progress("part", total=4, unit="rows")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        directory.write_progress(progress)
    assert directory.progress() is None
    directory.write_progress(progress)
    assert directory.progress() is not None


def test_a_run_that_diverged_says_nothing_about_the_pace(tmp_path, monkeypatch, caplog):
    """Here all do: their children are over at once, and none has done its work."""
    config = load_config(TINY, [("train.compute_dtype", "float32")])
    runs = build_graph(config)
    recording = {
        name: replace(stage, run=lambda context: {"diverged": "loss nan"} if context.run.stage == "pretrain" else {})
        for name, stage in stages().items()
    }
    monkeypatch.setattr(execution, "stages", lambda: recording)
    left = outline(config, tmp_path, runs).time_left()
    with caplog.at_level("INFO", logger="plasticity_jax"):
        assert len(execution.execute(config, tmp_path, runs, left=left).carried_out) == len(runs)
    begun = [record.getMessage() for record in caplog.records if record.getMessage().startswith("[")]
    assert len(begun) == len(runs) and not any("left" in line for line in begun) and len(left) == 0


def test_the_executor_keeps_the_record_of_every_stage_and_shows_the_time_left_beside_it(tmp_path, monkeypatch, caplog):
    config = load_config(TINY, [("train.compute_dtype", "float32")])
    runs, seen = build_graph(config), {}
    now = [1000.0]

    def run(context):
        now[0] += 600
        with Progress(context.run.name, total=4, unit="rows") as progress:
            progress.update(1)
            seen[context.run.id] = RunDirectory(context.directory.path).progress(), progress.aside
        return {}

    recording = {name: replace(stage, run=run, batched=stage.batched) for name, stage in stages().items()}
    monkeypatch.setattr(execution, "stages", lambda: recording)
    left = outline(config, tmp_path, runs).time_left()
    left._clock = lambda: now[0]
    with caplog.at_level("INFO", logger="plasticity_jax"):
        execution.execute(config, tmp_path, runs, left=left)
    assert {run.stage for run in runs} == {run_id.split("/")[0] for run_id, (record, _) in seen.items() if record and record["done"] == 1}
    begun = [record.getMessage() for record in caplog.records if record.getMessage().startswith("[")]
    assert len(begun) == len(runs) and begun[0] == f"[1/{len(runs)}] {runs[0].id}", "nothing is known yet"
    assert begun[-1] == f"[{len(runs)}/{len(runs)}] {runs[-1].id} · 10 min left", "one run of the stage took ten minutes"
    assert seen[runs[-1].id][1] == "study: less than a minute left"
    assert not list(tmp_path.rglob(PROGRESS))
