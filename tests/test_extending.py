"""docs/extending.md, carried out word for word: an analysis and a task from packages of their own, and a new hyperparameter."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import TINY, environment

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SMALL = ("--config.train.steps=6", "--config.train.checkpoint_every=6", "--config.train.held_out_tokens=256", "--config.train.eval_tokens=64")

pytestmark = pytest.mark.slow


def blocks(title: str) -> list[str]:
    """The code blocks of the document with this title."""
    return re.findall(rf"^```\w+ title={re.escape(title)}\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)


def install(folder: Path, file: str, group: str) -> None:
    """What pip install would leave of a package with this one file: the module and its entry points."""
    [code], [points] = blocks(file), [text for text in blocks("pyproject.toml") if group in text]
    name, module = re.search(r'^(\w+) = "(\w+)"$', points, re.MULTILINE).groups()
    assert f"{module}.py" == file
    (folder / file).write_text(code, encoding="utf-8")
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")


def plasticity(folder: Path, *argv, status: int = 0) -> str:
    """Runs the program with the packages of a folder; what it printed."""
    command = [sys.executable, "-m", "plasticity_jax", *map(str, argv)]
    found = subprocess.run(command, env=environment(PYTHONPATH=str(folder)), cwd=folder, capture_output=True, text=True, timeout=300)
    assert found.returncode == status, found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    """A folder with the analysis' package and a study that has carried it out."""
    folder = tmp_path_factory.mktemp("analyzed")
    install(folder, "lab_norms.py", "plasticity_jax.stages")
    plasticity(folder, "study", "--config", TINY, "--workdir", folder / "work", *SMALL, "--stages", "prepare,init,pretrain,norms")
    return folder


def test_the_analysis_is_in_graph_status_page_and_tables(analyzed, tmp_path):
    install(tmp_path, "lab_norms.py", "plasticity_jax.stages")
    given = ("--config", TINY, "--workdir", tmp_path / "work", *SMALL)
    plan = plasticity(tmp_path, "study", *given, "--dry-run", "-v")
    ids = re.findall(r"^(norms/\S+)  missing  ← (pretrain/\S+)$", plan, re.MULTILINE)
    assert len(ids) == 2
    other = plasticity(tmp_path, "study", *given, "--dry-run", "-v", "--config.norms.order=1")
    assert not set(re.findall(r"norms/\S+", other)) & {run for run, _ in ids}, "the section's result fields are part of the hash"
    assert set(re.findall(r"pretrain/\S+", other)) == set(re.findall(r"pretrain/\S+", plan))

    shutil.copytree(analyzed / "work", tmp_path / "work")
    rows = json.loads(plasticity(tmp_path, "status", "--workdir", tmp_path / "work", "--json"))["runs"]
    assert {row["state"] for row in rows if row["stage"] == "norms"} == {"done"}
    summary = plasticity(tmp_path, "report", "--workdir", tmp_path / "work")
    assert "norm" in summary.splitlines()[0].split()
    report = tmp_path / "work" / "tiny" / "report"
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "Norms of the weights" in page and 'id="figure-norms"' in page and "Norm of the input embedding." in page
    assert (report / "figures" / "norms.png").stat().st_size > 1000
    with open(report / "tables" / "norms.csv", encoding="utf-8") as file:
        table = {row["member"]: float(row["embedding"]) for row in csv.DictReader(file)}
    assert len(table) == 2 and set(table) == set(re.findall(r"^(wd[^:]+):", plan, re.MULTILINE))

    import plasticity_jax as pj

    for run, base in ids:
        results = json.loads((tmp_path / "work" / "tiny" / run / "results.json").read_text())
        embedding = pj.load_model(tmp_path / "work" / "tiny" / base).params["embed"]["embedding"]
        assert results["embedding"] == pytest.approx(np.sqrt(np.sum(np.asarray(embedding, np.float64) ** 2)), rel=1e-5)
        assert results["embedding"] in table.values()
    plasticity(tmp_path, "analyze", *given, "--model", tmp_path / "work" / "tiny" / ids[0][1], "--only", "norms", "--config.norms.order=1")
    refused = subprocess.run(
        [sys.executable, "-m", "plasticity_jax", "config", "--config", str(TINY), "--config.norms.ordr=1"],
        env=environment(PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (refused.returncode, refused.stderr) == (2, "plasticity: config key norms.ordr is unknown; did you mean norms.order?\n")


def test_a_plug_in_whose_report_fails_leaves_the_rest_of_the_page(analyzed, tmp_path):
    install(tmp_path, "lab_norms.py", "plasticity_jax.stages")
    shutil.copytree(analyzed / "work", tmp_path / "work")
    code = (tmp_path / "lab_norms.py").read_text()
    (tmp_path / "lab_norms.py").write_text(code.replace("mlp=found.mlp[-1]", "mlp=found.nothing"))
    command = [sys.executable, "-m", "plasticity_jax", "report", "--workdir", str(tmp_path / "work")]
    ended = subprocess.run(command, env=environment(PYTHONPATH=str(tmp_path)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0
    assert ended.stderr.count("table 'norms' of stage norms is left out of the report: AttributeError") == 1 and "Traceback" not in ended.stderr
    page = (tmp_path / "work" / "tiny" / "report" / "index.html").read_text(encoding="utf-8")
    assert "Loss curves" in page and "Norm of the input embedding." in page


def test_the_task_is_prepared(tmp_path):
    install(tmp_path, "lab_larger.py", "plasticity_jax.tasks")
    [config] = blocks("larger.py")
    (tmp_path / "larger.py").write_text(config)
    given = ("--config", tmp_path / "larger.py", "--workdir", tmp_path / "work", "--config.data.max_documents=20", "--config.probe.sets=()")
    assert "evaluate/wd0-larger-after-" in plasticity(tmp_path, "study", *given, "--dry-run", "-v")
    plasticity(tmp_path, "prepare", *given)
    [folder] = (tmp_path / "work" / "larger" / "prepare").glob("task-larger-*")
    splits = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 200, "test": 20}
    for row in splits["train"] + splits["test"]:
        assert row["answer"] == str(max(map(int, re.findall(r"\d+", row["prompt"]))))
    assert not {row["prompt"] for row in splits["train"]} & {row["prompt"] for row in splits["test"]}


def test_the_hyperparameter_is_swept_and_changes_the_run(tmp_path, wheels_dir):
    shutil.copytree(ROOT / "plasticity_jax", tmp_path / "plasticity_jax", ignore=shutil.ignore_patterns("__pycache__"))
    changed = re.findall(r"^```diff title=(\S+)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    assert len({file for file, _ in changed}) == 2, "a new hyperparameter is a change of two files"
    for file, diff in changed:
        lines = [(line[:1], line[1:]) for line in diff.splitlines()]
        old, new = ("".join(f"{text}\n" for sign, text in lines if sign != leave) for leave in "+-")
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, file
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    sweep = "--config.grid.fields=(('train.nesterov', (False, True)),)"
    given = (
        "--config",
        TINY,
        "--workdir",
        tmp_path / "work",
        "--config.grid.weight_decay=(0.1,)",
        sweep,
        *SMALL,
        f"--config.data.wheels={wheels_dir.resolve()}",
    )
    members = re.findall(r"^(wd0.1-nesterov_\w+):", plasticity(tmp_path, "study", *given, "--dry-run", "-v"), re.MULTILINE)
    assert members == ["wd0.1-nesterov_False", "wd0.1-nesterov_True"]
    plasticity(tmp_path, "pretrain", *given)
    losses = [json.loads(path.read_text())["train_loss"] for path in sorted((tmp_path / "work").glob("tiny/pretrain/*/results.json"))]
    assert len(losses) == 2 and losses[0] != losses[1]
