"""Completions graded again: the other way and as they are, without a model, beside the first result."""

import json

import pytest

from plasticity_jax.cli import main
from plasticity_jax.config import EvaluateConfig, StudyConfig, TaskConfig, TrainConfig
from plasticity_jax.data.tasks import Example, get_task
from plasticity_jax.evaluate.evaluate import graded, summarized
from plasticity_jax.report.page import _shown_tables, numbers_of
from plasticity_jax.report.results import collect
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, write_jsonl
from plasticity_jax.stages.evaluate import STAGE, regraded_rows
from plasticity_jax.study.graph import build_graph, save_study
from plasticity_jax.study.status import study_status

TASK = "medmcqa-local"
CONFIG = StudyConfig(
    name="lettered",
    train=TrainConfig(compute_dtype="float32"),
    tasks={TASK: TaskConfig(), "HellaSwag": TaskConfig()},
    evaluate=EvaluateConfig(n_samples=2),
)
# Of each problem a greedy completion and two samples. The gold is A: (greedy right clean, greedy right as in the original).
TEXTS = {
    "The answer is (A).": (1, 0),
    "The answer is A dog.": (0, 1),
    "The answer is A.": (1, 1),
    "I do not know.": (0, 0),
}


@pytest.fixture
def workdir(tmp_path):
    """A study whose one evaluation of lettered answers, and one of likelihoods, are finished; its models are gone."""
    runs = build_graph(CONFIG)
    save_study(tmp_path, CONFIG, runs)
    task = get_task(TASK)
    problems = [Example(str(i), f"Question {i}?", "", "A", "generated", "test", subset="all") for i in range(len(TEXTS))]
    rows = graded(problems, [[text, text, "The answer is (A)."] for text in TEXTS], [[True] * 3] * len(TEXTS), task, False, 1)
    for name in (TASK, "HellaSwag"):
        source = next(run for run in runs if run.stage == "evaluate" and run.task == name)
        with RunDirectory(tmp_path / "lettered" / source.id).work(source, CONFIG) as directory:
            if name == TASK:
                about = {"prompt": "", "gold": "A", "subset": "all", "source_split": "test"}
                write_jsonl(directory.path / "problems.jsonl", [{"id": row.id, "problem": row.prompt, **about} for row in problems])
                write_jsonl(directory.path / "completions.jsonl", rows)
            results = summarized(problems, rows) | {"n_samples": 2, "cut_prompts": 3, "source_splits": ["test"], "seconds": 7.5}
            directory.finish(results)
    (tmp_path / "config.json").write_text((directory.path / "config.json").read_text())
    return tmp_path


def regrade(workdir, *flags):
    return main(["evaluate", "--regrade", "--config", str(workdir / "config.json"), "--workdir", str(workdir), *flags])


def results_of(workdir, way):
    [folder] = (workdir / "lettered" / "evaluate").glob(f"*-graded-{way}-*")
    return folder, json.loads((folder / "results.json").read_text())


def contents(folder):
    """Every file but the provenance, which has the time, and so without its checksum in DONE."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("LOCK", "provenance.json", "DONE")}
    done = read_json(folder / "DONE")
    return found | {"DONE": done | {"files": {name: entry for name, entry in done["files"].items() if name != "provenance.json"}}}


def test_each_way_is_a_result_of_its_own_and_the_first_stays(workdir, capsys):
    before = {path: path.read_bytes() for path in (workdir / "lettered" / "evaluate").rglob("*") if path.is_file()}
    assert regrade(workdir, "--faithful") == 0 and regrade(workdir, "--clean", "--task", TASK) == 0
    printed = capsys.readouterr().out.splitlines()
    for column, way in enumerate(("clean", "faithful")):
        folder, results = results_of(workdir, way)
        assert str(folder) in printed
        assert results["per_problem"]["greedy"] == [right[column] for right in TEXTS.values()]
        assert (results["n_samples"], results["cut_prompts"], results["seconds"], results["problems"]) == (2, 3, 7.5, 4)
        rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows[::3]] == list(TEXTS) and all(row["ended"] for row in rows)
    assert before.items() <= {path: path.read_bytes() for path in (workdir / "lettered" / "evaluate").rglob("*") if path.is_file()}.items()


def test_neither_flag_grades_as_before_and_again_it_does_nothing(workdir, caplog):
    assert regrade(workdir) == 0
    folder, results = results_of(workdir, "clean")
    assert results["per_problem"]["greedy"] == [clean for clean, _ in TEXTS.values()]
    first, stamp = contents(folder), (folder / "provenance.json").read_bytes()
    assert regrade(workdir) == 0 and "1 were done already" in caplog.text
    assert contents(folder) == first and (folder / "provenance.json").read_bytes() == stamp
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert regrade(workdir) == 0 and contents(folder) == first  # from the start, to the same bytes


def test_the_report_and_the_status_name_what_was_graded_again(workdir):
    assert regrade(workdir, "--faithful") == 0
    rows = regraded_rows(collect(workdir / "lettered"))
    assert [*_shown_tables(numbers_of(collect(workdir / "lettered"), []))] == ["regraded"]
    assert {row["graded"] for row in rows} == {"faithful"} and {row["task"] for row in rows} == {TASK}
    [greedy] = [row for row in rows if row["metric"] == "pass@1"]
    assert (greedy["first"], greedy["again"], greedy["when"]) == (0.5, 0.5, "before")
    [shown] = [row for row in study_status(workdir) if "-graded-" in row["id"]]
    assert shown["state"] == "done"


def test_completions_of_an_earlier_version_are_graded_as_those_of_this_one(workdir):
    [first] = (workdir / "lettered" / "evaluate").glob(f"*{TASK}*")
    tree = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(tree | {"run": tree["run"] | {"version": STAGE.version - 1}}))
    assert regrade(workdir) == 0
    folder, _ = results_of(workdir, "clean")
    assert RunDirectory(folder).run().version == STAGE.version


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "HellaSwag"], "holds no finished completions of task HellaSwag; run plasticity evaluate without --regrade"),
        (["--task", "none"], "no finished completions of task none"),
        (["--model", "nowhere"], "nowhere"),
        (["--faithful", "--clean"], "exclude each other"),
    ],
)
def test_what_cannot_be_graded_again_is_one_line(workdir, capsys, flags, words):
    status = regrade(workdir, *flags)
    said = capsys.readouterr().err
    assert status == 2 and words in said and "Traceback" not in said
    assert not list((workdir / "lettered" / "evaluate").glob("*-graded-*"))
