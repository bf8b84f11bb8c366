"""SIGTERM to this process, and the step on which several processes agree."""

import gc
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from running import PATIENCE, environment

from plasticity_jax.parallel import preemption, processes
from plasticity_jax.progress import Progress

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def handled():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with preemption.handled():
        yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@BOTH
def test_a_signal_outside_of_training_ends_at_once(handled, number):
    with pytest.raises(KeyboardInterrupt):
        send(number)


@BOTH
def test_training_is_told_once(handled, number):
    told = []
    with pytest.raises(preemption.Preempted), preemption.saves_first() as save_and_end:
        told.append(save_and_end(1))
        send(number)
        preemption.check()  # a progress within the training, such as of a held-out loss
        told.append(save_and_end(2))
    assert told == [False, True]


def test_a_signal_after_the_last_question_ends_the_run_after_its_training(handled):
    with pytest.raises(preemption.Preempted, match="after the last step"), preemption.saves_first() as save_and_end:
        assert not save_and_end(1)
        send()


class InterruptedWhenCollected:
    def __del__(self):
        send(signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_swallowed_ends_the_work_at_its_next_progress(handled, capsys):
    loop = [InterruptedWhenCollected()]
    loop.append(loop)
    del loop
    gc.collect()  # an exception of a callback of the garbage collector is printed and ignored
    with pytest.raises(KeyboardInterrupt), Progress("work", total=None, unit="rows") as progress:
        progress.update(1)


# The main thread is in a call of a library for hours, in which Python runs no handler, as in a compilation.
_BUSY = """
import contextlib, hashlib, sys, threading
from plasticity_jax.parallel import preemption

preemption.GRACE = float(sys.argv[1])
blocks = {"none": [], "training": [preemption.saves_first], "writing": [preemption.writing], "compiling": [preemption.ends_at_once]}
with preemption.handled(), contextlib.ExitStack() as stack:
    for block in blocks[sys.argv[2]]:
        stack.enter_context(block())
    threading.Timer(0.3, print, ["busy"], {"flush": True}).start()  # once the call has begun
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def ending(grace, block, *signals):
    """(exit status, last line) of a process that is in a call of a library, after these signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BUSY, str(grace), block], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    for number, pause in signals:
        process.send_signal(number)
        time.sleep(pause)
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said.splitlines()[-1]


@BOTH
@pytest.mark.parametrize("block", ["none", "training"])
def test_a_call_of_a_library_cannot_hold_the_process_for_longer_than_the_grace(number, block):
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    status, line = ending(0.2, block, (number, 0))
    assert (status, line) == (130, f"plasticity: ended by {name}, after 0 s in which it did not end by itself; the same command resumes.")


def test_a_compilation_for_other_devices_ends_at_once():
    assert ending(1e6, "compiling", (signal.SIGINT, 0)) == (130, "plasticity: ended by Ctrl-C; the same command resumes.")


@pytest.mark.parametrize("block", ["none", "training", "writing"])
def test_a_second_signal_ends_at_once(block):
    assert ending(1e6, block, (signal.SIGINT, 0.3), (signal.SIGINT, 0)) == (130, "plasticity: ended by a second signal; the same command resumes.")


def test_the_same_signal_passed_on_by_a_parent_is_no_second_one():
    status, line = ending(0.5, "none", (signal.SIGTERM, 0.2), (signal.SIGTERM, 0))
    assert status == 130 and "by SIGTERM, after" in line


@pytest.mark.parametrize("seed", range(200))
def test_all_processes_save_the_same_step(monkeypatch, seed):
    """Every order of events that a step which sums over all processes allows: none is asked for a step before all have dispatched the one before."""
    chance = random.Random(seed)
    n = chance.randint(2, 4)
    signalled_at = {i: chance.randint(1, 8) for i in chance.sample(range(n), chance.randint(1, n))}
    stored = []

    def first_wins(name):
        return (lambda value: stored or stored.append(value)), lambda: stored[0] if stored else None

    monkeypatch.setattr(processes, "first_wins", first_wins)
    asks, asked, ended = [preemption._agreed() for _ in range(n)], [0] * n, {}
    while len(ended) < n:
        able = [i for i in range(n) if i not in ended and all(asked[j] >= asked[i] - 1 for j in range(n))]
        i = chance.choice(able)
        asked[i] += 1
        monkeypatch.setattr(preemption, "requested", lambda: asked[i] >= signalled_at.get(i, 99))
        if asks[i](asked[i]):
            ended[i] = asked[i]
        assert asked[i] < 20
    assert len(set(ended.values())) == 1, ended
    assert max(ended.values()) <= min(signalled_at.values()) + 3
