"""Plug-ins: one that cannot be used is one line, and the rest works."""

import logging
import subprocess
import sys
import textwrap

import pytest
from running import TINY, environment

from plasticity_jax.data.tasks import Task
from plasticity_jax.plugins import discover
from plasticity_jax.stages import Stage, stages

OURS = stages()  # before any plug-in is on the path
GOOD = "from plasticity_jax.stages import Stage\nSTAGE = Stage(name={name!r}, parents={{'model': 'pretrain'}}, run=lambda context: {{}})\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Adds modules with an entry point each to the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def added(group="plasticity_jax.stages", **modules):
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
            about = tmp_path / f"{name}-1.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}\n")
            monkeypatch.delitem(sys.modules, name, raising=False)
        return discover("plasticity_jax.stages", package="plasticity_jax.stages", kind=Stage)

    return added


def test_a_stage_of_another_package_is_found(install):
    found = install(lab_norms=GOOD.format(name="norms"))
    assert found.problems == () and set(found.found) == {*OURS, "norms"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("def broken(:\n", "SyntaxError"),
        ("x = 1\n", "holds no Stage"),
        (
            "from plasticity_jax.stages import Stage\nSTAGE = Stage(name='x', parents={'model': 'pretrain'})\n",
            "missing 1 required positional argument: 'run'",
        ),
        ("from plasticity_jax.stages import Stage\nSTAGE = Stage(name='x', parents={'model': 'pretrain'}, run=None)\n", "has run=None"),
        ("from plasticity_jax.stages import Stage\nSTAGE = Stage(name='x', run=print)\n", "neither a parent 'model' nor a plan"),
        ("from plasticity_jax.stages import Stage\nSTAGE = Stage(name='a b', parents={'model': 'pretrain'}, run=print)\n", "stage name 'a b'"),
        (GOOD.format(name="gap"), "the name 'gap' is taken by plasticity_jax"),
    ],
)
def test_a_mistake_in_a_plug_in_is_one_line_and_the_rest_works(install, caplog, code, words):
    with caplog.at_level(logging.WARNING, logger="plasticity_jax"):
        found = install(lab_bad=code, lab_good=GOOD.format(name="norms"))
    [line] = found.problems
    assert "plug-in 'lab_bad' (lab_bad) is left out" in line and words in line and "\n" not in line
    assert [record.getMessage() for record in caplog.records] == [line]
    assert set(found.found) == {*OURS, "norms"} and found.found["gap"] is OURS["gap"]


def test_two_plug_ins_with_one_name_are_both_left_out(install):
    found = install(lab_a=GOOD.format(name="norms"), lab_b=GOOD.format(name="norms"), lab_c=GOOD.format(name="other"))
    [line] = found.problems
    assert "plug-in 'lab_a' (lab_a) and plug-in 'lab_b' (lab_b) both define 'norms'" in line and "\n" not in line
    assert set(found.found) == {*OURS, "other"}


def test_a_mistake_in_one_file_of_a_folder_does_not_break_the_others(tmp_path, monkeypatch):
    folder = tmp_path / "lab_tasks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text(
        "from plasticity_jax.data.tasks import Task\nTASK = Task('good', 'exact', (), (), '', lambda wheels, settings: None)\n"
    )
    (folder / "bad.py").write_text("raise RuntimeError('half written')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = discover("no.such.group", package="lab_tasks", kind=Task)
    assert list(found.found) == ["good"] and found.problems == ("lab_tasks/bad.py is left out: RuntimeError: half written",)


def test_the_program_works_beside_a_broken_plug_in(tmp_path):
    (tmp_path / "lab_bad.py").write_text("raise RuntimeError('half written')\n")
    about = tmp_path / "lab_bad-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lab_bad\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[plasticity_jax.stages]\nbad = lab_bad\n[plasticity_jax.tasks]\nbad = lab_bad\n")
    command = [sys.executable, "-m", "plasticity_jax", "study", "--config", str(TINY), "--workdir", str(tmp_path / "work"), "--dry-run", "-v"]
    ended = subprocess.run(command, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, cwd=TINY.parents[1])
    assert ended.returncode == 0 and "spectra/" in ended.stdout and "Traceback" not in ended.stderr
    assert ended.stderr.count("plug-in 'bad' (lab_bad) is left out: RuntimeError: half written") == 2, "once for stages, once for tasks"
