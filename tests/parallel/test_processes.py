"""Two processes of two simulated devices each, over loopback, against one process."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import TINY, end, pausing, start, wait_until

from plasticity_jax.errors import StudyRefused, UserError
from plasticity_jax.parallel import processes

pytestmark = pytest.mark.slow

CONFIG = ["--config", TINY, "--config.train.compute_dtype=float32", "--config.train.steps=24", "--config.train.checkpoint_every=8"]
CONFIG += ["--config.train.log_every=1", "--config.train.eval_tokens=64", "--config.train.held_out_tokens=256", "--config.launch.start_timeout=300"]
CONFIG += ["--config.data.max_documents=100", "--config.train.seq_len=16"]
PRETRAIN = ["pretrain", *CONFIG, "--member", "wd0"]
SHARDED = [*PRETRAIN, "--config.mesh.fsdp=2"]
SMALLER = """
import importlib.util
from plasticity_jax.config import task

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.max_documents, config.train.steps, config.train.compute_dtype = 100, 8, "float32"
    config.train.held_out_tokens, config.train.eval_tokens, config.gap.tokens_per_side = 256, 64, 256
    config.tasks = {{"topic": task(train_rows=32, test_rows=16, validation_rows=0, epochs=1, max_new_tokens=8, verifier_rows=16)}}
    config.reward.scorer, config.verifier.epochs, config.reward.max_length = "verifier", 1, 256
    config.finetune.length_buckets = (256,)
    config.grid.timescales, config.probe.sets, config.evaluate.max_length = (0.2,), ("topic",), 200
    return config
"""


def one(arguments, devices=4):
    status, lines = end(start(*arguments, devices=devices))
    assert status == 0, "\n".join(lines)


def pair(arguments, devices=(2, 2), each=((), ()), environments=({}, {})):
    port = free_port()
    together = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    return [start(*arguments, *each[i], *together, i, devices=devices[i], **environments[i]) for i in (0, 1)]


def two(arguments):
    for status, lines in map(end, pair(arguments)):
        assert status == 0, "\n".join(lines)


def free_port():
    with socket.socket() as found:
        try:
            found.bind(("127.0.0.1", 0))
        except OSError as error:
            pytest.fail(f"no free TCP port on 127.0.0.1 ({error}): end what holds them, or allow this user to bind one", pytrace=False)
        return found.getsockname()[1]


def run_folder(workdir):
    [folder] = (workdir / "tiny" / "pretrain").iterdir()
    return folder


def losses(workdir):
    return {row["step"]: row["loss"] for row in map(json.loads, open(run_folder(workdir) / "metrics.jsonl"))}


def held_out(workdir):
    return json.loads((run_folder(workdir) / "results.json").read_text())["held_out"]["loss"]


def final_params(workdir):
    import jax

    from plasticity_jax.model.load import load_model

    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(run_folder(workdir)).params)]


def assert_close(a, b):
    assert losses(a).keys() == losses(b).keys() == set(range(1, 25))
    np.testing.assert_allclose(list(losses(a).values()), list(losses(b).values()), rtol=1e-5)
    np.testing.assert_allclose(held_out(a), held_out(b), rtol=1e-5)
    for x, y in zip(final_params(a), final_params(b), strict=True):
        assert np.linalg.norm(x.astype(np.float64) - y) <= 1e-5 * np.linalg.norm(x.astype(np.float64))


def assert_same(a, b):
    assert losses(a) == losses(b)
    assert held_out(a) == held_out(b)
    for x, y in zip(final_params(a), final_params(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir with the corpus and the step-0 parameters."""
    workdir = tmp_path_factory.mktemp("prepared")
    one(["study", *CONFIG, "--stages", "prepare,init", "--workdir", workdir], devices=1)
    return workdir


@pytest.fixture
def workdir(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "work")


@pytest.fixture(scope="module")
def by_one(prepared, tmp_path_factory):
    workdir = shutil.copytree(prepared, tmp_path_factory.mktemp("one") / "work")
    one([*PRETRAIN, "--workdir", workdir], devices=1)
    return workdir


@pytest.fixture(scope="module")
def by_two(prepared, tmp_path_factory):
    workdir = shutil.copytree(prepared, tmp_path_factory.mktemp("two") / "work")
    two([*SHARDED, "--workdir", workdir])
    return workdir


def worker_of(process):
    return int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()[0])


@pytest.mark.parametrize("error", [UserError("no"), StudyRefused("no")])
def test_an_error_keeps_its_kind_on_its_way_to_the_others(error):
    with pytest.raises(type(error), match="^no$") as heard:
        processes.outcome_of(json.loads(json.dumps(processes.as_message(error))))
    assert type(heard.value) is type(error)


def test_two_processes_give_the_losses_of_one(by_one, by_two):
    assert_close(by_one, by_two)
    mesh = json.loads((run_folder(by_two) / "provenance.json").read_text())["mesh"]
    assert mesh == {"member": 1, "data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_killed_process_ends_all_in_one_line_and_the_pair_resumes_to_the_same_bits(workdir, by_two, tmp_path, victim):
    arguments = [*SHARDED, "--workdir", workdir]
    environment, paused = pausing(tmp_path, 13)
    processes = pair(arguments, environments=[environment if i == victim else {} for i in (0, 1)])
    wait_until(paused, *processes)
    os.kill(worker_of(processes[victim]), signal.SIGKILL)
    for i, (status, lines) in enumerate(map(end, processes)):
        assert status == 1
        assert re.fullmatch(r"plasticity: .*process \d of 2 .*; run the same commands again: they resume\.?", lines[-1]), lines[-1]
        if i == victim:
            assert f"process {victim} of 2 ended with signal 9 (SIGKILL); see " in lines[-1]
            assert Path(lines[-1].partition("; see ")[2].partition(";")[0]).is_file()
        assert not any("Traceback" in line or "@ 0x" in line for line in lines)
    two(arguments)
    assert_same(workdir, by_two)


@pytest.mark.processes
def test_a_worker_ends_with_its_parent_and_one_process_takes_over(workdir, by_one, tmp_path):
    arguments = [*PRETRAIN, "--workdir", workdir]
    environment, paused = pausing(tmp_path, 13)
    processes = pair(arguments, environments=({}, environment))
    wait_until(paused, *processes)
    processes[1].kill()
    status, lines = end(processes[0])
    assert status == 1
    assert re.search(r"process \d of 2 .*; run the same commands again", lines[-1]), lines[-1]
    assert end(processes[1])[0] == -signal.SIGKILL
    one(arguments, devices=1)
    assert_close(workdir, by_one)


@pytest.mark.processes
def test_two_processes_take_over_from_one(workdir, by_one, tmp_path):
    arguments = [*PRETRAIN, "--workdir", workdir]
    environment, paused = pausing(tmp_path, 13)
    process = start(*arguments, devices=1, **environment)
    wait_until(paused, process)
    process.kill()
    process.communicate()
    two(arguments)
    assert_close(workdir, by_one)


def test_an_interrupt_reaches_the_workers(workdir, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    pauses = [pausing(folder, 1) for folder in folders]
    processes = pair([*PRETRAIN, "--workdir", workdir], environments=[environment for environment, _ in pauses])
    wait_until(lambda: all(paused() for _, paused in pauses), *processes)
    for process in processes:
        process.send_signal(signal.SIGINT)
    for status, lines in map(end, processes):
        assert status == 130, lines
        assert lines[-1].startswith("plasticity: ended by Ctrl-C, saved at step "), lines


def test_sigterm_to_one_process_saves_a_step_of_all_and_the_pair_resumes_to_the_same_bits(workdir, by_two, tmp_path):
    arguments = [*SHARDED, "--workdir", workdir]
    environment, paused = pausing(tmp_path, 13)
    processes = pair(arguments, environments=({}, environment))
    wait_until(paused, *processes)
    processes[1].send_signal(signal.SIGTERM)
    for status, lines in map(end, processes):
        assert status == 130, lines
        assert lines[-1] == "plasticity: ended by SIGTERM, saved at step 16 of 24; the same command resumes."
    assert max(int(path.name) for path in (run_folder(workdir) / "checkpoints").iterdir() if path.name.isdigit()) == 16
    two(arguments)
    assert_same(workdir, by_two)


@pytest.mark.processes
def test_members_of_one_program_on_two_processes_give_the_losses_of_one(workdir, by_one):
    # Both members save at the same steps, each in the background.
    two(["pretrain", *CONFIG, "--workdir", workdir, "--config.grid.mode=vmapped", "--config.train.checkpoint_every=10"])
    finished = sorted(path.parent.name for path in (workdir / "tiny" / "pretrain").glob("*/DONE"))
    assert len(finished) == 2
    shutil.rmtree(workdir / "tiny" / "pretrain" / next(name for name in finished if not name.startswith("wd0-")))
    assert_close(workdir, by_one)


@pytest.mark.processes
def test_a_storage_problem_of_the_first_process_is_refused_by_all(workdir):
    shutil.rmtree(workdir / "tiny" / "init")
    (workdir / "tiny" / "init").touch()
    for status, lines in map(end, pair([*PRETRAIN, "--workdir", workdir], devices=(1, 1))):
        assert status == 2
        assert f"--workdir={workdir}: Not a directory" in lines[-1] and lines[-1].endswith("then run again: it resumes.")


@pytest.mark.processes
def test_a_study_of_two_processes_gives_the_results_of_one(tmp_path):
    config = tmp_path / "smaller.py"
    config.write_text(SMALLER.format(tiny=str(TINY)))
    arguments = ["study", "--config", config]
    one([*arguments, "--workdir", tmp_path / "one", "--config.finetune.batch_size=6"], devices=1)  # not a multiple of the devices
    two([*arguments, "--workdir", tmp_path / "two", "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.finetune.batch_size=6"])
    found = {path.relative_to(tmp_path / "one"): json.loads(path.read_text()) for path in sorted((tmp_path / "one").glob("tiny/*/*/results.json"))}
    assert {path.parts[1] for path in found} == {
        *("prepare", "init", "pretrain", "evaluate", "finetune", "probe", "spectra", "gap", "samples", "verifier", "reward"),
    }
    for path, results in found.items():
        assert_alike(results, json.loads((tmp_path / "two" / path).read_text()), str(path))
    assert (tmp_path / "two" / "tiny" / "report" / "index.html").is_file()


def assert_alike(a, b, where):
    """Equal but for times, and for numbers that a reduction over devices rounds otherwise."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "tokens_per_second", "tokens_per_second_generated"):
                assert_alike(a[key], b[key], f"{where}: {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_alike(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-6), where
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--coordinator", "127.0.0.1:1"], "go together; give all three, or none"),
        (["--coordinator", "127.0.0.1", "--num-processes", "2", "--process-id", "0"], "--coordinator=127.0.0.1 must be HOST:PORT"),
        (["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"], "--process-id=2 must lie between 0 and"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, arguments, words):
    status, lines = end(start(*PRETRAIN, "--workdir", tmp_path / "w", *arguments))
    assert (status, len(lines)) == (2, 1)
    assert words in lines[0]
    assert not (tmp_path / "w").exists()


def test_an_unreachable_coordinator_is_one_line_after_the_timeout(tmp_path):
    alone = ["--config.launch.start_timeout=2", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "1"]
    status, lines = end(start(*PRETRAIN, "--workdir", tmp_path, *alone))
    assert status == 2
    assert "the 2 processes did not meet within 2 s" in lines[-1]


def test_different_numbers_of_processes_are_one_line_on_all(tmp_path):
    port = free_port()
    together = ["--coordinator", f"127.0.0.1:{port}", "--num-processes"]
    processes = [start(*PRETRAIN, "--workdir", tmp_path, *together, n, "--process-id", i) for i, n in enumerate((2, 3))]
    for i, (status, lines) in enumerate(map(end, processes)):
        assert status == 2
        assert lines[-1].startswith(f"plasticity: --num-processes={2 + i} of process {i} is {3 - i} for process {1 - i} (")


@pytest.mark.parametrize(
    ("devices", "each", "words"),
    [
        ((1, 2), ((), ()), "unequal hosts: process 0"),
        pytest.param(
            (1, 1),
            (("--workdir", "{0}/a"), ("--workdir", "{0}/b")),
            "is not the same folder for process 1 as for process 0",
            marks=pytest.mark.processes,
        ),
        pytest.param((1, 1), (("--config.mesh.fsdp=3",),) * 2, "mesh.fsdp=3", marks=pytest.mark.processes),
    ],
)
def test_what_one_process_finds_wrong_all_say(tmp_path, devices, each, words):
    each = [[argument.format(tmp_path) for argument in own] for own in each]
    for status, lines in map(end, pair([*PRETRAIN, "--workdir", tmp_path / "w"], devices, each)):
        assert status == 2
        assert lines[-1].startswith("plasticity: ") and words in lines[-1]
    assert not list(tmp_path.glob("*/*/study.json"))


def supervised(tmp_path, ending):
    """A run whose worker is a stand-in: it joins, writes to its log and ends like this. The run, and the log if it is kept."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'this is process 1 of 2' >&2\necho 'from the runtime' >&2\n{ending}\n")
    python.chmod(0o755)
    code = f"import sys; sys.executable = {str(python)!r}\nfrom pathlib import Path\nfrom plasticity_jax.parallel.supervise import supervise\n"
    code += f"sys.exit(supervise([], Path({str(tmp_path / 'logs')!r})))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return ended, next((tmp_path / "logs").glob("*"), None)


@pytest.mark.parametrize(
    ("ending", "shown"), [("exit 3", "status 3"), ("kill -SEGV $$", "signal 11 (SIGSEGV)"), ("kill -ABRT $$", "signal 6 (SIGABRT)")]
)
def test_a_worker_that_dies_without_a_word_is_one_line_with_its_log(tmp_path, ending, shown):
    """As a runtime dies that ends the process from C++."""
    ended, log = supervised(tmp_path, ending)
    assert ended.returncode == 1 and "from the runtime" in log.read_text()
    assert ended.stderr == f"plasticity: process 1 of 2 ended with {shown}; see {log}; run the same commands again: they resume\n"


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_worker_that_is_aborted_after_its_last_word_ends_as_it_said(tmp_path, status):
    """Process 0 may be gone before this one is, for which the runtime aborts it."""
    ended, log = supervised(tmp_path, f"echo 'leaving with status {status}' >&2\nkill -ABRT $$")
    assert (ended.returncode, ended.stderr) == (status, "")
    assert (log is None) == (status == 2)
