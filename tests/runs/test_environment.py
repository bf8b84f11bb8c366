"""Where runs were made: recorded with them, over resumes too, and what differs is named."""

import json
import os
import platform

import jax
import pytest

from plasticity_jax.cli import main
from plasticity_jax.config import StudyConfig
from plasticity_jax.runs.directory import PROVENANCE, RunDirectory
from plasticity_jax.runs.environment import differing, environments_of
from plasticity_jax.runs.run import Run
from plasticity_jax.study.environment import cpu, environment


def test_an_environment_names_what_changes_rounding(monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "high")
    found = environment(StudyConfig(), "all", together=3)
    assert found["python"] == platform.python_version() and found["libraries"]["jax"] == jax.__version__
    assert found["device_kind"] == jax.devices()[0].device_kind and found["devices"] == found["mesh"]["data"] == len(jax.devices())
    assert (found["processes"], found["members_in_one_program"], found["attention"]) == (1, 3, "xla")
    assert found["flags"] == {"XLA_FLAGS": os.environ["XLA_FLAGS"], "JAX_DEFAULT_MATMUL_PRECISION": "high"}
    assert json.loads(json.dumps(found)) == found
    assert "mesh" not in environment(StudyConfig(), "first", together=1) and "devices" not in environment(StudyConfig(), "none", together=1)


def test_the_units_of_this_processor_are_those_that_the_system_lists():
    found, about = cpu(), open("/proc/cpuinfo", encoding="utf-8").read()
    assert found["cores"] == os.cpu_count() and found["machine"] == platform.machine()
    for unit in ("avx2", "avx512f", "amx_bf16", "fma", "asimd"):
        assert (unit in found.get("units", "").split()) == (f" {unit} " in about.replace("\n", " "))


def test_what_differs_is_named_and_cadences_are_not():
    cpus, gpu = ({"device_kind": kind, "libraries": {"jax": version}} for kind, version in (("cpu", "1"), ("H100", "1")))
    newer = {"device_kind": "cpu", "libraries": {"jax": "2"}}
    fields = {"train.remat": "none", "train.log_every": 10, "data.wheels": "here"}
    one = {"environments": [cpus], "execution": fields, "git": {"commit": "a"}}
    assert differing([one, one]) == {}
    assert differing([one, one | {"execution": fields | {"train.log_every": 20, "data.wheels": "there"}}]) == {}
    assert differing([one, one | {"environments": [gpu]}]) == {"device_kind": ["cpu", "H100"]}
    assert differing([one | {"environments": [cpus, newer]}, one]) == {"libraries jax": ["1 then 2", "1"]}
    assert differing([one, one | {"execution": fields | {"train.remat": "full"}}]) == {"config train.remat": ["none", "full"]}
    assert differing([one, one | {"git": {"commit": "b"}}]) == {"code": ["a", "b"]}


@pytest.mark.parametrize("provenance", [{}, {"environments": []}, {"environments": 3}, {"environments": [[]], "execution": [], "git": None}])
def test_a_record_from_before_or_a_damaged_one_says_little_and_breaks_nothing(provenance):
    assert len(environments_of(provenance)) <= 1 and differing([provenance, {"device_kind": "cpu"}]) == {}


@pytest.fixture
def two(tmp_path):
    """Two pretrainings that differ in λ, in the library, and from their second logged step on."""
    for name, decay, version, loss in (("a", 0.0, "1", 2.0), ("b", 0.1, "2", 2.5)):
        directory = RunDirectory(tmp_path / name)
        run = Run("study", "pretrain", name, {"weight_decay": decay}, {"corpus": "prepare/corpus-1"}, member=name)
        with directory.work(run, StudyConfig()):
            rows = [{"step": 1, "loss": 3.0, "seconds": decay}, {"step": 5, "loss": loss, "seconds": decay}, {"step": 9, "loss": decay, "seconds": 1}]
            (directory.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            directory.provenance |= {"environments": [{"libraries": {"jax": version}}], "data_fingerprint": "f"}
            directory.finish({"train_loss": loss, "seconds": decay})
    return tmp_path


def test_diff_says_what_differs_between_two_runs(two, capsys):
    assert main(["diff", str(two / "a"), str(two / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "config": {"run.fields.weight_decay": [0.0, 0.1]},
        "inputs": {},
        "environment": {"libraries jax": ["1", "2"]},
        "metrics": {"step 5 loss": [2.0, 2.5]},
        "results": {"train_loss": [2.0, 2.5]},
    }
    assert main(["diff", str(two / "a"), str(two / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"{kind}: the same" for kind in found]
    (two / "b" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert main(["diff", str(two / "a"), str(two / "b")]) == 0
    assert "  last step: 9 | 1" in capsys.readouterr().out
    assert main(["diff", str(two), str(two / "a")]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_an_attempt_adds_its_environment_to_those_before(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    assert directory.earlier_environments() == []
    (directory.path / PROVENANCE).write_text(json.dumps({"environments": [{"python": "3"}]}))
    assert directory.earlier_environments() == [{"python": "3"}]
    (directory.path / PROVENANCE).write_text("{")
    assert directory.earlier_environments() == []
