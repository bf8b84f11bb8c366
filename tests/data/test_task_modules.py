"""Tasks from a Python file beside the config: found without an installation, known by their content, and one line for every mistake."""

import re

import pytest

from plasticity_jax.config import load_config
from plasticity_jax.data import tasks
from plasticity_jax.data.content import content_hash
from plasticity_jax.errors import UserError
from plasticity_jax.stages.prepare import task_rows
from plasticity_jax.study.graph import build_graph

CONFIG = """
from plasticity_jax.config import base_config, task

def get_config():
    config = base_config()
    config.tasks = {"parity": task(module=MODULE, train_rows=30, test_rows=10, validation_rows=0), "addition2": task()}
    return config
"""
MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from plasticity_jax.data.tasks import Example, Rows, Task

@dataclass
class Asked:
    number: int

def build(wheels, settings) -> Rows:
    rows = [Example(str(n), f"Is {Asked(n).number} even?", "The answer is yes.", "yes", "generated", "generated") for n in range(50)]
    return Rows(rows[10:][: settings.train_rows], rows[:10])

PARITY = Task(name="parity", grader="exact", labels=("yes", "no"), packages=(), chance_note="half", build=build)
"""


@pytest.fixture
def load(tmp_path):
    def loaded(code: str | None = MODULE, module: str = "my_tasks.py"):
        if code is not None:
            (tmp_path / "my_tasks.py").write_text(code, encoding="utf-8")
        (tmp_path / "config.py").write_text(CONFIG.replace("MODULE", repr(module)), encoding="utf-8")
        return load_config(tmp_path / "config.py", [("train.compute_dtype", "float32")])

    return loaded


@pytest.mark.parametrize("module", ["my_tasks.py", "my_tasks"])
def test_a_module_beside_the_config_declares_a_task(load, module):
    rows = task_rows(load(module=module), "parity")
    assert (len(rows.train), len(rows.test)) == (30, 10) and rows.train[0].prompt == "Is 10 even?"
    assert "parity" not in tasks.tasks()


def test_an_edit_of_the_module_makes_its_runs_stale(load):
    before = build_graph(load())
    after = build_graph(load(MODULE.replace("Is {", "is {")))
    assert {run.task for run in after if run.id not in {run.id for run in before}} == {"parity"}
    assert task_rows(load(MODULE.replace("Is {", "is {")), "parity").train[0].prompt == "is 10 even?"
    assert [run.id for run in build_graph(load())] == [run.id for run in before]


def test_a_task_behind_an_entry_point_is_known_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "lab_parity.py").write_text(MODULE)
    about = tmp_path / "lab_parity-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lab_parity\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[plasticity_jax.tasks]\nparity = lab_parity\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tasks.discovered.cache_clear()
    try:
        assert tasks.code_of("parity") == content_hash(tmp_path / "lab_parity.py") is not None
        assert tasks.code_of("topic") is None
    finally:
        tasks.discovered.cache_clear()


@pytest.mark.parametrize(
    "code, module, message",
    [
        (
            None,
            "none.py",
            "tasks.parity.module=none.py: no such file (none.py); give a Python file, relative to the current folder or to the config's",
        ),
        ("x = (\n", "my_tasks.py", "my_tasks.py: line 1: SyntaxError: '(' was never closed"),
        ("\n1 / 0\n", "my_tasks.py", "my_tasks.py: line 2: ZeroDivisionError: division by zero"),
        ("raise SystemExit('no license')\n", "my_tasks.py", "my_tasks.py: line 1: SystemExit: no license"),
        (MODULE.replace('"parity"', '"odd"'), "my_tasks.py", "declares no Task named 'parity'; it has odd: give it this name"),
        ("", "my_tasks.py", "declares no Task named 'parity'; it has none"),
    ],
)
def test_a_module_that_declares_no_such_task_is_one_line(load, code, module, message):
    with pytest.raises(UserError) as error:
        load(code, module)
    # What get_config() refuses is said with the line of the config.
    assert message in re.sub(r"\s+", " ", str(error.value)) and "\n" not in str(error.value)
