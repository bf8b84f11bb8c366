"""Worker processes: every question has one answer, whatever becomes of a worker; a study's results do not depend on how many there are."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from running import PATIENCE, TINY, end, start, wait_until
from test_lanes import numbers

from plasticity_jax.errors import StudyRefused
from plasticity_jax.parallel import workers
from plasticity_jax.parallel.processes import Failed

# What a worker does with {"do": ..., "value": ...}; it is told the sum's first addend at its start.
PROGRAM = """
import os, time
from plasticity_jax.errors import StudyRefused
from plasticity_jax.parallel import preemption, workers

def prepare(task):
    def answer(question):
        match question["do"]:
            case "add":
                print("not an answer")
                return task["first"] + question["value"]
            case "who":
                time.sleep(0.05)
                return os.getpid()
            case "die":
                os.kill(os.getpid(), 9)
            case "refuse" | "fail":
                while not os.path.exists(question["value"]):
                    time.sleep(0.01)
                if question["do"] == "fail":
                    raise ValueError("boom")
                raise StudyRefused("the disk is full; make room.")
            case "wait":
                open(question["value"], "w").write(str(os.getpid()))
                with preemption.saves_first() as save_now:
                    while not save_now(0):
                        time.sleep(0.01)
    return answer

workers.serve(prepare)
"""


def asked(questions, number=2, go_on=lambda answer: True):
    answers = {}

    def answered(index, answer):
        answers[index] = answer
        return go_on(answer)

    with workers.Workers(number, PROGRAM, {"first": 100}) as crew:
        crew.ask([{"do": do, "value": value} for do, value in questions], answered)
    return answers


def test_every_question_is_answered_once_and_what_is_printed_is_no_answer():
    assert asked([("add", value) for value in range(20)]) == {value: 100 + value for value in range(20)}


def test_questions_of_one_kind_go_to_one_worker_while_the_other_has_any():
    places: dict[str, list] = {}

    def answered(index, answer):
        places.setdefault("abcdab"[index % 6], []).append(answer)
        return True

    with workers.Workers(2, PROGRAM, {"first": 100}) as crew:
        crew.ask([{"do": "who", "value": None}] * 12, answered, kinds=list("abcdab" * 2))
    assert sum(map(len, places.values())) == 12 and len({pid for pids in places.values() for pid in pids}) == 2
    # Four kinds and two workers: only the last kind can be shared.
    assert sum(len(set(pids)) == 1 for pids in places.values()) >= 3


def test_a_worker_that_dies_costs_its_question_only():
    found = asked([("add", 0), ("die", 0), ("add", 1), ("die", 0), ("add", 2)])
    assert found == {0: 100, 1: {"died": "signal 9 (SIGKILL)"}, 2: 101, 3: {"died": "signal 9 (SIGKILL)"}, 4: 102}


def test_nothing_more_is_asked_once_an_answer_says_so():
    assert asked([("add", value) for value in range(5)], number=1, go_on=lambda answer: answer < 101) == {0: 100, 1: 101}


@pytest.mark.parametrize(("do", "error", "words"), [("refuse", StudyRefused, "the disk is full; make room."), ("fail", Failed, "boom")])
def test_the_error_of_a_worker_is_raised_here_and_the_others_save_and_end(tmp_path, do, error, words):
    waiting = tmp_path / "waiting"
    with pytest.raises(error, match=words):
        asked([("wait", str(waiting)), (do, str(waiting))])
    assert ended(int(waiting.read_text()))


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


ASKING = f"""
import sys
from plasticity_jax.parallel import preemption, workers
try:
    with preemption.handled(), workers.Workers(2, {PROGRAM!r}, {{}}) as crew:
        crew.ask([{{"do": "wait", "value": path}} for path in sys.argv[1:]], lambda *_: True)
except preemption.Preempted as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "ended by SIGTERM after the last step of a training, which is saved\n"),
        (signal.SIGINT, "ended by Ctrl-C after the last step of a training, which is saved\n"),
        (signal.SIGKILL, ""),
    ],
    ids=lambda value: str(value),
)
def test_workers_save_after_sigterm_and_end_with_whoever_asks(tmp_path, number, said):
    places = [tmp_path / "one", tmp_path / "other"]
    command = [sys.executable, "-c", ASKING, *map(str, places)]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all(place.is_file() and place.read_text() for place in places), asking)
    asking.send_signal(number)
    out, errors = asking.communicate(timeout=PATIENCE)
    assert (out, errors) == (said, "")
    for place in places:
        wait_until(lambda place=place: ended(int(place.read_text())))


@pytest.mark.parametrize(("asked_for", "devices", "expected"), [(1, 1, None), (2, 1, 2), (2, 8, None), (0, 8, None)], ids=lambda value: str(value))
def test_runs_share_the_process_unless_a_cpu_has_a_single_device(monkeypatch, asked_for, devices, expected):
    import jax

    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert workers.number_of_workers(asked_for) == expected


def test_as_many_workers_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 7 * 2**30 // 4096}.__getitem__)
    assert workers.number_of_workers(0) == 3


# ------------------------------------------------------------------------------------------------------------------- whole studies

STUDY = ["study", "--config", TINY, "--config.train.compute_dtype=float32", "--config.grid.timescales=(None,0.8,0.2)", "--config.tasks={}"]
STAGES = [*STUDY, "--stages", "prepare,init,pretrain"]


@pytest.mark.slow
def test_a_study_does_not_depend_on_the_number_of_workers_nor_on_a_kill(tmp_path):
    status, lines = end(start(*STAGES, "--config.launch.parallel_runs=3", "--workdir", tmp_path / "whole"))
    assert status == 0, lines
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "tiny" / "pretrain")
    process = start(*STAGES, "--config.launch.parallel_runs=2", "--workdir", tmp_path / "killed")
    wait_until(lambda: list((tmp_path / "killed" / "tiny" / "pretrain").glob("*/checkpoints/10")), process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    status, lines = end(start(*STAGES, "--config.launch.parallel_runs=2", "--workdir", tmp_path / "killed"))
    assert status == 0, lines
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
