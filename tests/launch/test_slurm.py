"""Jobs on a real SLURM of this machine: one run as two tasks, and a whole study as the scripts that launch/slurm/study.py writes."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import slurm_cluster

pytestmark = pytest.mark.slurm

TOP = Path(__file__).parents[2]
RUN, STUDY = TOP / "launch" / "slurm" / "run.sh", TOP / "launch" / "slurm" / "study.py"
CONFIG = ["--config", str(TOP / "configs" / "tiny.py")]
SMALL = [
    "--config.train.steps=8",
    "--config.train.checkpoint_every=4",
    "--config.train.eval_every=4",
    "--config.train.compute_dtype=float32",
    "--config.data.max_documents=200",
    "--config.tasks.topic.train_rows=32",
    "--config.tasks.topic.test_rows=8",
    "--config.tasks.addition2.train_rows=32",
    "--config.tasks.addition2.test_rows=8",
    "--config.probe.train_rows=100",
    "--config.probe.test_rows=50",
]


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    try:
        with slurm_cluster(folder) as running:
            program = folder / "plasticity"
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -m plasticity_jax "$@"\n')
            program.chmod(0o755)
            running.environment |= {"PLASTICITY": str(program), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
            yield running
    finally:
        shutil.rmtree(folder)


def test_a_study_becomes_jobs_that_wait_for_their_parents(cluster, wheels_dir, tmp_path):
    work, out = tmp_path / "work", tmp_path / "jobs"
    small = [flag for flag in SMALL if "addition2" not in flag]
    one_task = "--config.tasks={'topic': {'train_rows': 128, 'test_rows': 16, 'validation_rows': 0, 'epochs': 1, 'max_new_tokens': 8}}"
    given = [*CONFIG, one_task, *small, f"--config.data.wheels={wheels_dir.resolve()}", "--workdir", work]
    sent = cluster.run(RUN, f"--output={tmp_path}/prepare.log", f"--chdir={TOP}", "--ntasks=1", "--", "prepare", *given)
    assert sent.returncode == 0, sent.stderr
    first = sent.stdout.split()[-1]
    assert cluster.wait([first], seconds=120)[first]["JobState"] == "COMPLETED", (tmp_path / "prepare.log").read_text()

    made = cluster.run(sys.executable, STUDY, *given, "--out", out, "--options=--ntasks=1")
    assert made.returncode == 0, made.stderr
    submitted = cluster.run(out / "submit.sh")
    assert submitted.returncode == 0, submitted.stderr
    job_of = {name: job for job, name in (line.split("\t") for line in (out / "jobs.tsv").read_text().splitlines())}
    assert "earlier jobs are still queued" in cluster.run(out / "submit.sh").stderr

    ended = cluster.wait(list(job_of.values()), seconds=500)
    logs = {path.name: path.read_text()[-1500:] for path in (out / "logs").iterdir()}
    assert {state["JobState"] for state in ended.values()} == {"COMPLETED"}, logs
    runs = json.loads((work / "tiny" / "study.json").read_text())["runs"]
    assert runs and all((work / "tiny" / run["id"] / "DONE").is_file() for run in runs)
    assert (work / "tiny" / "report" / "index.html").is_file()
    for run in runs:  # SLURM's own clock: no job began before those of its parents had ended
        for parent in run["parents"].values():
            mine, theirs = (job_of.get(i.replace("/", "-")) for i in (run["id"], parent))
            if mine and theirs:
                assert ended[mine]["StartTime"] >= ended[theirs]["EndTime"], (run["id"], parent)
    again = cluster.run(sys.executable, STUDY, *given, "--out", out)
    assert again.returncode == 0 and sorted(p.name for p in out.glob("*.sbatch")) == ["report.sbatch"], again.stdout


def test_what_follows_from_a_failed_job_is_cancelled_and_the_report_still_runs(cluster, tmp_path):
    """The generated submit.sh with scripts of one line in place of the study's."""
    out = tmp_path / "jobs"
    out.mkdir()
    work = tmp_path / "work"
    from plasticity_jax.config import load_config
    from plasticity_jax.study.graph import build_graph, save_study

    config = load_config(TOP / "configs" / "tiny.py", [("train.compute_dtype", "float32")])
    save_study(work, config, build_graph(config))
    made = cluster.run(sys.executable, STUDY, *CONFIG, "--config.train.compute_dtype=float32", "--workdir", work, "--out", tmp_path / "real")
    assert made.returncode == 0, made.stderr
    for path in (tmp_path / "real").iterdir():
        status = 1 if path.name.startswith("pretrain-wd0-") else 0
        text = path.read_text() if path.name == "submit.sh" else f"#!/bin/sh\n#SBATCH --output=/dev/null\nexit {status}\n"
        (out / path.name).write_text(text)
    submitted = cluster.run("bash", out / "submit.sh")
    assert submitted.returncode == 0, submitted.stderr
    job_of = {name: job for job, name in (line.split("\t") for line in (out / "jobs.tsv").read_text().splitlines())}
    ended = cluster.wait(list(job_of.values()), seconds=180)
    state = {name: ended[job]["JobState"] for name, job in job_of.items()}
    for name, value in state.items():
        member = "wd0-" in name
        expected = "FAILED" if name.startswith("pretrain-wd0-") else "CANCELLED" if member else "COMPLETED"
        assert value == expected, (name, state)
    assert state["report"] == "COMPLETED"


def test_two_tasks_of_a_job_pretrain_one_model_together(cluster, wheels_dir, tmp_path):
    """And give the loss curve that one process with one device gives."""
    losses = {}
    for tasks, environment in ((2, {}), (1, {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"})):
        work, log = tmp_path / f"work{tasks}", tmp_path / f"pretrain{tasks}.log"
        given = [*CONFIG, *SMALL, f"--config.data.wheels={wheels_dir.resolve()}", f"--config.mesh.data={4 if tasks == 2 else 1}", "--workdir", work]
        options = [f"--output={log}", f"--chdir={TOP}", f"--ntasks-per-node={tasks}"]
        sent = cluster.run(RUN, *options, "--", "pretrain", *given, "--member", "wd0", **environment)
        assert sent.returncode == 0, sent.stderr
        job = sent.stdout.split()[-1]
        ended = cluster.wait([job], seconds=300)[job]
        assert ended["JobState"] == "COMPLETED", log.read_text()
        assert ("2 processes, 2 devices each" in log.read_text()) == (tasks == 2)
        [done] = (work / "tiny" / "pretrain").glob("*/DONE")
        rows = map(json.loads, (done.parent / "metrics.jsonl").read_text().splitlines())
        losses[tasks] = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert set(losses[2]) == set(losses[1]) == set(range(1, 9))
    assert list(losses[2].values()) == pytest.approx(list(losses[1].values()), rel=1e-5)
