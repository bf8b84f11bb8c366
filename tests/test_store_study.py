"""A whole study whose workdir is on an object store, through the real command line, against the same study on a disk."""

import json
import logging
import uuid

import jax
import numpy as np
import pytest

import plasticity_jax as pj
from plasticity_jax.cli import main
from plasticity_jax.runs import records, storage
from plasticity_jax.runs.append_log import read_log
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import read_jsonl
from plasticity_jax.runs.records import METRICS
from plasticity_jax.runs.storage import location

pytestmark = pytest.mark.slow

CONFIG = """
from plasticity_jax.config import base_config, task

def get_config():
    config = base_config()
    config.name = "small"
    config.data.sources, config.data.max_documents = ("bbc",), 60
    config.model.vocab_size, config.model.d_model, config.model.n_layers, config.model.d_ff = 300, 16, 1, 32
    config.train.batch_size, config.train.seq_len, config.train.steps = 4, 32, 8
    config.train.checkpoint_every, config.train.eval_every, config.train.compute_dtype = 3, 4, "float32"
    config.train.held_out_tokens, config.train.eval_tokens = 128, 64
    config.grid.weight_decay, config.grid.timescales = (0.1,), None
    config.tasks = {"topic": task(train_rows=16, test_rows=4, epochs=1, max_new_tokens=4)}
    config.finetune.batch_size, config.finetune.length_buckets = 8, (256,)
    config.evaluate.n_samples, config.evaluate.prompt_buckets, config.evaluate.batch_size = 2, (256,), 12
    config.probe.sets, config.probe.train_rows, config.probe.test_rows, config.probe.max_length = ("topic",), 40, 20, 32
    config.gap.tokens_per_side = 128
    config.report.bootstrap_samples = 50
    return config
"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory, wheels_dir):
    """(workdir on a disk, workdir on a store): the same study, the second interrupted while it pretrains and then run again."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "small.py").write_text(CONFIG)
    patch, heard = pytest.MonkeyPatch(), _Heard()
    patch.setenv(storage.CACHE_VARIABLE, str(folder / "cache"))
    disk, store = folder / "work", location(f"memory://{uuid.uuid4().hex}/work")

    def study(workdir):
        return main(["study", "--config", str(folder / "small.py"), "--workdir", str(workdir), f"--config.data.wheels={wheels_dir}"])

    assert study(disk) == 0
    write = records.MetricsLog.write

    def interrupted(self, step, **values):
        if step == 5:
            raise KeyboardInterrupt
        write(self, step, **values)

    with pytest.MonkeyPatch.context() as once:
        once.setattr(records.MetricsLog, "write", interrupted)
        assert study(store) == 130
    logging.getLogger("plasticity_jax").addHandler(heard)
    assert study(store) == 0
    assert any("resumes at step 3 of 8" in line for line in heard.lines)
    heard.lines.clear()
    before = _objects(store)
    assert study(store) == 0
    assert any("0 runs carried out" in line for line in heard.lines)
    assert {name: time for name, time in _objects(store).items() if "/report/" not in name and not name.endswith("study.json")} == {
        name: time for name, time in before.items() if "/report/" not in name and not name.endswith("study.json")
    }
    logging.getLogger("plasticity_jax").removeHandler(heard)
    yield disk, store
    patch.undo()


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _objects(store):
    return {name: store.fs.modified(name) for name in store.fs.find(store.path)}


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if "second" not in key}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _rows(workdir):
    return {row["id"]: row for row in pj.open_study(str(workdir)).runs}


def test_every_result_is_that_of_the_study_on_a_disk(studies):
    disk, store = map(_rows, studies)
    assert disk.keys() == store.keys() and {row["state"] for row in store.values()} == {"done"}
    for run_id, row in store.items():
        assert row["path"].startswith("memory://")
        assert _timeless(RunDirectory(location(row["path"])).results()) == _timeless(RunDirectory(location(disk[run_id]["path"])).results()), run_id


def test_the_files_are_those_of_the_study_on_a_disk(studies):
    disk, store = studies
    names = {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}
    found = {name.removeprefix(f"{store.path}/") for name in store.fs.find(store.path)}
    different = {"metrics.", "events.", "checkpoints/"}
    assert {n for n in names if not any(d in n for d in different)} == {n for n in found if not any(d in n for d in different)}
    assert any("/tensorboard/events." in name for name in found)
    for name in names:
        if name.endswith((".npy", "tokenizer.json", "completions.jsonl", "train.jsonl", "tokens.json")):
            assert (store / name).read_bytes() == (disk / name).read_bytes(), name


def test_parameters_are_the_same_bits(studies):
    for run_id, row in _rows(studies[1]).items():
        if row["stage"] in ("init", "pretrain", "finetune"):
            here, there = (pj.load_model(_rows(workdir)[run_id]["path"]) for workdir in studies)
            jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
            assert row["stage"] == "init" or there.tokenizer.fingerprint == here.tokenizer.fingerprint


def test_the_log_holds_every_step_once(studies):
    disk, store = (location(next(row["path"] for row in _rows(workdir).values() if row["stage"] == "pretrain")) for workdir in studies)
    assert _timeless(read_log(store / METRICS)) == _timeless(read_jsonl(disk / METRICS))
    assert not (store / METRICS).exists() and (store / "metrics.00001.jsonl").is_file()


def test_the_page_and_the_table_are_the_same(studies):
    disk, store = studies
    assert pj.open_study(str(store)).table() == pj.open_study(disk).table()
    assert (store / "small" / "report" / "tables" / "summary.csv").read_bytes() == (disk / "small" / "report" / "tables" / "summary.csv").read_bytes()
    assert (store / "small" / "report" / "index.html").read_text(encoding="utf-8").startswith("<!")


def test_other_commands_take_the_url(studies, capsys):
    store = studies[1]
    assert main(["status", "--workdir", str(store), "--json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)["runs"]} == {"done"}
    model = next(row["path"] for row in _rows(store).values() if row["stage"] == "finetune")
    assert main(["generate", "--model", model, "--prompt", "The ", "--max-new-tokens", "2"]) == 0
    assert main(["status", "--workdir", str(store / "none")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("plasticity: --workdir=memory://")
    assert main(["status", "--workdir", "nfs9://host/x"]) == 2
    assert "no known kind of store" in capsys.readouterr().err
