"""A workdir on an object store, through the real command line: data is the same as on a disk, and checkpoints are refused before anything is written."""

import json
import uuid

import pytest

from plasticity_jax.cli import main
from plasticity_jax.runs import storage
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.storage import location

CONFIG = """
from plasticity_jax.config import base_config, task

def get_config():
    config = base_config()
    config.name = "small"
    config.data.sources, config.data.max_documents = ("bbc",), 60
    config.model.vocab_size, config.model.d_model, config.model.n_layers, config.model.d_ff = 300, 16, 1, 32
    config.train.seq_len, config.train.compute_dtype = 32, "float32"
    config.tasks = {"topic": task(train_rows=16, test_rows=4, validation_rows=4)}
    config.probe.sets, config.probe.train_rows, config.probe.test_rows, config.probe.max_length = ("topic",), 40, 20, 32
    return config
"""


@pytest.fixture
def run(tmp_path, wheels_dir, monkeypatch):
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))

    def command(name, workdir):
        return main([name, "--config", str(tmp_path / "small.py"), "--workdir", str(workdir), f"--config.data.wheels={wheels_dir}"])

    return command


@pytest.fixture
def store():
    return location(f"memory://{uuid.uuid4().hex}/work")


def test_prepared_data_is_that_of_a_disk(run, store, tmp_path, capsys):
    disk = tmp_path / "work"
    assert run("prepare", disk) == run("prepare", store) == 0
    files = disk.glob("small/**/*")  # logs stay on the machine
    names = {path.relative_to(disk).as_posix() for path in files if path.is_file() and path.name != "LOCK"}
    assert names == {name.removeprefix(f"{store.path}/") for name in store.fs.find(store.path)}
    for name in names:
        if name.endswith((".npy", "tokenizer.json", "train.jsonl", "test.jsonl", "tokens.json", ".array_record")):
            assert (store / name).read_bytes() == (disk / name).read_bytes(), name
    for path in disk.glob("small/*/*"):
        run_id = path.relative_to(disk).as_posix()
        here, there = (RunDirectory(place).results() for place in (path, store / run_id))
        assert here | {"seconds": None} == there | {"seconds": None}, run_id
    done = {name: store.fs.modified(name) for name in store.fs.find(store.path) if name.endswith(DONE)}
    assert run("prepare", store) == 0 and done == {name: store.fs.modified(name) for name in done}, "what is done stays"
    capsys.readouterr()
    assert main(["status", "--workdir", str(store), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert {row["state"] for row in rows if row["stage"] == "prepare"} == {"done"}
    assert all(row["path"].startswith("memory://") for row in rows)


@pytest.mark.parametrize("command", ["study", "pretrain"])
def test_checkpoints_are_refused_before_anything_is_written(run, store, capsys, command):
    assert run(command, store) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"plasticity: {store}: checkpoints are written to a local or shared disk, or to gs://; give one of these."
    assert not store.fs.find(store.path)


def test_a_place_that_is_no_store_is_refused(store, capsys):
    assert main(["status", "--workdir", str(store / "none")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("plasticity: --workdir=memory://")
    assert main(["status", "--workdir", "nfs9://host/x"]) == 2
    assert "not a known kind of store" in capsys.readouterr().err
