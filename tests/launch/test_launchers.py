"""What launchers would send, checked by tools and stand-ins of what receives it; nothing here leaves the machine."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from launching import LAUNCH, TINY, TOP, run, saved_study, stand_in, write_jobs

from plasticity_jax.cli import REFUSED
from plasticity_jax.config import grid_members, load_config

TPU = {"TPU_NAME": "grid", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-16"}
TOOLS = Path(sys.executable).parent
PINS = TOP / "plasticity_jax" / "data"
TOKENIZERS = [PINS / f"requirements-{name}.txt" for name in ("sentencepiece-32k", "dolma2")]


# ------------------------------------------------------------------------------------------------------------------------------- linters


def test_every_shell_script_passes_shellcheck_and_stops_at_errors(tmp_path):
    saved_study(tmp_path / "work")
    write_jobs(tmp_path / "work", tmp_path / "jobs")
    scripts = [*LAUNCH.rglob("*.sh"), *(tmp_path / "jobs").glob("*.s*")]
    assert len(scripts) > 10
    checked = subprocess.run([TOOLS / "shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    for script in scripts:
        assert "\nset -euo pipefail\n" in script.read_text(), script
        if script.suffix == ".sh":
            assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("kind", ["cpu", "cuda", "tpu"])
def test_dockerfiles_pass_hadolint_and_hold_what_they_copy(kind):
    file = LAUNCH / "docker" / f"Dockerfile.{kind}"
    checked = subprocess.run([TOOLS / "hadolint", "--failure-threshold", "style", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    lines = file.read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((TOP / source).exists() for source in line.split()[1:-1]), line
    assert [line for line in lines if line.startswith("FROM")] == ["FROM python:3.12.11-slim-bookworm"]
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert set(re.findall(r"-r (\S+)", file.read_text())) == {path.relative_to(TOP).as_posix() for path in PINS.glob("requirements-*.txt")}


# ----------------------------------------------------------------------------------------------------------------------------- Cloud TPU


@pytest.mark.parametrize("action", ["create --spot", "wait", "install", "run study --config C", "attach", "logs", "stop", "state", "delete"])
def test_tpu_dry_run_prints_commands_and_sends_none(action, tmp_path):
    path = stand_in(tmp_path / "bin", "gcloud", f"echo called >>{tmp_path}/called")
    printed = run("tpu/tpu.sh", "--dry-run", *action.split(), path=path, **TPU)
    assert printed.returncode == 0 and "gcloud compute tpus" in printed.stdout and "--zone=us-west4-a" in printed.stdout
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_tpu_create_asks_for_the_runtime_of_the_type(kind, runtime):
    """Runtime versions as in Google's table of TPU software versions."""
    sent = shlex.split(run("tpu/tpu.sh", "--dry-run", "create", "--spot", **TPU | {"TPU_TYPE": kind}).stdout)
    assert {f"--accelerator-type={kind}", f"--runtime-version={runtime}", "--spot", "--node-id=grid"} <= set(sent)


HOSTS = """
[[ $4 == ssh ]] || exit 0
command=$(printf '%s\\n' "$@" | sed -z 's/.*\\n--command=//')
cd "$HOME" && exec bash -c "$command"
"""


def test_tpu_install_brings_the_folder_as_it_is_and_what_the_configs_need(tmp_path):
    """A stand-in for gcloud that copies to, and works in, a folder of its own; git decides what belongs to the repository."""
    clone, host, calls = tmp_path / "clone", tmp_path / "host", tmp_path / "calls"
    (clone / "launch" / "tpu").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu" / "tpu.sh", clone / "launch" / "tpu")
    for name, text in {".gitignore": "/data/\n", "changed.py": "old", "deleted.py": "old", "data/big": "big"}.items():
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(text)
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    (clone / "changed.py").write_text("new")
    (clone / "my config.py").write_text("mine")
    (clone / "deleted.py").unlink()
    (host / "plasticity_jax" / ".venv" / "bin").mkdir(parents=True)
    for name in ("python3", "make"):
        path = stand_in(tmp_path / "bin", name, f'echo {name} "$@" >>{calls}')
    stand_in(host / "plasticity_jax" / ".venv" / "bin", "pip", f'echo pip "$@" >>{calls}')
    stand_in(tmp_path / "bin", "gcloud", f'[[ $4 != scp ]] || cp "$5" {host}\n{HOSTS}')
    installed = subprocess.run(
        [clone / "launch" / "tpu" / "tpu.sh", "install"], env=os.environ | TPU | {"HOME": str(host), "PATH": path}, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    found = {path.relative_to(host / "plasticity_jax").as_posix(): path.read_text() for path in (host / "plasticity_jax").glob("*") if path.is_file()}
    assert found == {".gitignore": "/data/\n", "changed.py": "new", "my config.py": "mine"}
    assert (host / "plasticity_jax" / "launch" / "tpu" / "tpu.sh").is_file() and not (host / "plasticity_jax" / "data").exists()
    [pip, make] = calls.read_text().splitlines()[1:]
    assert pip == "pip install --quiet -e .[data,gcs,harness,tpu]"
    assert make.split() == ["make", "wheels", *(f"wheels-{path.stem.removeprefix('requirements-')}" for path in TOKENIZERS)]


def test_tpu_run_reaches_the_host_word_for_word_and_is_not_started_twice(tmp_path):
    """A stand-in for gcloud that carries the remote command out in a folder of its own, as ssh would on the host."""
    host = tmp_path / "host"
    program = host / "plasticity_jax" / ".venv" / "bin" / "plasticity"
    program.parent.mkdir(parents=True)
    program.write_text("#!/usr/bin/env bash\nprintf '<%s>\\n' \"$@\"\nexec sleep 30\n")
    program.chmod(0o755)
    environment = TPU | {"HOME": str(host), "path": stand_in(tmp_path / "bin", "gcloud", HOSTS)}
    words = ["study", "--config.name=it's $HOME", "--workdir", 'a "b" c']
    started = run("tpu/tpu.sh", "run", *words, **environment)
    assert started.returncode == 0, started.stderr
    try:
        for _ in range(50):
            if (host / "plasticity.log").read_text().count("\n") == len(words):
                break
            time.sleep(0.1)
        assert (host / "plasticity.log").read_text() == "".join(f"<{word}>\n" for word in words)
        second = run("tpu/tpu.sh", "run", *words, **environment)
        assert second.returncode == 2 and "still active" in second.stderr
        assert "<study>" in run("tpu/tpu.sh", "logs", **environment).stdout
    finally:
        stopped = run("tpu/tpu.sh", "stop", **environment)
    assert stopped.returncode == 0, stopped.stderr
    attached = run("tpu/tpu.sh", "attach", **environment)  # ends by itself, because the run has ended
    assert attached.returncode == 0 and "<study>" in attached.stdout


def test_tpu_wait_goes_on_until_the_slice_is_active_and_says_when_it_is_lost(tmp_path):
    states = tmp_path / "states"
    path = stand_in(tmp_path / "bin", "gcloud", f"head -n 1 {states}; sed -i 1d {states}")
    states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\nnever asked\n")
    waited = run("tpu/tpu.sh", "wait", path=path, TPU_POLL_SECONDS="0.05", **TPU)
    assert waited.returncode == 0 and re.findall(r"grid: (\w+)", waited.stdout) == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    states.write_text("SUSPENDED\n")
    lost = run("tpu/tpu.sh", "wait", path=path, **TPU)
    assert lost.returncode == 1 and lost.stderr == "tpu.sh: grid is SUSPENDED; delete it and create it again.\n"


# ----------------------------------------------------------------------------------------------------------------------------------- GKE


def gke(*arguments, command=("study", "--config", "configs/tiny.py", "--workdir", "gs://b/$(HOME) 'w'"), **environment):
    return run("tpu/gke.py", "--name", "grid", "--image", "registry/plasticity:tpu", *arguments, "--", *command, **environment)


# Chips per host and hosts: Google's table of TPU machine types in GKE. The accelerator type counts cores on v4 and v5p, chips on v5e and v6e.
@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "kind", "label"),
    [
        ("v5e:4x4", 4, 4, "v5litepod-16", "tpu-v5-lite-podslice"),
        ("v5e:2x2", 1, 4, "v5litepod-4", "tpu-v5-lite-podslice"),
        ("v5e:1x1", 1, 1, "v5litepod-1", "tpu-v5-lite-podslice"),
        ("v6e:8x8", 16, 4, "v6e-64", "tpu-v6e-slice"),
        ("v4:2x2x4", 4, 4, "v4-32", "tpu-v4-podslice"),
        ("v5p:4x4x4", 16, 4, "v5p-128", "tpu-v5p-slice"),
    ],
)
def test_gke_manifest_is_a_jobset_of_a_valid_kubernetes_job(topology, hosts, chips, kind, label):
    printed = gke("--dry-run", "--spot", "--topology", topology)
    assert printed.returncode == 0, printed.stderr
    jobset = yaml.safe_load(printed.stdout)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.29", strict=True)
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == hosts and replicated["replicas"] == 1
    # Refused input is not tried again; all else is, up to the limit.
    assert [rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"]] == [[REFUSED]]
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    pod = job["spec"]["template"]["spec"]
    selector = {"gke-tpu-accelerator": label, "gke-tpu-topology": topology.split(":")[1], "gke-spot": "true"}
    assert pod["nodeSelector"] == {f"cloud.google.com/{name}": value for name, value in selector.items()}
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    # Kubernetes reads $$ as one dollar sign, and expands no variable after it.
    command = ["study", "--config", "configs/tiny.py", "--workdir", "gs://b/$(HOME) 'w'"]
    assert [word.replace("$$", "$") for word in container["args"]] == command
    xpk = shlex.split(printed.stdout.partition("xpk: ")[2].partition("\n")[0])
    assert xpk[:3] == ["xpk", "workload", "create"] and f"--tpu-type={kind}" in xpk
    assert shlex.split(xpk[-1].removeprefix("--command=")) == ["plasticity", *command]


def test_gke_sends_to_kubectl_what_the_dry_run_printed(tmp_path):
    path = stand_in(tmp_path / "bin", "kubectl", f'echo "$@" >{tmp_path}/words; cat >{tmp_path}/sent')
    assert gke("--topology", "v5e:4x4", path=path).returncode == 0
    printed = gke("--topology", "v5e:4x4", "--dry-run").stdout
    assert (tmp_path / "words").read_text() == "apply --filename=-\n"
    assert yaml.safe_load((tmp_path / "sent").read_text()) == yaml.safe_load(printed)


# ---------------------------------------------------------------------------------------------------------------------------- local GPUs


def test_local_processes_share_the_gpus_out_and_find_one_another():
    printed = run("local/processes.sh", "--dry-run", "--gpus", "0,1,2,3", "--processes", "2", "--port", "999", "--", "study", "--config", "a b")
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    together = ["--coordinator=localhost:999", "--num-processes=2"]
    start = ["plasticity", "study", "--config", "a b", *together]
    assert commands == [
        ["env", "CUDA_VISIBLE_DEVICES=0,1", *start, "--process-id=0"],
        ["env", "CUDA_VISIBLE_DEVICES=2,3", *start, "--process-id=1"],
    ]
    one = run("local/processes.sh", "--dry-run", "--gpus", "0,1", "--", "study").stdout
    assert shlex.split(one) == ["env", "CUDA_VISIBLE_DEVICES=0,1", "plasticity", "study"]


def test_local_processes_end_with_the_worst_status_after_all_have_ended(tmp_path):
    body = 'for word in "$@"; do [[ $word != --process-id=* ]] || id=${word#*=}; done\n'
    body += f"sleep 0.$((5 - id * 4)); echo $id >>{tmp_path}/ended; exit $((3 - id * 3))"
    path = stand_in(tmp_path / "bin", "plasticity", body)
    ended = run("local/processes.sh", "--gpus", "0,1", "--processes", "2", "--", "study", path=path)
    assert ended.returncode == 3 and (tmp_path / "ended").read_text() == "1\n0\n"


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} has not come")


def test_local_processes_pass_an_end_on_and_wait_for_all(tmp_path):
    body = f'echo x >{tmp_path}/started; trap "sleep 0.3; echo x >>{tmp_path}/ended; exit 130" TERM; while true; do sleep 0.05; done'
    path = stand_in(tmp_path / "bin", "plasticity", body)
    command = [LAUNCH / "local" / "processes.sh", "--gpus", "0,1", "--processes", "2", "--", "study"]
    script = subprocess.Popen(command, env=os.environ | {"PATH": path}, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "started")
    time.sleep(0.3)  # both have set their trap
    script.terminate()
    assert script.wait(timeout=20) == 130 and (tmp_path / "ended").read_text() == "x\nx\n"


def stand_in_package(folder: Path, main: str) -> str:
    """Puts a `python -m plasticity_jax` of this text before the package's own, from a folder that holds no plasticity_jax; returns the PYTHONPATH."""
    package = folder / "plasticity_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(TOP / 'plasticity_jax')!r})\n")
    (package / "__main__.py").write_text(main)
    return str(folder)


def test_local_members_take_the_next_free_gpu_and_one_failure_leaves_the_others_alone(tmp_path):
    python_path = stand_in_package(
        tmp_path / "lib",
        "import os, sys, time\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + ' '.join(sys.argv[1:]) + '\\n')\n"
        "time.sleep(0.5)\n"
        "sys.exit('wd25' in sys.argv)\n",
    )
    given = ["--gpus", "3,5", "--config", TINY, "--workdir", tmp_path / "work", "--config.grid.timescales=(None,0.2,0.1,0.05)"]
    names = [m.name for m in grid_members(load_config(TINY, [("grid.timescales", "(None,0.2,0.1,0.05)")]))]
    ended = run("local/members.py", *given, cwd=tmp_path, PYTHONPATH=python_path)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert ended.returncode == 1 and "wd25 ended with status 1" in ended.stderr, ended.stderr
    assert calls[0][0] == "3" and calls[0][-1] == "prepare,init"
    assert sorted(call[-1] for call in calls[1:]) == sorted(names) and {call[0] for call in calls[1:]} == {"3", "5"}
    assert {path.stem for path in (tmp_path / "work" / "tiny" / "logs").iterdir()} == set(names)
    printed = run("local/members.py", "--dry-run", *given)
    assert [shlex.split(line)[-1] for line in printed.stdout.splitlines()] == ["prepare,init", *names]


def test_local_members_end_with_their_launcher(tmp_path):
    python_path = stand_in_package(
        tmp_path / "lib",
        f"import os, sys, time\nif 'pretrain' in sys.argv:\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(60)\n",
    )
    command = [sys.executable, LAUNCH / "local" / "members.py", "--gpus", "0", "--config", TINY, "--workdir", tmp_path / "work"]
    launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": python_path}, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "pid")
    time.sleep(0.1)
    launcher.terminate()
    _, said = launcher.communicate(timeout=20)
    assert launcher.returncode == 130 and said.endswith("interrupted; the same command resumes.\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ------------------------------------------------------------------------------------------------------------------------- help, refusals


def test_help_works_everywhere_and_needs_nothing(tmp_path):
    saved_study(tmp_path / "work")
    write_jobs(tmp_path / "work", tmp_path / "jobs")
    scripts = [*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.py"), tmp_path / "jobs" / "submit.sh"]
    assert len(scripts) == 8
    for script in scripts:
        for flag in ("--help", "-h"):
            printed = run(script, flag, path=f"{TOOLS}:/usr/bin:/bin")
            assert (printed.returncode, printed.stderr) == (0, ""), script
            assert script.name in printed.stdout and "set -euo" not in printed.stdout, printed.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("tpu/tpu.sh", ["fly"], "'fly' is not a command"),
        ("tpu/tpu.sh", ["--dry-run", "run"], "run needs a plasticity command"),
        ("tpu/tpu.sh", ["--dry-run", "create", "--sopt"], "create accepts only --spot"),
        ("tpu/gke.py", ["--name", "x", "--image", "i", "--topology", "v9:4x4", "--", "study"], "--topology=v9:4x4 is not a TPU slice"),
        ("tpu/gke.py", ["--name", "x", "--image", "i", "--topology", "v5e:3x2", "--", "study"], "6 chips"),
        ("tpu/gke.py", ["--name", "X", "--image", "i", "--topology", "v5e:4x4", "--", "study"], "--name=X"),
        ("tpu/gke.py", ["--name", "x"], "required"),
        ("slurm/run.sh", ["--nodes=2"], "no command after --"),
        ("slurm/job.sh", [], "no command"),
        ("slurm/study.py", ["--config", TINY], "required"),
        ("slurm/study.py", ["--config", TINY, "--workdir", "/nowhere", "--out", "x"], "does not exist yet"),
        ("slurm/study.py", ["--config", TINY, "--workdir", "/nowhere", "--out", "x", "--options=-N2"], "'-N2' is not a long option"),
        ("slurm/study.py", ["--config", TINY, "--workdir", "/nowhere", "--out", "x", "--options=--array=1-3"], "--array is set"),
        ("slurm/study.py", ["--config", TINY, "--workdir", "/nowhere", "--out", "x", "--options='"], "No closing quotation"),
        ("slurm/study.py", ["--config", TINY, "--workdir", "/nowhere", "--out", "x", "--config.train.stesp=3"], "steps"),
        ("local/processes.sh", ["--gpus", "0,1,2", "--processes", "2", "--", "study"], "3 GPUs do not divide"),
        ("local/processes.sh", ["--gpus", "all", "--", "study"], "--gpus=all"),
        ("local/processes.sh", ["--processes", "0", "--", "study"], "--processes=0"),
        ("local/processes.sh", ["--port", "70000", "--", "study"], "--port=70000"),
        ("local/processes.sh", ["--gpus", "0"], "no command after --"),
        ("local/members.py", ["--gpus", "a", "--config", TINY, "--workdir", "w"], "--gpus=a"),
        ("local/members.py", ["--gpus", "0", "--config", TINY, "--workdir", "w", "--grid"], "--grid is not an option"),
        ("local/members.py", ["--gpus", "0", "--config", TINY, "--workdir", "memory://b/w"], "local folder"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(script, arguments, says):
    refused = run(script, *arguments, **TPU)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout, refused.stderr
    assert refused.stderr.startswith(f"{Path(script).name}: ") and says in refused.stderr


@pytest.mark.parametrize(("missing", "says"), [("TPU_NAME", "TPU_NAME is not set"), ("TPU_ZONE", "TPU_ZONE"), ("TPU_TYPE", "TPU_TYPE")])
def test_tpu_names_the_variable_that_is_missing(missing, says):
    refused = run("tpu/tpu.sh", "--dry-run", "create", **{name: value for name, value in TPU.items() if name != missing})
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and says in refused.stderr
