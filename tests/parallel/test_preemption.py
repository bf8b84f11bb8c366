"""SIGTERM to this process, and the step on which several processes agree."""

import os
import random
import signal

import pytest

from plasticity_jax.parallel import preemption, processes


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    preemption.handle_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def send():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_outside_of_training_ends_at_once():
    with pytest.raises(KeyboardInterrupt):
        send()


def test_training_is_told_once_and_a_second_signal_ends_it_at_once(monkeypatch):
    told = []
    with pytest.raises(KeyboardInterrupt) as ended, preemption.saves_first() as save_and_end:
        told.append(save_and_end(1))
        send()
        send()  # the same signal, passed on by the parent
        told.append(save_and_end(2))
        monkeypatch.setattr(preemption, "_SAME", 0.0)
        send()
    assert told == [False, True] and not isinstance(ended.value, preemption.Preempted)


def test_a_signal_after_the_last_question_ends_the_run_after_its_training():
    with pytest.raises(preemption.Preempted, match="after the last step"), preemption.saves_first() as save_and_end:
        assert not save_and_end(1)
        send()


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
