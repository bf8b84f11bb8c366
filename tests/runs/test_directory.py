import gc
import json
import math
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.runs import jsonfiles
from plasticity_jax.runs.directory import RunDirectory, open_run
from plasticity_jax.runs.jsonfiles import read_json, read_jsonl, to_json, write_json, write_jsonl
from plasticity_jax.runs.logs import MetricsLog
from plasticity_jax.runs.run import Run

RUN = Run("s", "spectra", "wd0.1", {"mass": 0.95}, {"model": "pretrain/wd0.1-0123abcd"})

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text()


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=10))
def test_json_is_strict_and_keeps_every_value(value):
    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    def same(a, b):
        if isinstance(a, float) and not math.isfinite(a):
            return isinstance(b, str) and repr(float(b)) == repr(a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        return a == b

    assert same(value, json.loads(to_json(value), parse_constant=refuse))


def test_json_takes_numpy_values():
    assert json.loads(to_json({"a": np.float32(0.5), "b": np.arange(3), "c": np.array([np.nan])})) == {"a": 0.5, "b": [0, 1, 2], "c": ["nan"]}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}, {"a": 2}])
    with open(path, "a") as file:
        file.write('{"a": 3')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ['{"a": "' + "b" * 2000 + '"}', '{"a": "' + "b" * 2000 + '"}\n', " " * 5000])
def test_a_file_without_end_is_one_line(tmp_path, monkeypatch, text):
    monkeypatch.setattr(jsonfiles, "LONGEST", 1000)
    (tmp_path / "x").write_text(text)
    for read in (read_json, read_jsonl):
        with pytest.raises(UserError, match="more than|longer than"):
            read(tmp_path / "x")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    first = MetricsLog(tmp_path, step=0)
    for step in (10, 20, 30):
        first.write(step, loss=float(step))
    first.close()
    second = MetricsLog(tmp_path, step=20)
    second.write(30, loss=3.0, held_out={"loss": 4.0})
    second.close()
    assert [(row["step"], row["loss"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == [(10, 10.0), (20, 20.0), (30, 3.0)]
    assert any(p.name.startswith("events") for p in (tmp_path / "tensorboard").iterdir())


def test_hash_covers_fields_and_parents_and_nothing_else():
    same = Run("other-study", "spectra", "other-name", {"mass": 0.95}, {"model": "pretrain/renamed-0123abcd"}, member="m")
    assert same.hash == RUN.hash
    assert Run("s", "spectra", "wd0.1", {"mass": 0.9}, RUN.parents).hash != RUN.hash
    assert Run("s", "spectra", "wd0.1", RUN.fields, {"model": "pretrain/wd0.1-0123abce"}).hash != RUN.hash
    assert Run("s", "probe", "wd0.1", RUN.fields, RUN.parents).hash != RUN.hash
    assert Run.from_dict(json.loads(to_json(RUN.to_dict()))) == RUN


def test_a_run_goes_through_its_states(tmp_path):
    directory = RunDirectory(tmp_path / RUN.id)
    assert directory.state() == ("missing", "")
    with directory.work(RUN, StudyConfig()):
        assert RunDirectory(directory.path).state()[0] == "running"
        with pytest.raises(UserError, match="not finished"):
            open_run(directory.path)
        directory.finish({"x": 1})
    assert directory.state() == ("done", "")
    assert open_run(directory.path).results() == {"x": 1}
    assert open_run(directory.path).run() == RUN
    assert open_run(directory.path).config() == StudyConfig()
    assert read_json(directory.path / "provenance.json")["versions"]["jax"]


def test_a_failure_is_recorded_and_cleared_by_the_next_attempt(tmp_path):
    directory = RunDirectory(tmp_path / RUN.id)
    with pytest.raises(ZeroDivisionError), directory.work(RUN, StudyConfig()):
        1 / 0
    assert directory.state() == ("failed", "ZeroDivisionError: division by zero")
    assert "Traceback" in (directory.path / "error.log").read_text()
    with directory.work(RUN, StudyConfig()):
        assert directory.state()[0] == "running"
        directory.finish({"diverged": "loss nan at step 3"})
    assert directory.state() == ("diverged", "loss nan at step 3")


def test_two_processes_cannot_work_on_one_run(tmp_path):
    with RunDirectory(tmp_path / RUN.id).work(RUN, StudyConfig()):
        with pytest.raises(UserError, match="another process"), RunDirectory(tmp_path / RUN.id).work(RUN, StudyConfig()):
            pass


def _hold(path, ready):
    with RunDirectory(path).work(RUN, StudyConfig()):
        ready.set()
        signal.pause()


def test_a_killed_process_leaves_no_running_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / RUN.id, ready))
    process.start()
    assert ready.wait(60)
    assert RunDirectory(tmp_path / RUN.id).state()[0] == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    state, reason = RunDirectory(tmp_path / RUN.id).state()
    assert state == "missing" and "resumes" in reason


@pytest.mark.parametrize(("make", "words"), [(lambda p: None, "no such directory"), (lambda p: p.mkdir(), "not a run directory")])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=words) as error:
        open_run(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_a_log_that_is_closed_is_let_go(tmp_path):
    from tensorboardX.event_file_writer import EventsWriter

    def writers() -> int:
        gc.collect()
        return sum(isinstance(thing, EventsWriter) for thing in gc.get_objects())

    before, threads = writers(), threading.active_count()
    log = MetricsLog(tmp_path, step=0)
    log.write(1, loss=1.0)
    [path] = (tmp_path / "tensorboard").iterdir()
    assert [value.simple_value for event in _events(path) for value in event.summary.value] == [1.0], "at once"
    assert writers() == before + 1 and threading.active_count() == threads
    log.close()
    del log
    assert writers() == before


def test_tensorboard_reads_the_events_and_hides_those_that_were_repeated(tmp_path):
    for start in (0, 20):
        log = MetricsLog(tmp_path, step=start)
        for step in (start + 10, start + 20):
            log.write(step, loss=step / 10, held_out={"loss": float("nan"), "tokens": step})
        log.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:]))
    events = [event for path in files for event in _events(path)]
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert [(step, value) for step, tag, value in scalars if tag == "loss"] == [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]
    assert {tag for _, tag, _ in scalars} == {"loss", "held_out/tokens"}
    assert [event.step for event in events if event.session_log.status] == [1, 21]  # from where on TensorBoard forgets what came before
    assert events[0].file_version == "brain.Event:2"
    assert all(event.wall_time > 0 for event in events)


def _events(path):
    """Of TensorBoard's format: 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
