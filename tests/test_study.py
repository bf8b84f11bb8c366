"""The whole graph through the real command line, on a tiny model: what a new user does first."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from running import PATIENCE, TINY, end, pausing, plasticity, start, status_rows, wait_until

import plasticity_jax as pj
from plasticity_jax.config import load_config
from plasticity_jax.model.param_count import count_params
from plasticity_jax.report.browse import Filter, browse
from plasticity_jax.runs.directory import DONE, PROGRESS, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, read_jsonl, write_json
from plasticity_jax.study.graph import build_graph
from plasticity_jax.study.outline import outline

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first_study.ipynb"


def options(workdir, wheels_dir):
    return ["--config", TINY, "--workdir", workdir, f"--config.data.wheels={wheels_dir}"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, wheels_dir):
    folder = tmp_path_factory.mktemp("study")
    process = start("study", *options(folder, wheels_dir))
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "report:" in said
    return folder


def runs(workdir, stage):
    return [row for row in status_rows(workdir) if row["stage"] == stage]


def test_every_run_is_done_and_holds_its_records(workdir):
    rows = status_rows(workdir)
    assert {row["stage"] for row in rows} == {"prepare", "init", "pretrain", "evaluate", "validation", "finetune", "probe", "spectra", "gap"}
    for row in rows:
        assert row["state"] == "done", row
        names = {path.name for path in Path(row["path"]).iterdir()}
        assert {"config.json", "provenance.json", "results.json", "DONE"} <= names, row["id"]


def test_a_study_goes_on_from_its_records(workdir, wheels_dir, tmp_path):
    """What is left to do is done anew with all that it descends from, bit for bit; what nothing needs stays a record."""
    assert plasticity("records", "--workdir", workdir, "--out", tmp_path / "records").returncode == 0
    assert (
        plasticity("report", "--records", tmp_path / "records", "--workdir", tmp_path / "work", "--single-file", tmp_path / "pages").returncode == 0
    )
    assert (tmp_path / "pages" / "tiny.html").stat().st_size > 100_000
    analysis = runs(workdir, "spectra")[0]
    left = tmp_path / "work" / Path(analysis["path"]).relative_to(workdir)
    shutil.rmtree(left)
    result = plasticity("study", *options(tmp_path / "work", wheels_dir))
    assert result.returncode == 0, result.stderr
    before, after = (read_json(folder / "results.json") | {"seconds": 0} for folder in (Path(analysis["path"]), left))
    assert before == after
    anew = {path.parent.name for path in (tmp_path / "work").rglob(DONE) if not RunDirectory(path.parent).is_record}
    stages = {path.parent.parent.name for path in (tmp_path / "work").rglob(DONE) if path.parent.name in anew}
    assert stages == {"prepare", "init", "pretrain", "spectra"} and len(anew) == 4
    assert f"{len(anew) - 1} finished runs are here as records" in result.stderr
    assert "0 runs carried out" in plasticity("study", *options(tmp_path / "work", wheels_dir)).stderr


def test_running_again_recomputes_nothing(workdir, wheels_dir):
    before = {
        path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and "report" not in path.parts and path.name != "study.json"
    }
    result = plasticity("study", *options(workdir, wheels_dir))
    assert result.returncode == 0, result.stderr
    assert "0 runs carried out" in result.stderr
    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after


def test_members_share_their_start_and_their_batches(workdir):
    provenance = [read_json(Path(row["path"]) / "provenance.json") for row in runs(workdir, "pretrain")]
    assert len({p["step_0_sha256"] for p in provenance}) == 1
    assert len({p["data_fingerprint"] for p in provenance}) == 1
    first = [read_jsonl(Path(row["path"]) / "metrics.jsonl")[0] for row in runs(workdir, "pretrain")]
    assert first[0]["loss"] == first[1]["loss"], "the first logged loss is taken before any decay could act"


def test_decay_shrinks_the_weights(workdir):
    norms = {}
    for row in runs(workdir, "pretrain"):
        results = read_json(Path(row["path"]) / "results.json")
        norms[results["weight_decay"]] = results["norms"]["blocks/mlp/up/kernel"]
    assert norms[max(norms)] < norms[0.0]


def test_scores_follow_from_the_completions_on_disk(workdir):
    for row in runs(workdir, "evaluate"):
        results = read_json(Path(row["path"]) / "results.json")
        golds = {problem["id"]: problem["gold"] for problem in read_jsonl(Path(row["path"]) / "problems.jsonl")}
        rows = read_jsonl(Path(row["path"]) / "completions.jsonl")
        assert len(golds) == results["problems"] == 16 and len(rows) == 16 * 3

        def right(completion):
            found = re.findall(r"answer is:?\s*(\S+)", completion["text"])
            return bool(found) and found[-1].strip(" .,").lower() == golds[completion["id"]].lower()

        greedy = [right(r) for r in rows if r["sample"] == 0]
        sampled = [[right(r) for r in rows if r["id"] == problem and r["sample"] > 0] for problem in golds]
        assert results["metrics"]["pass@1"] == pytest.approx(np.mean(greedy))
        assert results["metrics"]["pass@2"] == pytest.approx(np.mean([any(s) for s in sampled]))
        assert results["per_problem"]["samples"] == [sum(s) for s in sampled]


def test_validation_rows_are_answered_apart_and_never_shown(workdir):
    (test,) = {
        tuple(r["id"] for r in read_jsonl(Path(row["path"]) / "problems.jsonl")) for row in runs(workdir, "evaluate") if row["task"] == "addition2"
    }
    scored = runs(workdir, "validation")
    assert [row["task"] for row in scored] == ["addition2"] * 2, "one run per fine-tuned model, and none where there are no rows"
    (folder,) = workdir.glob("*/prepare/task-addition2-*")
    for row in scored:
        answered = [(r["id"], r["sample"]) for r in read_jsonl(Path(row["path"]) / "completions.jsonl")]
        assert answered == [(r["id"], 0) for r in read_jsonl(folder / "validation.jsonl")] and len(answered) == 8
        assert not {name for name, _ in answered} & {*test, *(r["id"] for r in read_jsonl(folder / "train.jsonl"))}
    assert {row["id"] for row in browse(workdir, Filter(task="addition2"))} == set(test)


def test_models_load_in_a_notebook(workdir):
    model = pj.load_model(runs(workdir, "finetune")[0]["path"])
    tokens = np.array([model.tokenizer.encode("The President of the United States")])
    logits, activations = model(tokens)
    assert logits.shape == (*tokens.shape, model.config.vocab_size) and logits.dtype == np.float32
    assert set(activations) == {"embed", "block_out"}
    assert repr(model) == f"<model of {count_params(model.config):,} parameters (2 layers, d_model 32, vocabulary 512) in {model.path}>"


def test_a_study_opens_in_a_notebook(workdir):
    study = pj.open_study(workdir)
    assert repr(study) == f"<study tiny: 6 models, {len(study.runs)} runs ({len(study.runs)} done)>"
    assert len(study.table()) == 2 and "scores" in study.figures
    assert study.figure("scores")._repr_svg_().startswith("<?xml")  # what a notebook shows
    decays = [row["weight_decay"] for row in study.table()]
    frame = study.frame()
    assert list(frame["weight_decay"]) == decays and frame["state"].eq("done").all()
    base, tuned = study.model(decays[1]), study.model(decays[1], task="topic")
    assert base.run.stage == "pretrain" and tuned.run.parents["base"] == base.run.id
    rows = study.completions("topic", weight_decay=decays[1], when="after")
    assert len(rows) == 16 and {(row["task"], row["when"], row["sample"]) for row in rows} == {("topic", "after", 0)}
    with pytest.raises(pj.UserError, match="no model with λ=77.*its models are the rows of table"):
        study.model(77.0)
    with pytest.raises(pj.UserError, match="fine-tuned on 'news'"):
        study.model(decays[0], task="news")


def test_the_notebook_of_the_docs_runs(workdir, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("WORK", str(workdir))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=PATIENCE).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert repr(pj.open_study(workdir)) in str(shown[0]) and any("image/svg+xml" in one.get("data", {}) for one in shown)


def test_generate_prints_a_continuation_and_repeats_it(workdir):
    argv = ["generate", "--model", runs(workdir, "pretrain")[0]["path"], "--prompt", "The ", "--max-new-tokens", "8", "--seed", "3"]
    first, second = plasticity(*argv), plasticity(*argv)
    assert first.returncode == 0, first.stderr
    assert first.stdout and first.stdout == second.stdout


def test_a_stage_alone_finds_what_the_study_has_done(workdir, wheels_dir):
    base = runs(workdir, "pretrain")[0]["path"]
    result = plasticity("finetune", *options(workdir, wheels_dir), "--base", base, "--task", "topic")
    assert result.returncode == 0, result.stderr
    assert "0 runs carried out" in result.stderr


def with_parents_only(workdir, place):
    """A copy that holds what every pretraining reads: the corpus and the step-0 parameters."""
    for stage in ("prepare", "init"):
        shutil.copytree(workdir / "tiny" / stage, place / "tiny" / stage)
    return place


@pytest.mark.parametrize(
    ("stage", "step", "expected"),
    [
        ("pretrain", 15, r"pretrain \S+: [\d,]+ of 20,480 tokens \(\d+%\), step \d+ of 40, loss [\d.]+"),
        ("finetune", 3, r"finetune \S+: [\d,]+ of [\d,]+ tokens \(\d+%\), step \d of 8, loss [\d.]+"),
        ("evaluate", 4, r"evaluate \S+: \d+ of 48 completions \(\d+%\)"),
    ],
)
def test_status_shows_how_far_a_run_is_while_it_is_paused_and_nothing_of_it_once_it_was_killed(workdir, wheels_dir, tmp_path, stage, step, expected):
    work = Path(shutil.copytree(workdir, tmp_path / "work"))
    done = runs(work, stage)[-1]
    shutil.rmtree(done["path"])
    argv = ["study", *options(work, wheels_dir), "--stages", stage]
    environment, paused = pausing(tmp_path, step)
    process = start(*argv, **environment)
    wait_until(paused, process)
    (row,) = [row for row in runs(work, stage) if row["state"] == "running"]
    assert row["id"] == done["id"] and re.match(expected, row["reason"]), row
    process.kill()
    process.communicate(timeout=PATIENCE)
    (row,) = [row for row in runs(work, stage) if row["state"] == "missing"]
    assert row["reason"] == "interrupted; it resumes when run again" and (Path(row["path"]) / PROGRESS).is_file()
    assert plasticity(*argv).returncode == 0 and not list(work.rglob(f"*{PROGRESS}*"))
    assert plasticity("status", "--workdir", work, "--verify").returncode == 0


def test_the_summary_counts_the_room_that_checkpoints_take(workdir, wheels_dir, tmp_path):
    """Of every stage, before it has run; what lies beside the parameters is some kilobytes per run, here a tenth."""
    config = load_config(TINY, [("data.wheels", str(wheels_dir)), ("train.compute_dtype", "float32")])
    for row in outline(config, tmp_path / "none", build_graph(config)).stages:
        held = [path.stat().st_size for run in runs(workdir, row.stage) for path in Path(run["path"]).glob("checkpoints/**/*") if path.is_file()]
        assert sum(held) == pytest.approx(row.checkpoints, rel=0.15), row.stage


def test_a_study_says_first_what_it_will_do_and_then_how_long_the_rest_takes(workdir, wheels_dir, tmp_path):
    """In this process, and by worker processes, whose lines say what the process that asks them knows."""
    for number, parallel in enumerate((1, 2)):
        work = Path(shutil.copytree(workdir, tmp_path / str(number)))
        for row in runs(work, "spectra"):
            shutil.rmtree(row["path"])
        status, lines = end(start("study", *options(work, wheels_dir), f"--config.launch.parallel_runs={parallel}", "--stages", "spectra,gap"))
        assert status == 0, lines
        (place,) = [place for place, line in enumerate(lines) if line.endswith("tiny: 6 runs to do, 2 done")]
        table = [line.split() for line in lines[place + 2 : place + 5]]
        assert table == [["gap", "0", "2"], ["spectra", "6", "0", "7.7e5"], ["total", "6", "2", "7.7e5"]]
        begun = [line for line in lines if re.match(r"[\d:]+ \[\d/6\] spectra/", line)]
        assert len(begun) == 6 and place < lines.index(begun[0])
        assert not begun[0].endswith("left") and begun[-1].endswith(" · less than a minute left")


def strip_time(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize(("number", "step"), [(signal.SIGKILL, 10), (signal.SIGTERM, 16), (signal.SIGINT, 16)])
def test_killed_pretraining_resumes_to_the_same_bits(workdir, wheels_dir, tmp_path, number, step):
    """From the last checkpoint, or after a signal from the step in progress, which it saved."""
    member = runs(workdir, "pretrain")[-1]
    work = with_parents_only(workdir, tmp_path / "work")
    argv = ["pretrain", *options(work, wheels_dir), "--member", member["member"], "--config.train.log_every=1"]
    environment, paused = pausing(tmp_path, 15)
    process = start(*argv, **environment)
    wait_until(paused, process)
    process.send_signal(number)
    status, lines = end(process)
    if number != signal.SIGKILL:
        name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
        assert (status, lines[-1]) == (130, f"plasticity: ended by {name}, saved at step 16 of 40; the same command resumes."), lines
        assert not any("Traceback" in line for line in lines)
    own = work / "tiny" / member["id"]
    assert max(int(path.name) for path in (own / "checkpoints").iterdir() if path.name.isdigit()) == step and not (own / "DONE").exists()
    result = plasticity(*argv)
    assert result.returncode == 0, result.stderr
    assert f"resumes at step {step} of 40" in result.stderr
    straight, resumed = pj.load_model(member["path"]), pj.load_model(own)
    flat = lambda tree, path="": (
        {path: np.asarray(tree)} if not isinstance(tree, dict) else {k: v for name in tree for k, v in flat(tree[name], f"{path}/{name}").items()}
    )
    a, b = flat(straight.params), flat(resumed.params)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = {row["step"]: row for row in strip_time(read_jsonl(own / "metrics.jsonl"))}
    for row in strip_time(read_jsonl(Path(member["path"]) / "metrics.jsonl")):
        assert rows[row["step"]] == row


def test_a_run_killed_between_its_optimizer_and_its_end_gives_the_same_results(workdir, wheels_dir, tmp_path):
    """Its training is complete and its checkpoint without the optimizer's state, which no finished run keeps."""
    work = shutil.copytree(workdir, tmp_path / "work")
    killed = [Path(row["path"]) for stage in ("pretrain", "finetune") for row in runs(work, stage)]
    before = [read_json(path / "results.json") for path in killed]
    for path in killed:
        assert {item.name for item in (path / "checkpoints").glob("*/*") if item.is_dir()} == {"params", "checksums"}
        (path / "DONE").unlink()
        (path / "results.json").unlink()
    result = plasticity("study", *options(work, wheels_dir), "--stages", "pretrain,finetune")
    assert result.returncode == 0, result.stderr
    assert "resumes at step 40 of 40" in result.stderr and f"{len(killed)} runs carried out" in result.stderr
    assert [read_json(path / "results.json") for path in killed] == before


def test_sigterm_ends_an_evaluation_at_once_and_keeps_what_is_generated(workdir, wheels_dir, tmp_path):
    work = shutil.copytree(workdir, tmp_path / "work")
    done = next(row for row in runs(work, "evaluate") if row["task"] == "topic")
    shutil.rmtree(done["path"])
    argv = ["study", *options(work, wheels_dir), "--stages", "evaluate", "--config.evaluate.batch_size=12"]
    environment, paused = pausing(tmp_path, 4)
    process = start(*argv, **environment)
    wait_until(paused, process)
    process.send_signal(signal.SIGTERM)
    status, lines = end(process)
    assert (status, lines[-1]) == (130, "plasticity: interrupted; the same command resumes."), lines
    result = plasticity(*argv)
    assert result.returncode == 0, result.stderr
    assert "resumes after 4 of 16 problems" in result.stderr
    assert len(read_jsonl(Path(done["path"]) / "completions.jsonl")) == 16 * 3


def test_a_truncated_checkpoint_is_one_line(workdir, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(runs(workdir, "pretrain")[0]["path"], damaged)
    largest = max((p for p in (damaged / "checkpoints").glob("*/params/**/*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, 100)
    for words in ("has 100 bytes instead of", "cannot be read"):
        result = plasticity("generate", "--model", damaged, "--prompt", "The ")
        assert result.returncode == 2 and result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert str(damaged) in line and words in line
        write_json(damaged / DONE, {"diverged": ""})  # as one from before there were checksums


def test_a_checkpoint_of_which_every_file_is_cut_is_one_line_and_no_trace_of_the_other_arrays(workdir, tmp_path, wheels_dir):
    damaged = tmp_path / "run"
    shutil.copytree(runs(workdir, "pretrain")[0]["path"], damaged)
    for path in [p for p in (damaged / "checkpoints").glob("*/params/**/d/*") if p.is_file()]:
        os.truncate(path, path.stat().st_size // 2)
    write_json(damaged / DONE, {"diverged": ""})  # as one from before there were checksums
    argv = ["analyze", *options(tmp_path / "work", wheels_dir), "--model", damaged, "--only", "spectra"]
    status, lines = end(start(*argv))
    assert status == 2 and "cannot be read" in lines[-1]
    assert not any("Traceback" in line or "Event loop" in line for line in lines), lines


def test_interrupt_leaves_a_resumable_study(tmp_path, wheels_dir):
    argv = ["study", *options(tmp_path / "work", wheels_dir), "--stages", "prepare,init,pretrain", "--config.train.steps=4"]
    environment, paused = pausing(tmp_path, 1)
    process = start(*argv, **environment)
    wait_until(paused, process)
    process.send_signal(signal.SIGINT)
    status, lines = end(process)
    assert status == 130
    assert "resumes" in lines[-1] and not any("Traceback" in line for line in lines)
    states = {row["stage"]: row["state"] for row in status_rows(tmp_path / "work")}
    assert states["prepare"] == "done" and states["pretrain"] == "missing"
    assert plasticity(*argv).returncode == 0


RATES = """
import importlib.util
from plasticity_jax.config import task

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = tiny.get_config()
    config.name = "rates"
    config.data.max_documents = 100
    config.train.steps = 10
    config.grid.weight_decay, config.grid.timescales = (0.1,), None
    config.grid.fields = (("train.peak_lr", (1e-3, 1e-2)),)
    config.grid.mode = "vmapped"
    config.tasks = {{"topic": task(train_rows=32, test_rows=16, validation_rows=0, epochs=1, max_new_tokens=4)}}
    config.probe.sets = ("topic",)
    config.evaluate.prompt_buckets, config.finetune.length_buckets = (192,), (256,)
    return config
"""


def test_a_study_over_the_learning_rate_alone(tmp_path, wheels_dir):
    """From one program for both members to the report, with one shared start; then a stage by itself finds its member's runs."""
    (tmp_path / "rates.py").write_text(RATES.format(tiny=str(TINY)))
    where = ["--config", tmp_path / "rates.py", "--workdir", tmp_path / "work", f"--config.data.wheels={wheels_dir}"]
    result = plasticity("study", *where)
    assert result.returncode == 0, result.stderr
    rows = status_rows(tmp_path / "work")
    assert {row["state"] for row in rows} == {"done"} and sum(row["stage"] == "init" for row in rows) == 1
    bases = {row["member"]: Path(row["path"]) for row in rows if row["stage"] == "pretrain"}
    assert list(bases) == ["wd0.1-peak_lr0.001", "wd0.1-peak_lr0.01"]
    found = [read_json(path / "results.json") for path in bases.values()]
    assert [r["peak_lr"] for r in found] == [1e-3, 1e-2] and found[0]["held_out"]["loss"] != found[1]["held_out"]["loss"]
    assert [(row["train.peak_lr"], row["held_out_loss"]) for row in pj.open_study(tmp_path / "work").table()] == [
        (r["peak_lr"], r["held_out"]["loss"]) for r in found
    ]
    page = (tmp_path / "work" / "rates" / "report" / "index.html").read_text(encoding="utf-8")
    assert "What does peak learning rate do" in page and "no verdict" not in page.split("<body>")[1]
    again = plasticity("finetune", *where, "--base", bases["wd0.1-peak_lr0.01"], "--task", "topic")
    assert again.returncode == 0 and "0 runs carried out" in again.stderr, again.stderr
    dry = plasticity("study", *where, "--dry-run", "-v").stdout
    assert "wd0.1-peak_lr0.01: λ = 0.1, peak lr·λ = 0.001, timescale 100 of the run, train.peak_lr = 0.01" in dry


def test_a_workdir_may_be_moved_and_have_any_name(workdir, wheels_dir, tmp_path):
    """Spaces, quotes, other scripts: what is done counts, and what is missing is made from parents at their new places."""
    place = tmp_path / "a b" / "wörk λ=0,1 (\"1\") 'q' %s {x}"
    place.parent.mkdir()
    moved = Path(shutil.copytree(workdir, place))
    for stage in ("spectra", "evaluate"):
        shutil.rmtree(runs(moved, stage)[0]["path"])
    result = plasticity("study", *options(moved, wheels_dir))
    assert result.returncode == 0, result.stderr
    assert "2 runs carried out" in result.stderr
    for stage in ("spectra", "evaluate"):
        for before, after in zip(runs(workdir, stage), runs(moved, stage), strict=True):
            a, b = (read_json(Path(row["path"]) / "results.json") for row in (before, after))
            assert a | {"seconds": 0} == b | {"seconds": 0}
    result = plasticity("generate", "--model", runs(moved, "finetune")[0]["path"], "--prompt", "The ", "--max-new-tokens", "2")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def disk(tmp_path):
    """(folder on a disk of its own, function that changes its size or makes it read-only)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk of its own needs root")
    yield folder, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_nothing_is_lost(workdir, wheels_dir, disk):
    """It fills up in the middle of a pretraining; with more room the same command resumes to the same bits."""
    folder, remount = disk
    member = runs(workdir, "pretrain")[-1]
    work = folder / "work"
    with_parents_only(workdir, work)
    held = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    remount(f"size={(held >> 10) + 700}k")  # room for one checkpoint, not for three
    argv = ["pretrain", *options(work, wheels_dir), "--member", member["member"]]
    assert plasticity(*argv).returncode == 2, "refused before anything is written, for its estimate"
    status, lines = end(start(*argv, PYTHONPATH=str(blind_to_free_space(folder.parent)), PYTHONSAFEPATH="1"))
    assert status == 2 and "no space left on device" in lines[-1].lower() and str(work) in lines[-1] and "it resumes" in lines[-1], lines
    assert not any("Traceback" in line for line in lines), "\n".join(lines)
    remount("size=64m")
    result = plasticity(*argv)
    assert result.returncode == 0, result.stderr
    own = work / "tiny" / member["id"]
    for a, b in zip(*(jax.tree.leaves(pj.load_model(path).params) for path in (member["path"], own)), strict=True):
        np.testing.assert_array_equal(a, b)
    remount("ro")
    result = plasticity("study", *options(work, wheels_dir))
    assert result.returncode == 2 and "cannot be written to (Read-only file system)" in result.stderr.splitlines()[-1]
    assert {row["state"] for row in status_rows(work) if row["stage"] in ("prepare", "init")} == {"done"}, "it can still be read"


def blind_to_free_space(folder: Path) -> Path:
    """A package that stands before ours on the path, and does not know how much room a disk has."""
    package = folder / "blind" / "plasticity_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(Path(pj.__file__).parent)!r})\n")
    (package / "__main__.py").write_text(
        "from plasticity_jax.study import execute\nexecute.free_bytes = lambda folder: None\nfrom plasticity_jax.cli import entry\nentry()\n"
    )
    return package.parent
