"""A signal that interrupts the wait for threads does not end it for good."""

import os
import signal
import threading
import time

import pytest

from plasticity_jax.parallel.threads import Threads


def test_a_wait_that_a_signal_interrupts_goes_on_until_the_thread_has_ended():
    go_on, ended = threading.Event(), []

    def work():
        go_on.wait()
        ended.append(True)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    threads = Threads({"one": work})
    try:
        for _ in range(20):
            timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                threads.wait()
            assert not ended
    finally:
        signal.signal(signal.SIGUSR1, before)
    threading.Timer(0.05, go_on.set).start()
    threads.wait()
    assert ended


def test_what_the_check_raises_ends_the_wait():
    go_on = threading.Event()
    threads = Threads({"one": go_on.wait})

    def check():
        raise ValueError

    with pytest.raises(ValueError):
        threads.wait(check)
    go_on.set()
    threads.wait(check=lambda: time.sleep(0))
