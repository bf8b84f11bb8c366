#!/usr/bin/env python3
"""Turns the study.json of a study into plain sbatch scripts, and a submit.sh that sends them with their dependencies.

launch/slurm/run.sh -- prepare --config C --workdir W            # writes W/<study>/study.json, on a node of the kind that will train
launch/slurm/study.py --config C --workdir W --out jobs --options="--partition=gpu --gpus-per-node=1" --pretrain-options="--nodes=2 --gpus-per-node=8"
jobs/submit.sh [--dry-run]

One job per run; the analyses of one model are one job, and so is the whole grid in vmapped mode. A job waits for its parents
with afterok and is cancelled if one fails; the report waits with afterany, and shows what there is, as `plasticity study` does. Runs that are done
get no job: after a failure, the same two commands send the rest. Run it with the Python of the environment that holds plasticity_jax.
"""

import argparse
import re
import shlex
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from plasticity_jax.config import StudyConfig, grid_members, load_config
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, is_local, location, write_bytes
from plasticity_jax.stages import stages
from plasticity_jax.study.execute import resolve
from plasticity_jax.study.graph import build_graph, read_study, study_dir

# Before the user's, which replace them: the last of two equal options counts.
OPTIONS = ("--ntasks-per-node=1", "--requeue", "--open-mode=append")

SUBMIT = """\
#!/usr/bin/env bash
# Sends the jobs of study {study}, each after the jobs that it needs. Written by launch/slurm/study.py: write it anew rather than change it.
#
#   submit.sh [--dry-run]
set -euo pipefail
cd "$(dirname "$0")"

dry_run=0
if [[ $* == --dry-run ]]; then
  dry_run=1
elif (($#)); then
  echo "submit.sh: $* is no option; usage: submit.sh [--dry-run]" >&2
  exit 2
elif ! command -v sbatch >/dev/null; then
  echo "submit.sh: sbatch is not on the PATH; run this on a login node of the SLURM cluster." >&2
  exit 2
elif [[ -s jobs.tsv ]] && [[ -n $(squeue --noheader --format=%i --jobs="$(cut -f1 jobs.tsv | paste -sd,)" 2>/dev/null) ]]; then
  echo "submit.sh: jobs sent before are still queued (see jobs.tsv); wait for them, or end them: scancel \\$(cut -f1 $PWD/jobs.tsv)" >&2
  exit 2
fi

declare -A id
# submit NAME KIND PARENT...   KIND is afterok or afterany.
submit() {{
  local name=$1 kind=$2 parent after=""
  shift 2
  for parent in "$@"; do after+=":${{id[$parent]}}"; done
  local send=(sbatch --parsable --kill-on-invalid-dep=yes)
  if [[ -n $after ]]; then send+=("--dependency=$kind$after"); fi
  send+=("$name.sbatch")
  if ((dry_run)); then
    id[$name]="<$name>"
    echo "${{send[*]}}"
  else
    id[$name]=$("${{send[@]}}")
    id[$name]=${{id[$name]%%;*}} # a federation adds ;CLUSTER
    printf '%s\\t%s\\n' "${{id[$name]}}" "$name" | tee -a jobs.tsv
  fi
}}

if ((!dry_run)); then
  mkdir -p logs
  : >jobs.tsv
fi
{lines}
"""


@dataclass(frozen=True)
class Job:
    """One sbatch script: its name, the stage it is of, the arguments of `plasticity`, and the names of the jobs that it waits for."""

    name: str
    stage: str
    arguments: list[str]
    parents: list[str]


def jobs_of(config: StudyConfig, runs: list[Run], *, done: set[str], workdir: str, given: list[str]) -> list[Job]:
    """The jobs of a study, parents before children.

    Args:
      config: the study's config.
      runs: of the study, parents before children.
      done: ids of the runs that need no job.
      workdir: as the commands are to be given it.
      given: the arguments that name config, overrides and workdir.
    """
    todo = [run for run in runs if run.id not in done]
    swept = {member.name for member in grid_members(config) if member.name != member.base}
    arguments: dict[str, list[str]] = {}
    stage_of: dict[str, str] = {}
    members: dict[str, list[Run]] = {}
    job_of: dict[str, str] = {}
    for run in todo:
        stage = stages()[run.stage]
        if stage.job:
            name, command = stage.job, ["study", *given, "--stages", ",".join(one.name for one in stages().values() if one.job == stage.job)]
        elif run.stage == "pretrain" and config.grid.mode == "vmapped":
            name, command = "pretrain", ["pretrain", *given]
        elif run.stage == "pretrain":
            name, command = _name(run.id), ["pretrain", *given, "--member", run.member]
        elif run.stage == "finetune":
            name, command = _name(run.id), ["finetune", *given, "--base", _path(workdir, run, "base"), "--task", run.task, "--seed", str(run.seed)]
            if run.member in swept:
                command += ["--member", run.member]
        elif run.stage == "evaluate":
            name, command = _name(run.id), ["evaluate", *given, "--model", _path(workdir, run, "model"), "--task", run.task]
        else:
            name = _name(f"analyze/{run.parents['model'].split('/')[1]}")
            only = [r.stage for r in todo if stages()[r.stage].analysis and r.parents["model"] == run.parents["model"]]
            command = ["analyze", *given, "--model", _path(workdir, run, "model"), "--only", ",".join(only)]
        arguments[name], stage_of[name], job_of[run.id] = command, run.stage, name
        members.setdefault(name, []).append(run)
    jobs = []
    for name, command in arguments.items():
        parents = dict.fromkeys(job_of[parent] for run in members[name] for parent in run.parents.values() if parent in job_of)
        parents.pop(name, None)
        jobs.append(Job(name, stage_of[name], command, list(parents)))
    return jobs


def _path(workdir: str, run: Run, role: str) -> str:
    return f"{workdir}/{run.study}/{run.parents[role]}"


def _name(run_id: str) -> str:
    """A file name for a run: the hash at its end keeps names apart that differ in odd characters only."""
    return re.sub(r"[^A-Za-z0-9._+=-]", "_", run_id.replace("/", "-"))


def script(job: Job, study: str, options: list[str], *, out: Path) -> str:
    """The text of a job's sbatch script."""
    log = str(out / "logs" / job.name).replace("%", "%%")
    header = [f"--job-name={_name(study)}-{job.name}", f"--output={log}-%j.log", f"--chdir={Path.cwd()}", *OPTIONS, *options]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {shlex.quote(option)}" for option in header), "set -euo pipefail"]
    return "\n".join([*lines, shlex.join(["exec", "bash", str(Path(__file__).resolve().with_name("job.sh")), *job.arguments])]) + "\n"


def submit_script(study: str, jobs: list[Job]) -> str:
    """The text of submit.sh: one line per job, and the report after all that no other job waits for."""
    lines = [shlex.join(["submit", job.name, "afterok", *job.parents]) for job in jobs if job.name != "report"]
    waited_for = {parent for job in jobs for parent in job.parents}
    leaves = [job.name for job in jobs if job.name not in waited_for and job.name != "report"]
    return SUBMIT.format(study=_name(study), lines="\n".join([*lines, shlex.join(["submit", "report", "afterany", *leaves])]))


def _options(flag: str, text: str) -> list[str]:
    """Splits the options of sbatch as a shell does. Raises UserError for what is none, and for those that the study sets."""
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}; close the quotation.") from error
    for option in options:
        if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n\r]*)?", option):
            raise UserError(f"{flag}: {option!r} is no long option of sbatch; write each as --name=value, such as --partition=gpu.")
        if option.partition("=")[0] in ("--dependency", "--output", "--job-name", "--array"):
            raise UserError(f"{flag}: {option.partition('=')[0]} is set for each job by the study; leave it out.")
    return options


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise UserError(f"{message} (see study.py --help)")

    parser = Parser(prog="study.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, metavar="C", help="config of the study; --config.a.b=value overrides one of its keys")
    parser.add_argument("--workdir", required=True, metavar="W", help="folder that holds the study; all nodes must see it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the scripts and the logs; all nodes must see it")
    parser.add_argument("--options", default="", metavar="O", help='options of sbatch for every job, such as "--partition=gpu --gpus-per-node=1"')
    parser.add_argument("--pretrain-options", default="", metavar="O", help="further options for the pretraining jobs; they replace equal ones")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts and write nothing")
    arguments, rest = parser.parse_known_args(argv)
    overrides = []
    for word in rest:
        key, equals, value = word.partition("=")
        if not key.startswith("--config.") or not equals:
            raise UserError(f"{word} is no option; write overrides as --config.a.b=value (see study.py --help).")
        overrides.append((key.removeprefix("--config."), value))
    return arguments, overrides


def _saved_runs(config: StudyConfig, workdir: AnyPath) -> list[Run]:
    """The runs of study.json. Raises UserError if it is not there, or of another config."""
    path = study_dir(workdir, config) / "study.json"
    if not path.is_file():
        raise UserError(f"{path} is not there yet; write it on a node of the kind that will train: launch/slurm/run.sh -- prepare (same config).")
    _, runs = read_study(path)
    if {run.id for run in runs} != {run.id for run in build_graph(resolve(config, workdir))}:
        raise UserError(f"{path} was written for another config or version; write it anew with the same config: launch/slurm/run.sh -- prepare.")
    return runs


def _write(out: Path, files: dict[str, str]) -> None:
    """Writes the scripts, submit.sh last, and removes those of an earlier call that have no job any more."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "submit.sh").is_file())):
        raise UserError(f"--out={out} holds other things than jobs of a study; give a folder that is new or was written by this command.")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_bytes(out / name, text.encode())
    submit = out / "submit.sh"
    submit.chmod(submit.stat().st_mode | stat.S_IXUSR)
    for path in out.glob("*.sbatch"):
        if path.name not in files:
            path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Writes the scripts. Returns 0, or 2 if the input was refused."""
    try:
        arguments, overrides = _arguments(argv)
        options, pretrain_options = _options("--options", arguments.options), _options("--pretrain-options", arguments.pretrain_options)
        config = load_config(arguments.config, overrides)
        workdir = location(arguments.workdir)
        if is_local(workdir):
            workdir = workdir.absolute()
        runs = _saved_runs(config, workdir)
        done = {run.id for run in runs if RunDirectory(study_dir(workdir, config) / run.id).done}
        given = ["--config", str(arguments.config.absolute()), *(f"--config.{key}={value}" for key, value in overrides), "--workdir", str(workdir)]
        jobs = jobs_of(config, runs, done=done, workdir=str(workdir), given=given)
        jobs.append(Job("report", "report", ["report", "--workdir", str(workdir)], []))
        out = arguments.out.absolute()
        files = {
            f"{job.name}.sbatch": script(job, config.name, options + (pretrain_options if job.stage == "pretrain" else []), out=out) for job in jobs
        } | {"submit.sh": submit_script(config.name, jobs)}
        if arguments.dry_run:
            for name, text in files.items():
                print(f"==> {out / name}\n{text}")
            return 0
        _write(out, files)
        print(f"{len(jobs)} jobs ({len(done)} of {len(runs)} runs are done already): {out / 'submit.sh'}")
        return 0
    except UserError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
