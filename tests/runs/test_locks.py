"""Locks: one holder at a time, on a disk and on a store."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid

import pytest

from plasticity_jax.config import StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.runs import locks
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.locks import is_locked, lock
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import location, write_bytes

RUN = Run("s", "spectra", "wd0.1", {"mass": 0.95}, {"model": "pretrain/wd0.1-0123abcd"})


@pytest.fixture
def on_store():
    return location(f"memory://{uuid.uuid4().hex}/run/LOCK")


@pytest.fixture(params=["disk", "store"])
def path(request, tmp_path, on_store):
    return tmp_path / "LOCK" if request.param == "disk" else on_store


def left_by(path, **changes):
    write_bytes(path, json.dumps({"host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00Z"} | changes).encode())


def gone_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_has_one_holder_and_is_free_afterwards(path):
    assert not is_locked(path)
    with lock(path):
        assert is_locked(path)
        with pytest.raises(UserError, match="being worked on"), lock(path):
            pass
        assert is_locked(path)
    assert not is_locked(path)
    with pytest.raises(ZeroDivisionError), lock(path):
        1 / 0
    assert not is_locked(path)
    with lock(path):
        pass


def test_one_who_opened_the_file_before_its_release_is_not_a_second_holder(tmp_path):
    """A contender that has opened the lock file gets the lock when it is free, and keeps everybody else out."""
    path = tmp_path / "LOCK"
    with lock(path):
        contender = open(path)
    with contender:
        fcntl.flock(contender, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_locked(path)
        with pytest.raises(UserError, match="being worked on"), lock(path):
            pass


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    path = tmp_path / "LOCK"
    code = "import sys, time; from pathlib import Path; from plasticity_jax.runs.locks import lock\nwith lock(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert is_locked(path)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not is_locked(path)
    with lock(path):
        pass


@pytest.mark.parametrize(
    ("holder", "held"),
    [
        ({}, True),
        ({"host": socket.gethostname(), "pid": os.getppid()}, True),
        ({"host": socket.gethostname(), "pid": None}, True),
    ],
)
def test_a_holder_on_a_store_is_named_with_the_way_out(on_store, holder, held):
    left_by(on_store, **holder)
    assert is_locked(on_store) == held
    with pytest.raises(UserError, match=f"since 2026-01-01T00:00:00Z; wait for it, or delete {on_store}"), lock(on_store):
        pass
    assert "2026-01-01" in on_store.read_text(), "the lock of the other process stays"


def test_a_killed_process_of_this_machine_blocks_nobody_on_a_store(on_store):
    left_by(on_store, host=socket.gethostname(), pid=gone_pid())
    assert not is_locked(on_store)
    with lock(on_store):
        assert json.loads(on_store.read_bytes())["pid"] == os.getpid()


def test_two_processes_that_find_a_dead_holder_do_not_both_hold_the_lock(on_store, monkeypatch):
    """Both see the dead holder before either acts; the second must not remove the lock that the first has made since."""
    left_by(on_store, host=socket.gethostname(), pid=gone_pid())
    removing, read = locks._remove_left_behind, locks._holder
    dead = read(on_store)
    with lock(on_store):
        stale = iter([dead])
        monkeypatch.setattr(locks, "_holder", lambda path: next(stale, None) or read(path))
        removing(on_store)
        assert is_locked(on_store) and read(on_store)["pid"] == os.getpid()


def test_a_holder_whose_lock_was_deleted_leaves_the_next_ones_alone(on_store):
    with lock(on_store):
        left_by(on_store)
    assert "elsewhere" in on_store.read_text()


def test_looking_at_a_lock_does_not_refuse_a_run(tmp_path):
    path = tmp_path / "LOCK"
    with lock(path):
        pass
    looking = open(path)
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    threading.Timer(0.1, looking.close).start()
    with lock(path):
        assert looking.closed


def test_a_container_that_started_again_takes_the_lock_of_the_process_before(on_store):
    """It has the host name of the one before, and often its process number."""
    left_by(on_store, host=socket.gethostname(), pid=os.getpid(), token="of the process before")
    assert not is_locked(on_store)
    with lock(on_store):
        assert is_locked(on_store)


def test_an_unreadable_lock_on_a_store_is_refused_in_one_line(on_store):
    write_bytes(on_store, b"{half")
    start = time.monotonic()
    with pytest.raises(UserError, match="an unknown host") as refused, lock(on_store):
        pass
    assert "\n" not in str(refused.value) and time.monotonic() - start < 10, "nobody waits for a holder"


def test_a_run_goes_through_its_states(path):
    directory = RunDirectory(path.parent / "run")
    assert directory.state() == ("missing", "")
    with directory.work(RUN, StudyConfig()):
        assert RunDirectory(directory.path).state()[0] == "running"
        with pytest.raises(UserError, match="being worked on"), RunDirectory(directory.path).work(RUN, StudyConfig()):
            pass
    assert directory.state()[0] == "missing" and "resumes" in directory.state()[1]
    with pytest.raises(ZeroDivisionError), directory.work(RUN, StudyConfig()):
        1 / 0
    assert directory.state() == ("failed", "ZeroDivisionError: division by zero")
    with directory.work(RUN, StudyConfig()):
        directory.finish({"x": 1})
    assert directory.state() == ("done", "")
