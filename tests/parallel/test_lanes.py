"""Runs side by side, each on a part of the devices: the same bits as one after the other on as many devices; faults, signals and kills."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from running import PATIENCE, end, environment, pausing, start, wait_until
from test_processes import CONFIG as ON_TWO
from test_processes import pair

from plasticity_jax.errors import StudyRefused, UserError
from plasticity_jax.parallel import lanes, preemption, processes
from plasticity_jax.progress import Progress

CONFIG = [*ON_TWO, "--config.grid.timescales=(None,0.8,0.2)", "--config.tasks={}"]
STAGES = ["study", *CONFIG, "--stages", "prepare,init,pretrain,spectra"]
SIDE_BY_SIDE = [*STAGES, "--config.launch.parallel_runs=2"]
IN_ONE = """
import sys
from plasticity_jax.cli import main
from plasticity_jax.parallel import lanes
with lanes.split(2)[1].active():
    raise SystemExit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def devices(monkeypatch, owners, here=0):
    import jax

    found = [Device(number, owner) for number, owner in enumerate(owners)]
    monkeypatch.setattr(jax, "devices", lambda: found)
    monkeypatch.setattr(jax, "process_index", lambda: here)
    monkeypatch.setattr(jax, "local_device_count", lambda: owners.count(here))


@pytest.mark.parametrize(
    ("owners", "number", "ranks"),
    [
        ([0] * 8, 2, [(0,), (0,)]),
        ([0, 0, 1, 1], 2, [(0,), (1,)]),
        ([1, 0, 1, 0], 2, [(0,), (1,)]),  # whatever their order, a process stays whole
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, [(0, 1), (2, 3)]),
        ([0] * 4 + [1] * 4, 4, [(0,), (0,), (1,), (1,)]),
    ],
)
def test_every_device_is_in_one_lane_and_lanes_are_equal(monkeypatch, owners, number, ranks):
    devices(monkeypatch, owners)
    found = lanes.split(number)
    assert sorted(device.id for lane in found for device in lane.devices) == list(range(len(owners)))
    assert {len(lane.devices) for lane in found} == {len(owners) // number} and [lane.ranks for lane in found] == ranks


@pytest.mark.parametrize(
    ("owners", "number", "words"),
    [
        ([0] * 8, 3, "launch.parallel_runs=3 does not divide the 8 devices; set it to a divisor of 8."),
        (
            [0] * 4 + [1] * 4 + [2] * 4,
            2,
            "launch.parallel_runs=2 gives 6 devices to each run, which cuts processes of 4 devices; choose it so that a run",
        ),
    ],
)
def test_devices_that_cannot_be_split_are_refused(monkeypatch, owners, number, words):
    devices(monkeypatch, owners)
    with pytest.raises(UserError) as refused:
        lanes.split(number)
    assert str(refused.value).startswith(words)


@pytest.fixture
def two(monkeypatch):
    """Two lanes of a device each, in this process."""
    import jax

    return [lanes.Lane(index, (jax.devices()[0],), (0,)) for index in (0, 1)]


def test_a_lane_is_its_threads_own(two):
    seen = {}

    def work(lane):
        seen[lane.index] = (lanes.active(), processes.count(), processes.primary(), lanes.devices())

    lanes.side_by_side(two, work)
    assert seen == {lane.index: (lane, 1, True, list(lane.devices)) for lane in two}
    assert lanes.active() is None


@pytest.mark.parametrize("error", [StudyRefused("the disk is full"), preemption.Preempted("saved at step 3"), ValueError("a bug")])
def test_an_error_of_one_lane_ends_the_others_at_their_next_report(two, error):
    ended = []

    def work(lane):
        if lane.index == 1:
            raise error
        try:
            with Progress("work", total=None, unit="rows") as progress:
                while True:
                    progress.update(1)
        except KeyboardInterrupt:
            ended.append(lane.index)
            raise

    with pytest.raises(type(error), match=str(error)):
        lanes.side_by_side(two, work)
    assert ended == [0]


def test_sigterm_lets_trainings_save_and_ends_everything_else(two):
    import os

    saved, both = [], threading.Barrier(2, action=lambda: os.kill(os.getpid(), signal.SIGTERM))

    def work(lane):
        with preemption.saves_first() as save_and_end, Progress("train", total=None, unit="steps") as progress:
            both.wait(PATIENCE)
            for step in range(10**9):
                progress.update(1)
                if save_and_end(step):
                    saved.append(lane.index)
                    raise preemption.Preempted(f"saved at step {step}")

    with preemption.handled(), pytest.raises(preemption.Preempted):
        lanes.side_by_side(two, work)
    assert sorted(saved) == [0, 1]


# ------------------------------------------------------------------------------------------------------------------- whole studies


def numbers(workdir):
    """Of every run its results without times, and the bits of its parameters."""
    import jax

    from plasticity_jax.model.load import load_model

    found = {}
    for path in sorted((workdir / "tiny").glob("*/*/results.json")):
        results = json.loads(path.read_text())
        found[str(path.relative_to(workdir).parent)] = {k: v for k, v in results.items() if k not in ("seconds", "tokens_per_second")}
    for path in sorted((workdir / "tiny" / "pretrain").iterdir()):
        found[path.name] = [np.asarray(x).tobytes() for x in jax.tree.leaves(load_model(path).params)]
    return found


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """On four of eight devices, one run after the other. Eight, because XLA's CPU threads, and with them the order of sums, are as many as devices."""
    workdir = tmp_path_factory.mktemp("one")
    command = [sys.executable, "-c", IN_ONE, *map(str, STAGES), "--workdir", str(workdir)]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "mesh of 4 devices" in done.stderr
    return workdir


@pytest.mark.slow
def test_two_lanes_of_four_devices_give_the_bits_of_one_after_preemption_too(one_by_one, tmp_path):
    shutil.copytree(one_by_one, tmp_path / "work")
    for stage in ("pretrain", "spectra"):
        shutil.rmtree(tmp_path / "work" / "tiny" / stage)
    command = [*SIDE_BY_SIDE, "--workdir", tmp_path / "work"]
    pauses, paused = pausing(tmp_path, 13)
    process = start(*command, devices=8, **pauses)
    wait_until(paused, process)
    process.send_signal(signal.SIGTERM)
    status, lines = end(process)
    assert status == 130 and "saved at step" in lines[-1], lines
    status, lines = end(start(*command, devices=8))
    assert status == 0, lines
    assert sum("mesh of 4 devices" in line for line in lines) == 3
    assert numbers(tmp_path / "work") == numbers(one_by_one)


@pytest.mark.slow
def test_what_cannot_be_split_is_refused_before_anything_is_written(tmp_path):
    status, lines = end(start(*STAGES, "--config.launch.parallel_runs=3", "--workdir", tmp_path / "work", devices=8))
    assert status == 2 and "launch.parallel_runs=3 does not divide the 8 devices" in lines[-1]
    assert not (tmp_path / "work").exists()


@pytest.mark.processes
def test_each_of_two_processes_is_a_lane_and_sigterm_to_one_lets_both_save(one_by_one, tmp_path):
    """XLA adds over its own devices and over processes in another order, so that only roundings agree; the runs of both processes are whole."""
    import jax

    from plasticity_jax.model.load import load_model

    shutil.copytree(one_by_one, tmp_path / "work")
    for stage in ("pretrain", "spectra"):
        shutil.rmtree(tmp_path / "work" / "tiny" / stage)
    pauses = [pausing(tmp_path / str(number), 13) for number in (0, 1)]
    command = [*SIDE_BY_SIDE, "--workdir", tmp_path / "work"]
    two_of_them = pair(command, devices=(4, 4), environments=[environment for environment, _ in pauses])
    wait_until(lambda: all(paused() for _, paused in pauses), *two_of_them)
    two_of_them[1].send_signal(signal.SIGTERM)
    for status, lines in map(end, two_of_them):
        assert status == 130 and "saved at step" in lines[-1], lines
    ended = [end(process) for process in pair(command, devices=(4, 4))]
    assert [status for status, _ in ended] == [0, 0], ended
    for _, lines in ended:  # each tells of its own runs
        assert any("/tiny/pretrain" in line or "] pretrain/" in line for line in lines), lines
    expected, found = numbers(one_by_one), numbers(tmp_path / "work")
    assert found.keys() == expected.keys()
    for path in (one_by_one / "tiny" / "pretrain").iterdir():
        of_one, of_two = (jax.tree.leaves(load_model(place).params) for place in (path, tmp_path / "work" / "tiny" / "pretrain" / path.name))
        for x, y in zip(of_one, of_two, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * float(np.abs(x).max()))
