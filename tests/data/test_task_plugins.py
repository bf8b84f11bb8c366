"""A lab's task from a package of its own: rows of its JSON-lines file, found through an entry point."""

import json
import sys

import pytest

from plasticity_jax.data import tasks
from plasticity_jax.errors import UserError

LAB_TRIVIA = '''
"""Trivia questions of our lab."""

import hashlib
import json
from pathlib import Path

from plasticity_jax.data.tasks import Example, Rows, Task

FILE = Path(__file__).with_name("trivia.jsonl")  # lines {"question": ..., "answer": ...}


def build(wheels, settings) -> Rows:
    rows = [example(number, json.loads(line)) for number, line in enumerate(FILE.read_text(encoding="utf-8").splitlines(), 1)]
    rows.sort(key=lambda row: digest(f"{settings.seed} {row.prompt}"))
    test = [row for row in rows if digest(row.prompt) < settings.held_out_fraction]
    train = [row for row in rows if digest(row.prompt) >= settings.held_out_fraction]
    return Rows(train=train[: settings.train_rows], test=test[: settings.test_rows])


def digest(text: str) -> float:
    """A number in [0, 1) that depends only on the text, so that a question never changes sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def example(number: int, row: dict) -> Example:
    return Example(
        id=f"trivia-{number}",
        prompt=row["question"],
        response=f" The answer is {row['answer']}.",
        answer=row["answer"],
        source="files:trivia.jsonl",
        source_split="all",
    )


TASK = Task(name="lab-trivia", grader="exact", labels=(), packages=(), chance_note="about 0: answers are open", build=build)
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts packages with one module each on the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    tasks.discovered.cache_clear()

    def added(**modules):
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
            monkeypatch.delitem(sys.modules, name, raising=False)
            about = tmp_path / f"{name}-1.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (about / "entry_points.txt").write_text(f"[plasticity_jax.tasks]\n{name} = {name}\n")
        return tmp_path

    yield added
    tasks.discovered.cache_clear()


def test_rows_of_a_file_of_another_package(install):
    folder = install(lab_trivia=LAB_TRIVIA, lab_broken="1 / 0\n")
    written = [{"question": f"What is word {n}?", "answer": f"word{n}"} for n in range(200)]
    (folder / "trivia.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    rows = tasks.build_task("lab-trivia", None, train_rows=100, test_rows=50, held_out_fraction=0.2, seed=0)
    asked = {row["question"]: row["answer"] for row in written}
    assert len(rows.train) == 100 and 20 <= len(rows.test) <= 50
    assert all(asked[row.prompt] == row.answer for row in rows.train + rows.test)
    assert not {row.prompt for row in rows.train} & {row.prompt for row in rows.test}


def test_an_unknown_task_is_refused_with_the_plug_ins_that_failed(install):
    install(lab_broken="1 / 0\n")
    with pytest.raises(UserError) as refused:
        tasks.get_task("lab-broken")
    assert "plug-in 'lab_broken' (lab_broken) is left out: ZeroDivisionError: division by zero" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys\nsys.exit('no license')\n", "SystemExit: no license"),
        (
            "from plasticity_jax.data.tasks import Task\nT = Task('x', 'exact', (), (), '', print)\nobject.__setattr__(T, 'name', ['x'])\n",
            "the name of a Task must be a text, not ['x']",
        ),
    ],
)
def test_a_plug_in_that_exits_or_has_no_usable_name_is_one_line(install, code, words):
    install(lab_trivia=LAB_TRIVIA, lab_bad=code)
    assert "lab-trivia" in tasks.tasks() and "boolq" in tasks.tasks()
    [line] = tasks.discovered().problems
    assert "plug-in 'lab_bad' (lab_bad) is left out" in line and words in line


def test_a_task_imported_from_us_is_no_second_task(install):
    install(lab_trivia="from plasticity_jax.data.tasks.boolq import BOOLQ\n" + LAB_TRIVIA)
    assert "lab-trivia" in tasks.tasks() and tasks.discovered().problems == ()
