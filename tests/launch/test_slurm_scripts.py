"""The scripts that launch/slurm writes and submits, up to the door of SLURM; test_slurm.py goes through it."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import LAUNCH, TINY, run, saved_study, stand_in, write_jobs

from plasticity_jax.config import grid_members, load_config
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.study.graph import build_graph, save_study


@pytest.fixture
def study(tmp_path):
    """A workdir with a study.json of configs/tiny.py, and its config."""
    return tmp_path / "work", saved_study(tmp_path / "work")


def test_slurm_run_puts_options_before_the_script_and_the_command_after(tmp_path):
    sent = shlex.split(run("slurm/run.sh", "--dry-run", "--nodes=2", "--comment=a b", "--", "study", "--dry-run", "--config.name=x y").stdout)
    script = sent.index(str(LAUNCH / "slurm" / "job.sh"))
    assert sent[0] == "sbatch" and {"--nodes=2", "--comment=a b", "--ntasks-per-node=1", "--requeue", "--signal=TERM@90"} <= set(sent[:script])
    assert sent[script + 1 :] == ["study", "--dry-run", "--config.name=x y"]


@pytest.mark.parametrize(("tasks", "nodes", "devices"), [("2", "2", "0,1,2,3"), ("8", "2", "none")])
def test_slurm_job_names_all_gpus_of_a_node_to_its_only_process(tmp_path, tasks, nodes, devices):
    """jax itself gives a process under SLURM one GPU, which is right for a task per GPU only."""
    path = stand_in(tmp_path / "bin", "srun", 'echo "${JAX_LOCAL_DEVICE_IDS:-none} $*"')
    done = run("slurm/job.sh", "study", "a b", path=path, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS=tasks, SLURM_JOB_NUM_NODES=nodes)
    assert done.stdout == f"{devices} --kill-on-bad-exit=1 plasticity study a b\n"


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (130, "RUNNING", "0", True),
        (130, "RUNNING", "2", False),
        (130, "COMPLETING", "0", False),
        (1, "RUNNING", "0", False),
        (0, "RUNNING", "0", False),
    ],
)
def test_slurm_job_is_queued_again_after_sigterm_unless_it_was_canceled(tmp_path, status, state, restarts, requeued):
    stand_in(tmp_path / "bin", "srun", f"exit {status}")
    stand_in(tmp_path / "bin", "squeue", f"echo {state}")
    path = stand_in(tmp_path / "bin", "scontrol", f'echo "$*" >>{tmp_path}/scontrol')
    done = run("slurm/job.sh", "study", path=path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts, PLASTICITY_REQUEUES="2")
    assert done.returncode == status
    assert (tmp_path / "scontrol").exists() == requeued and ("queued again as job 7" in done.stderr) == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 7\n"


def sent_by(submit: Path) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """Job → (kind of dependency, jobs it waits for), and the jobs in the order of sending, from the dry run of submit.sh."""
    printed = subprocess.run([submit, "--dry-run"], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    after, order = {}, []
    for line in printed.stdout.splitlines():
        words = line.split()
        name = words[-1].removesuffix(".sbatch")
        dependency = next((word for word in words if word.startswith("--dependency=")), "--dependency=none")
        kind, *parents = dependency.removeprefix("--dependency=").split(":")
        after[name] = kind, [parent.strip("<>") for parent in parents]
        order.append(name)
    return after, order


def test_slurm_study_has_a_job_for_every_run_after_its_parents(study, tmp_path):
    workdir, config = study
    runs = build_graph(config)
    made = write_jobs(workdir, tmp_path / "jobs", "--options=--partition=p --comment='a b'", "--pretrain-options=--nodes=2")
    assert made.returncode == 0, made.stderr
    after, order = sent_by(tmp_path / "jobs" / "submit.sh")

    def job(run):
        if run.stage in ("prepare", "init"):
            return "prepare"
        if run.stage == "validation":
            return "validation"
        return "analyze-" + run.parents["model"].split("/")[1] if run.stage in ("probe", "spectra", "gap") else run.id.replace("/", "-")

    assert set(order) == {job(run) for run in runs} | {"report"}
    by_id = {run.id: run for run in runs}
    for run_ in runs:
        kind, parents = after[job(run_)]
        needed = {job(by_id[parent]) for parent in run_.parents.values()} - {job(run_)}
        # One job for the runs of several others does what it can when some of them have failed.
        assert needed <= set(parents) and (not needed or kind == ("afterany" if job(run_) == "validation" else "afterok"))
        assert all(order.index(parent) < order.index(job(run_)) for parent in parents)
    kind, last = after["report"]
    waited_for = {parent for name, (_, parents) in after.items() if name != "report" for parent in parents}
    assert kind == "afterany" and set(last) == set(order) - waited_for - {"report"}
    for path in (tmp_path / "jobs").glob("*.sbatch"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
        assert "#SBATCH --partition=p" in header and "#SBATCH '--comment=a b'" in header
        assert "#SBATCH --requeue" in header and "#SBATCH --signal=TERM@90" in header
        assert ("#SBATCH --nodes=2" in header) == path.name.startswith("pretrain-")


def test_slurm_jobs_hold_commands_that_make_exactly_their_runs(study, tmp_path):
    """The command line's own parser and the functions it calls, on the words of each script."""
    from plasticity_jax.cli import parser, split_overrides
    from plasticity_jax.stages import stages
    from plasticity_jax.stages.evaluate import evaluate_run
    from plasticity_jax.stages.finetune import finetune_run
    from plasticity_jax.stages.pretrain import pretrain_run

    workdir, config = study
    runs = {run.id: run for run in build_graph(config)}
    write_jobs(workdir, tmp_path / "jobs")
    made = set()
    for path in (tmp_path / "jobs").glob("*.sbatch"):
        line = path.read_text().splitlines()[-1]
        words = shlex.split(line)
        assert words[:3] == ["exec", "bash", str(LAUNCH / "slurm" / "job.sh")]
        rest, overrides = split_overrides(words[3:])
        arguments = parser().parse_args(rest)
        assert arguments.workdir == workdir
        if arguments.command == "report":
            continue
        assert load_config(arguments.config, overrides) == config
        if arguments.command == "study":
            made |= {run.id for run in runs.values() if run.stage in arguments.stages.split(",")}
        elif arguments.command == "pretrain":
            [member] = [member for member in grid_members(config) if member.name == arguments.member]
            made.add(pretrain_run(config, member).id)
        elif arguments.command == "finetune":
            base = runs[str(arguments.base.relative_to(workdir / config.name))]
            made.add(finetune_run(config, base, arguments.task, arguments.seed).id)
        else:
            model = runs[str(arguments.model.relative_to(workdir / config.name))]
            if arguments.command == "evaluate":
                made.add(evaluate_run(config, model, arguments.task).id)
            else:
                made |= {stages()[name].on_model(config, model).id for name in arguments.only.split(",")}
    assert made == set(runs)


def test_slurm_study_leaves_out_what_is_done_and_writes_only_whole_folders(study, tmp_path):
    workdir, config = study
    for run_ in build_graph(config):
        if run_.stage in ("prepare", "init"):
            with RunDirectory(workdir / config.name / run_.id).work(run_, config) as directory:
                directory.finish({})
    shared = sum(run_.stage in ("prepare", "init") for run_ in build_graph(config))
    assert f"({shared} of {len(build_graph(config))} runs are done already)" in write_jobs(workdir, tmp_path / "jobs").stdout
    after, order = sent_by(tmp_path / "jobs" / "submit.sh")
    assert "prepare" not in order and all(after[name] == ("none", []) for name in order if name.startswith("pretrain-"))
    printed = write_jobs(workdir, tmp_path / "none", "--dry-run")
    assert printed.returncode == 0 and not (tmp_path / "none").exists()
    for path in (tmp_path / "jobs").iterdir():
        assert path.read_text().replace(str(tmp_path / "jobs"), str(tmp_path / "none")) in printed.stdout


def test_slurm_study_sends_a_vmapped_grid_as_one_job(tmp_path):
    config = load_config(TINY, [("train.compute_dtype", "float32"), ("grid.mode", "vmapped")])
    save_study(tmp_path / "work", config, build_graph(config))
    made = write_jobs(tmp_path / "work", tmp_path / "jobs", "--config.grid.mode=vmapped")
    assert made.returncode == 0, made.stderr
    after, order = sent_by(tmp_path / "jobs" / "submit.sh")
    assert [name for name in order if name.startswith("pretrain")] == ["pretrain"] and after["pretrain"] == ("afterok", ["prepare"])


def test_slurm_study_refuses_a_study_of_another_config_and_a_folder_of_others(study, tmp_path):
    other = write_jobs(study[0], tmp_path / "jobs", "--config.train.steps=7")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "another config" in other.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    taken = write_jobs(study[0], tmp_path / "mine")
    assert taken.returncode == 2 and taken.stderr.count("\n") == 1 and "holds other files" in taken.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_names_from_study_json_cannot_leave_the_folder(study, tmp_path):
    workdir, _ = study
    path = workdir / "tiny" / "study.json"
    tree = json.loads(path.read_text())
    tree["runs"][0]["name"] = "../../escaped"
    path.write_text(json.dumps(tree))
    refused = write_jobs(workdir, tmp_path / "jobs")
    assert refused.returncode == 2 and not (tmp_path / "jobs").exists()
