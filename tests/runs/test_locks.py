"""Locks on a store: the promises of a lock file without a system that frees it."""

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
def path(monkeypatch):
    monkeypatch.setattr(locks, "TAKEOVER_SECONDS", 0.0)
    monkeypatch.setattr(locks, "LOOK_SECONDS", 0.01)
    return location(f"memory://{uuid.uuid4().hex}/run/LOCK")


def left_by(path, **changes):
    holder = {"host": "elsewhere", "pid": 1, "token": "theirs", "time": time.time()} | changes
    write_bytes(path, json.dumps(holder).encode())


def gone_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_has_one_holder_and_is_gone_afterwards(path):
    assert not is_locked(path)
    with lock(path) as held:
        held.check()
        assert is_locked(path)
        with pytest.raises(BlockingIOError), lock(path):
            pass
        assert is_locked(path)
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), lock(path):
        1 / 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("holder", "held"),
    [
        ({"time": 0.0}, False),
        ({"time": time.time() - locks.STALE_SECONDS - 1}, False),
        ({"host": socket.gethostname(), "pid": os.getppid()}, True),
        ({"host": socket.gethostname(), "pid": os.getpid()}, False),  # of a process before this one that had the same number
    ],
)
def test_a_holder_that_was_not_heard_of_is_taken_for_dead(path, holder, held):
    left_by(path, **({"time": time.time()} | holder))
    assert is_locked(path) == held
    if held:
        with pytest.raises(BlockingIOError), lock(path):
            pass
        assert json.loads(path.read_bytes())["token"] == "theirs"
    else:
        with lock(path):
            assert is_locked(path)
        assert not path.exists()


@pytest.mark.parametrize("ahead", [0.0, 1e6])  # seconds of the holder's clock
def test_a_holder_elsewhere_has_time_to_give_a_sign_of_life(path, monkeypatch, ahead):
    monkeypatch.setattr(locks, "STALE_SECONDS", 20.0)
    left_by(path, time=time.time() + ahead)
    assert is_locked(path)
    timer = threading.Timer(0.05, left_by, args=(path,), kwargs={"time": time.time() + ahead + 1})
    timer.start()
    with pytest.raises(BlockingIOError), lock(path):
        pass
    timer.join()
    assert json.loads(path.read_bytes())["token"] == "theirs"
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.05)
    with lock(path) as held:
        held.check()
    assert not path.exists()


def test_a_killed_process_of_this_machine_blocks_nobody(path):
    left_by(path, host=socket.gethostname(), pid=gone_pid())
    assert not is_locked(path)


def test_what_is_no_lock_blocks_nobody(path):
    write_bytes(path, b"{half")
    assert not is_locked(path)
    with lock(path):
        pass


def test_the_holder_is_heard_of_while_it_works(path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    with lock(path):
        first = json.loads(path.read_bytes())["time"]
        deadline = time.monotonic() + 20
        while json.loads(path.read_bytes())["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_run_that_was_taken_over_does_not_finish(path):
    directory = RunDirectory(path.parent)
    with pytest.raises(UserError, match="taken over by another process"), directory.work(RUN, StudyConfig()):
        left_by(directory.path / "LOCK")
        directory.finish({})
    assert not (directory.path / "DONE").exists()
    assert json.loads((directory.path / "LOCK").read_bytes())["token"] == "theirs", "the new holder's lock stays"


def test_a_run_on_a_store_goes_through_its_states(path):
    directory = RunDirectory(path.parent)
    assert directory.state() == ("missing", "")
    with directory.work(RUN, StudyConfig()):
        assert RunDirectory(directory.path).state()[0] == "running"
        with pytest.raises(UserError, match="another process"), RunDirectory(directory.path).work(RUN, StudyConfig()):
            pass
    assert directory.state()[0] == "missing" and "resumes" in directory.state()[1]
    with pytest.raises(ZeroDivisionError), directory.work(RUN, StudyConfig()):
        1 / 0
    assert directory.state() == ("failed", "ZeroDivisionError: division by zero")
    with directory.work(RUN, StudyConfig()):
        directory.finish({"x": 1})
    assert directory.state() == ("done", "")
