"""The program `plasticity`: its commands, from words to a call of a library function, from errors to one line and an exit status.

A command is a function below with its flags above it. Nothing heavy is imported before it is needed.
"""

import argparse
import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plasticity_jax.completion import SHELLS, script
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import preemption, processes, supervise
from plasticity_jax.parallel.allocator import keep_freed_memory, release_freed_memory, return_freed_memory
from plasticity_jax.parallel.flags import leave_out_absent_tpu, prepare_backend
from plasticity_jax.progress import NORMAL, QUIET, VERBOSE, logged, say_last, start_logging
from plasticity_jax.text import valid_text

if TYPE_CHECKING:
    from plasticity_jax.runs.storage import AnyPath
    from plasticity_jax.study.execute import Outcome

log = logging.getLogger("plasticity_jax")

REFUSED = 2
STATUSES = """\
exit status:
  0    done
  1    a run failed, or waits for one that did; the last line names it, and error.log in its directory holds the details
  2    the input was refused
  130  interrupted, by Ctrl-C or SIGTERM; the same command resumes. Training first saves the step in progress; a second signal ends at once
"""
NAMED = 20  # failed runs that the last line names
MODEL_HELP = "directory of a finished pretrain, finetune or import run, or a Hugging Face folder"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")

Flag = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
      run: (arguments) → exit status.
      does: one line for --help.
      examples: command lines for --help, without the program's name.
      flags: of its own.
      config, workdir: whether it takes --config and --workdir.
      several: whether several processes can carry it out together.
      reads: it makes nothing in the workdir, so it leaves no log file there either.
      memory: "keep" what is freed, for work that allocates again and again; "return" it, for work on large files; "" for neither.
    """

    run: Callable[[argparse.Namespace], int]
    does: str
    examples: tuple[str, ...]
    flags: tuple[Flag, ...]
    config: bool
    workdir: bool
    several: bool
    reads: bool
    memory: str


COMMANDS: dict[str, Command] = {}


def _command(
    name: str,
    does: str,
    *flags: Flag,
    examples: tuple[str, ...],
    config: bool = True,
    workdir: bool = True,
    several: bool = True,
    reads: bool = False,
    memory: str = "keep",
):
    def register(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        COMMANDS[name] = Command(run, does, examples, flags, config, workdir, several, reads, memory)
        return run

    return register


def _flag(name: str, **settings: Any) -> Flag:
    return name, settings


def _place(text: str) -> "AnyPath":
    from plasticity_jax.runs.storage import location

    try:
        return location(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seed(text: str) -> int:
    from plasticity_jax.config.schema import MOST_SEED

    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"{text[:40]} must be an integer from 0 to {MOST_SEED}")
    return int(text)


JSON = _flag("--json", action="store_true", help="one JSON object on standard output")
VERIFY = _flag("--verify", action="store_true", help="read every file of the finished runs, and exit with 1 if one is no longer what its run wrote")
FAIL_FAST = _flag("--fail-fast", action="store_true", help="stop at the first run that fails; by default all goes on that does not need it")

# ---------------------------------------------------------------------------------------------------------------------------- commands


@_command(
    "study",
    "the whole graph; run again, it does only what is missing",
    _flag("--stages", metavar="A,B", help="only these stages, comma-separated"),
    _flag("--dry-run", action="store_true", help="print what would be done, stage by stage, and do nothing; with -v every run"),
    FAIL_FAST,
    examples=(
        "study --config default",
        "study --config my_study.py --dry-run",
        "study --config my_study.py --stages prepare,init,pretrain --config.grid.seeds='(0,1,2)'",
    ),
)
def _study(arguments) -> int:
    from plasticity_jax.stages import stages
    from plasticity_jax.study.execute import dry_run_lines, run_study

    config, workdir = arguments.config, arguments.workdir
    chosen = _choices("--stages", arguments.stages, tuple(stages()))
    if arguments.dry_run:
        print("\n".join(dry_run_lines(config, workdir, chosen=lambda run: run.stage in chosen, every=arguments.verbosity == VERBOSE)))
        return 0
    status = _said(run_study(config, workdir, chosen=lambda run: run.stage in chosen, fail_fast=arguments.fail_fast, summary=True))
    if len(chosen) == len(stages()):
        processes.broadcast(lambda: _write_report(workdir / config.name))
    return status


@_command(
    "status",
    "every run: done, running, failed, diverged, damaged, stale or missing",
    JSON,
    VERIFY,
    examples=("status", "status --workdir work --json", "status --verify"),
    config=False,
    several=False,
    reads=True,
    memory="",
)
def _status(arguments) -> int:
    from plasticity_jax.runs.jsonfiles import to_json
    from plasticity_jax.study.status import status_lines, study_status

    rows = study_status(arguments.workdir, verify=arguments.verify)
    print(to_json({"runs": rows}) if arguments.json else "\n".join(status_lines(rows)))
    return int(arguments.verify and any(row["state"] == "damaged" for row in rows))


@_command(
    "init",
    "write a config to begin with: short, commented, and complete",
    _flag("file", metavar="FILE.py", help="the file to write, such as my_study.py; none is replaced"),
    _flag(
        "--for",
        dest="shows",
        metavar="A,B",
        help="what of your own the file reads, comma-separated: text, task, checkpoints; by default what the study downloads",
    ),
    examples=("init my_study.py", "init my_study.py --for text,task", "init my_study.py --for checkpoints"),
    config=False,
    workdir=False,
    several=False,
    memory="",
)
def _init(arguments) -> int:
    from plasticity_jax.config.starter import SHOWS, write_starter

    shows = () if arguments.shows is None else _choices("--for", arguments.shows, tuple(SHOWS))
    for beside in write_starter(arguments.file, shows):
        print(f"put {beside} beside {arguments.file}")
    print(f"next: plasticity study --config {shlex.quote(arguments.file)} --dry-run")
    return 0


@_command("prepare", "corpus, tokenizer, token records, task and probe files", FAIL_FAST, examples=("prepare --config my_study.py",))
def _prepare(arguments) -> int:
    from plasticity_jax.study.execute import run_study

    return _said(run_study(arguments.config, arguments.workdir, chosen=lambda run: run.stage == "prepare", fail_fast=arguments.fail_fast))


@_command(
    "pretrain",
    "pretrain the members of the grid, or one of them",
    _flag("--member", metavar="NAME", help="only this member, such as wd0.1"),
    FAIL_FAST,
    examples=("pretrain --config my_study.py", "pretrain --config my_study.py --member wd0.1"),
)
def _pretrain(arguments) -> int:
    from plasticity_jax.config import grid_members
    from plasticity_jax.study.execute import resolve, run_study
    from plasticity_jax.study.graph import build_graph

    config, workdir = arguments.config, arguments.workdir
    if config.grid.models:
        raise UserError("grid.models names models that exist, so there is nothing to pretrain; run plasticity study.")
    names = list(dict.fromkeys(member.base for member in grid_members(config)))
    if arguments.member is not None and arguments.member not in names:
        raise UserError(f"--member={arguments.member} is not in the grid; its members are {', '.join(names)}.")
    models = [run for run in build_graph(resolve(config, workdir)) if run.stage == "pretrain" and arguments.member in (None, run.member)]
    chosen = {run.id for run in models} | {parent for run in models for parent in run.parents.values()}
    return _said(run_study(config, workdir, chosen=lambda run: run.id in chosen, fail_fast=arguments.fail_fast))


@_command(
    "finetune",
    "fine-tune a pretrained model on a task",
    _flag("--base", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=MODEL_HELP),
    _flag("--task", required=True, metavar="T", help="one of the config's tasks"),
    _flag("--seed", type=_seed, metavar="S", help="of the order of the rows; by default the config's first"),
    _flag("--member", metavar="NAME", help="whose recipe to use, where the grid sweeps fields of the fine-tuning"),
    FAIL_FAST,
    examples=("finetune --config default --base work/default/pretrain/RUN --task topic --seed 1",),
)
def _finetune(arguments) -> int:
    from plasticity_jax.config import grid_members
    from plasticity_jax.stages.finetune import finetune_run
    from plasticity_jax.stages.stage import BASES
    from plasticity_jax.study.on_model import run_on_model

    config = arguments.config
    seed = config.finetune.seeds[0] if arguments.seed is None else arguments.seed
    members = {member.name: member for member in grid_members(config)}
    if arguments.member is not None and arguments.member not in members:
        raise UserError(f"--member={arguments.member} is not in the grid; its members are {', '.join(members)}.")
    member = None if arguments.member is None else members[arguments.member]

    def runs(own, base):
        if member is not None and (base.stage not in BASES or base.member != member.base):
            raise UserError(
                f"--member={member.name} is fine-tuned from {member.base}, and --base={arguments.base} is {base.name}; give its base or leave --member out."
            )
        return [finetune_run(own, base, arguments.task, seed, member)]

    return _said(run_on_model(config, arguments.workdir, arguments.base, "--base", runs, member, fail_fast=arguments.fail_fast))


@_command(
    "evaluate",
    "generate answers to a task's test rows and grade them",
    _flag("--model", type=_place, metavar="RUN_OR_HF_DIR", help=MODEL_HELP),
    _flag("--task", metavar="T", help="one of the config's tasks"),
    _flag(
        "--regrade",
        action="store_true",
        help="generate nothing: grade the study's finished completions again, or those of --model and --task, into runs beside the first ones",
    ),
    _flag("--faithful", action="store_true", help="with --regrade: grade as the original; by default as the completions were graded"),
    _flag("--clean", action="store_true", help="with --regrade: grade the clean way"),
    FAIL_FAST,
    examples=("evaluate --config default --model work/default/finetune/RUN --task topic", "evaluate --config default --regrade"),
)
def _evaluate(arguments) -> int:
    from plasticity_jax.stages.evaluate import evaluate_run
    from plasticity_jax.study.on_model import run_on_model
    from plasticity_jax.study.regrade import regrade_completions

    if arguments.faithful and arguments.clean:
        raise UserError("--faithful and --clean exclude each other; give one of the two, or neither to grade as before.")
    if arguments.regrade:
        faithful = True if arguments.faithful else False if arguments.clean else None
        return _said(regrade_completions(arguments.config, arguments.workdir, model=arguments.model, task=arguments.task, faithful=faithful))
    if arguments.faithful or arguments.clean:
        raise UserError("--faithful and --clean go with --regrade; an evaluation that generates follows the config (--config.faithful=True).")
    missing = [flag for flag, given in (("--model", arguments.model), ("--task", arguments.task)) if given is None]
    if missing:
        raise UserError(f"plasticity evaluate: the following arguments are required: {', '.join(missing)} (see plasticity evaluate --help)")

    def runs(own, model):
        return [evaluate_run(own, model, arguments.task)]

    return _said(run_on_model(arguments.config, arguments.workdir, arguments.model, "--model", runs, fail_fast=arguments.fail_fast))


@_command(
    "analyze",
    "look inside a model",
    _flag("--model", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=MODEL_HELP),
    _flag("--only", metavar="A,B", help="some of the analyses, comma-separated; all by default"),
    FAIL_FAST,
    examples=("analyze --config default --model path/to/SmolLM2-135M --only probe,spectra",),
)
def _analyze(arguments) -> int:
    from plasticity_jax.stages import stages
    from plasticity_jax.study.on_model import run_on_model

    analyses = {name: stage for name, stage in stages().items() if stage.analysis}
    only = _choices("--only", arguments.only, tuple(analyses))

    def runs(own, model):
        found = []
        for name in only:
            if arguments.only is None and not analyses[name].applies(own):
                continue
            try:
                found.append(analyses[name].on_model(own, model))
            except UserError as error:
                if arguments.only is not None:
                    raise
                log.info("%s is left out: %s", name, error)
        return found

    return _said(run_on_model(arguments.config, arguments.workdir, arguments.model, "--model", runs, fail_fast=arguments.fail_fast))


@_command(
    "show",
    "read completions, by member, task and verdict",
    _flag("--member", metavar="NAME", help="such as wd0.1"),
    _flag("--weight-decay", type=float, metavar="X", help="of the pretraining"),
    _flag("--task", metavar="T", help="only of this task"),
    _flag("--when", choices=("before", "after"), help="fine-tuning"),
    _flag("--verdict", choices=("right", "wrong", "no answer", "timed out"), help="of the grader"),
    _flag("--id", metavar="ID", help="of a problem"),
    _flag("--samples", action="store_true", help="also the sampled completions, not only the greedy ones"),
    _flag("--limit", type=int, default=10, metavar="N", help="completions to show (10); 0 shows all"),
    _flag("--json", action="store_true", help="one JSON object per completion and line"),
    examples=("show --task topic --verdict wrong", "show --member wd0.1 --when after --samples --limit 3"),
    config=False,
    several=False,
    reads=True,
    memory="",
)
def _show(arguments) -> int:
    from itertools import islice

    from plasticity_jax.report.browse import Filter, browse, text_of
    from plasticity_jax.runs.jsonfiles import to_json

    if arguments.limit < 0:
        raise UserError(f"--limit={arguments.limit} must not be negative; 0 shows all.")
    wanted = Filter(arguments.member, arguments.weight_decay, arguments.task, arguments.when, arguments.verdict, arguments.id, arguments.samples)
    shown = 0
    for row in islice(browse(arguments.workdir, wanted), arguments.limit or None):
        print(to_json(row) if arguments.json else text_of(row))
        shown += 1
    if shown == 0:
        log.info("no completion matches")
    elif shown == arguments.limit:
        log.info("these are the first %d; --limit shows more", shown)
    return 0


@_command(
    "diff",
    "what differs between two runs: config, inputs, environment, the first step at which their logs part, results",
    _flag("runs", nargs=2, type=_place, metavar="RUN", help="directories of two runs"),
    JSON,
    examples=("diff work/default/pretrain/RUN other/default/pretrain/RUN",),
    config=False,
    workdir=False,
    several=False,
    memory="",
)
def _diff(arguments) -> int:
    from plasticity_jax.runs.jsonfiles import to_json
    from plasticity_jax.study.diff import diff_lines, run_differences

    first, second = arguments.runs
    found = run_differences(first, second)
    named = {kind: {name: [a, b] for name, a, b in pairs} for kind, pairs in found.items()}
    print(to_json(named) if arguments.json else "\n".join(diff_lines(first, second, found)))
    return 0


@_command(
    "report",
    "write <workdir>/<study>/report/index.html, figures and tables",
    _flag("--records", type=_place, metavar="DIR", help="unpack what plasticity records wrote into the workdir, and report on these studies"),
    _flag(
        "--single-file",
        type=_place,
        metavar="DIR",
        help="write each study's page once more, as DIR/STUDY.html, without links: one file to send or to keep",
    ),
    examples=("report", "report --records my_records --workdir unpacked", "report --single-file pages"),
    config=False,
    several=False,
    memory="",
)
def _report(arguments) -> int:
    from plasticity_jax.study.graph import study_files
    from plasticity_jax.study.records import unpack_records

    if arguments.records is not None:
        folders = unpack_records(arguments.records, arguments.workdir)
    else:
        folders = [path.parent for path in study_files(arguments.workdir)]
    for folder in folders:
        _write_report(folder, alone=arguments.single_file and arguments.single_file / f"{folder.name}.html")
    return 0


@_command(
    "records",
    "write what the pages of the studies in a workdir are made from, without checkpoints and completions: small archives, one per seed, to keep",
    _flag("--out", type=_place, required=True, metavar="DIR", help="folder of the archives, in a folder per study"),
    examples=("records --workdir work --out my_records",),
    config=False,
    several=False,
    reads=True,
    memory="",
)
def _records(arguments) -> int:
    from plasticity_jax.study.graph import study_files
    from plasticity_jax.study.records import save_records

    for path in study_files(arguments.workdir):
        for archive in save_records(path.parent, arguments.out / path.parent.name):
            print(f"{archive}  {archive.stat().st_size:,} bytes")
    return 0


@_command(
    "compare",
    "join finished studies on one page: best weight decays before and after fine-tuning, whether they move with tokens, ranks",
    _flag(
        "--study",
        type=_place,
        action="append",
        default=[],
        metavar="A",
        help="folder of a study, or a workdir that holds one; given two or more times, local or on a store",
    ),
    _flag(
        "--model",
        type=_place,
        action="append",
        default=[],
        metavar="RUN",
        help="a spectra run of a model beside them, as plasticity analyze prints it",
    ),
    _flag("--out", type=_place, required=True, metavar="DIR", help="folder of the page, its figures and tables"),
    JSON,
    examples=("compare --study work20/small --study work140/small --out comparison",),
    config=False,
    workdir=False,
    several=False,
    memory="",
)
def _compare(arguments) -> int:
    from plasticity_jax.report.comparison import check_out, format_settings, write_comparison
    from plasticity_jax.runs.jsonfiles import to_json
    from plasticity_jax.study.compare import compare_studies

    check_out(arguments.out)
    found = compare_studies(arguments.study, arguments.model)
    page, settings = write_comparison(found, arguments.out), found.tables()["settings"]
    if arguments.json:
        print(to_json({"page": str(page), "settings": settings, "verdicts": list(map(vars, found.verdicts)), "notes": found.notes}))
    else:
        print(format_settings(settings))
        print(f"comparison: {page}")
    return 0


@_command(
    "power",
    "which differences between weight decays a config's study would see, and how many pretraining seeds it takes",
    _flag(
        "--seed-deviation",
        type=float,
        metavar="SD",
        help="standard deviation of a model's mean accuracy over pretraining seeds (0.02; docs/statistics.md says from what)",
    ),
    JSON,
    examples=("power --config default", "power --config default --config.grid.seeds='(0,1,2,3,4)'"),
    workdir=False,
    several=False,
    memory="",
)
def _power(arguments) -> int:
    from plasticity_jax.runs.jsonfiles import to_json
    from plasticity_jax.study.power import power_lines, study_power

    found = study_power(arguments.config, arguments.seed_deviation)
    print(to_json(found) if arguments.json else "\n".join(power_lines(found)))
    return 0


@_command(
    "data",
    "what a config's study reads: what is there, what is missing, and the command for it; and what the rows of your own tasks look like",
    _flag("--task", metavar="T", help="the task whose rows to show; by default those from tables and modules of your own"),
    _flag("--workdir", type=_place, metavar="W", help="folder of the study, if its data is prepared: lengths by the tokenizer that it trained"),
    JSON,
    examples=("data --config my_study.py", "data --config llama_1b_20tpp --json"),
    workdir=False,
    several=False,
    memory="",
)
def _data(arguments) -> int:
    from dataclasses import asdict

    from plasticity_jax.runs.jsonfiles import to_json
    from plasticity_jax.stages.prepare import task_settings
    from plasticity_jax.study.inventory import needed, needed_lines
    from plasticity_jax.study.look import look_at, look_lines

    config = arguments.config
    if arguments.task is not None:
        task_settings(config, arguments.task)
    found = needed(config)
    if not arguments.json:
        print("\n".join(needed_lines(found)), flush=True)
    shown = [arguments.task] if arguments.task else [name for name, settings in config.tasks.items() if settings.own]
    shown = [name for name in shown if all(one.there for one in found if one.what.startswith(f"{name} "))]
    looks = look_at(config, shown, arguments.workdir)
    if not arguments.json:
        for one in looks:
            print("", *look_lines(one), sep="\n")
    else:
        print(to_json({"needed": [asdict(one) for one in found], "tasks": [asdict(one) for one in looks]}))
    return 0 if all(one.there for one in found) else REFUSED


@_command(
    "check",
    "compile the programs of every stage for hardware that need not be here: do they fit, and what does the study take?",
    _flag("--topology", required=True, metavar="T", help="such as v5e:4x4, v5p:4x4x4, h100:8, cpu:8"),
    _flag("--stages", metavar="A,B", help="only these stages, comma-separated; the training step is always compiled"),
    _flag(
        "--search", action="store_true", help="look for the fewest parts and the lightest remat that fit with some memory to spare (a few compiles)"
    ),
    _flag("--mfu", type=float, metavar="FRACTION", help="of the devices' peak FLOP/s; launch.mfu by default"),
    _flag("--workdir", type=_place, metavar="W", help="folder of the study, if its data is prepared: hours from the rows and lengths that are there"),
    JSON,
    examples=("check --config llama_1b_20tpp --topology v5e:8x8", "check --config my_study.py --topology h100:8 --stages finetune --search"),
    workdir=False,
    several=False,
)
def _check(arguments) -> int:
    # Before jax is imported: the devices are described to the compiler, not looked for.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    from dataclasses import replace

    from plasticity_jax.parallel.deviceless import target
    from plasticity_jax.parallel.lanes import divided
    from plasticity_jax.runs.jsonfiles import to_json
    from plasticity_jax.stages import stages
    from plasticity_jax.study import check as study_check
    from plasticity_jax.study import hours
    from plasticity_jax.train.check import lines, resolved, to_record

    chosen = _choices("--stages", arguments.stages, tuple(stages()))
    config = arguments.config
    if arguments.mfu is not None:
        if not 0 < arguments.mfu <= 1:
            raise UserError(f"--mfu={arguments.mfu} is a fraction of the peak; it must be above 0 and at most 1.")
        config = replace(config, launch=replace(config.launch, mfu=arguments.mfu))
    place = target(arguments.topology)
    part = replace(place, devices=divided(place.devices, resolved(config, place).launch.parallel_runs or 1)[0])  # what one run gets
    cases = study_check.cases(config, part)
    answers = [] if config.grid.models else study_check.check_pretraining(cases, part, search=arguments.search)
    ways_out = study_check.remedies(answers, part)
    rows = study_check.check_stages(cases, part, chosen)
    estimated = hours.study_hours(config, part, arguments.workdir)
    if arguments.json:
        first = to_record(answers[0], part) if answers else {"topology": part.topology, "devices": len(part.devices)}
        record = first | {"others": [to_record(answer, part) for answer in answers[1:]], "ways_out": ways_out}
        print(to_json(record | {"stages": study_check.to_record(rows), "hours": hours.to_record(estimated)}))
    else:
        steps = [line for answer in answers for line in lines(answer, part)]
        print("\n".join([*steps, *ways_out, *study_check.lines(rows), *hours.lines(estimated, place, config.launch.mfu)]))
    return 0 if all(answer.fits for answer in answers[:1]) and all(row.fits for row in rows) else 1


@_command(
    "config",
    "print a config as JSON, with the overrides applied",
    _flag("--explain", action="store_true", help="each field with its meaning, and whether it is an execution field"),
    examples=("config --config default --explain", "config --config default --config.train.steps=100"),
    workdir=False,
    several=False,
    memory="",
)
def _config(arguments) -> int:
    import json

    from plasticity_jax.config import explain, to_dict

    if arguments.explain:
        lines = (f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in explain(arguments.config).items())
        print("{\n" + ",\n".join(lines) + "\n}")
    else:
        print(json.dumps(to_dict(arguments.config), indent=2, ensure_ascii=False))
    return 0


@_command(
    "import",
    "turn a Hugging Face folder into a run that the other commands take",
    _flag("--hf", type=_place, required=True, metavar="DIR", help="folder with config.json and safetensors, as save_pretrained writes it"),
    _flag("--out", type=_place, required=True, metavar="RUN_DIR", help="directory of the run; missing or empty"),
    examples=("import --hf path/to/OLMo-2-0425-1B --out work/olmo2",),
    config=False,
    workdir=False,
    several=False,
    memory="return",
)
def _import(arguments) -> int:
    from plasticity_jax.model.hf_import import import_folder

    import_folder(arguments.hf, arguments.out)
    print(arguments.out)
    return 0


@_command(
    "export",
    "turn a run into a Hugging Face folder that transformers loads",
    _flag("--model", type=_place, required=True, metavar="RUN_DIR", help="directory of a finished pretrain, finetune or import run"),
    _flag("--out", type=_place, required=True, metavar="DIR", help="the folder to write; missing or empty"),
    _flag("--dtype", metavar="D", help=f"{', '.join(EXPORT_DTYPES)}; by default that of an import's source, and float32 for other runs"),
    examples=("export --model work/olmo2 --out olmo2-folder --dtype bfloat16",),
    config=False,
    workdir=False,
    several=False,
    memory="return",
)
def _export(arguments) -> int:
    if arguments.dtype not in (None, *EXPORT_DTYPES):
        raise UserError(f"--dtype={arguments.dtype} must be one of {', '.join(EXPORT_DTYPES)}.")
    from plasticity_jax.model.hf_export import export_model

    export_model(arguments.model, arguments.out, arguments.dtype)
    print(arguments.out)
    return 0


@_command(
    "generate",
    "continue a prompt",
    _flag("--model", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=MODEL_HELP),
    _flag("--prompt", required=True, metavar="TEXT", help="the text to continue"),
    _flag("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add, at most (64)"),
    _flag("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most likely token; 1 by default"),
    _flag("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0 from all"),
    _flag("--top-p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens that hold this probability"),
    _flag("--repetition-penalty", type=float, default=1.0, metavar="R", help="of tokens that are there already; 1 is none"),
    _flag("--seed", type=_seed, default=0, metavar="S", help="of the draws"),
    examples=('generate --model work/default/pretrain/RUN --prompt "The President" --temperature 0',),
    config=False,
    workdir=False,
)
def _generate(arguments) -> int:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={arguments.max_new_tokens} must be at least 1.")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature={arguments.temperature} must be 0 or more.")
    if arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-k={arguments.top_k} must not be negative, and --top-p={arguments.top_p} must be above 0 and at most 1.")
    if not 0 < arguments.repetition_penalty < float("inf"):
        raise UserError(f"--repetition-penalty={arguments.repetition_penalty} must be positive; 1 is none.")
    valid_text("--prompt", arguments.prompt)
    from plasticity_jax.evaluate.generate import continue_text
    from plasticity_jax.model.load import load_model

    names = ("max_new_tokens", "temperature", "seed", "top_k", "top_p", "repetition_penalty")
    settings = {name: getattr(arguments, name) for name in names}
    continued = processes.broadcast(lambda: continue_text(load_model(arguments.model), arguments.prompt, **settings))
    if processes.primary():
        print(continued)
    return 0


@_command(
    "completion",
    "print a script that completes commands and options in a shell",
    _flag("shell", choices=SHELLS, help="the shell that reads the script"),
    examples=(
        "completion bash > ~/.local/share/bash-completion/completions/plasticity",
        'completion zsh > "${fpath[1]}/_plasticity"',
        "completion fish > ~/.config/fish/completions/plasticity.fish",
    ),
    config=False,
    workdir=False,
    several=False,
    memory="",
)
def _completion(arguments) -> int:
    print(script(arguments.shell, parser()), end="")
    return 0


def _write_report(folder: "AnyPath", alone: "AnyPath | None" = None) -> None:
    from plasticity_jax.report.page import collect, format_summary, write_report
    from plasticity_jax.report.tables import summary_rows

    results = collect(folder)
    page = write_report(results, alone)
    print(format_summary(summary_rows(results)))
    print(f"report: {page}")
    if alone is not None:
        print(f"the page alone: {alone}")


def _said(outcome: "Outcome") -> int:
    """Says what became of the runs, and returns the exit status."""
    numbers = map(len, (outcome.carried_out, outcome.skipped, outcome.failed, outcome.waiting))
    said = "{} runs carried out, {} were done already, {} failed, {} wait for a missing parent".format(*numbers)
    said += f", {len(outcome.left)} not reached (--fail-fast)" if outcome.left else ""
    named = outcome.failed[:NAMED] + ([f"and {len(outcome.failed) - NAMED} more"] if len(outcome.failed) > NAMED else [])
    log.info("%s", said + (f"; failed: {', '.join(named)}" if named else ""))
    if len(outcome.paths) <= 3 and processes.primary():
        for path in outcome.paths.values():
            print(path)
    return 1 if outcome.failed or outcome.waiting else 0


def _choices(flag: str, text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if text is None:
        return tuple(known)
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise UserError(f"{flag}={text}: {', '.join(unknown) or 'nothing'} is not one of {', '.join(known)}.")
    return chosen


# ------------------------------------------------------------------------------------------------------------------------------ parser


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        from plasticity_jax import __version__

        print(f"plasticity_jax {__version__}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    about = "What does a pretraining hyperparameter do to what a language model can still learn?"
    program = _Parser(prog="plasticity", description=about, epilog=STATUSES, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    subparsers = program.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        examples = "\n".join(["examples:", *(f"  plasticity {words}" for words in command.examples)])
        sub = subparsers.add_parser(
            name,
            help=command.does,
            description=command.does,
            epilog=examples,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.config:
            about = "a Python config file, the name of one that comes with the package, such as default, or the config.json of a run; "
            about += "--config.a.b=value overrides one of its keys"
            sub.add_argument("--config", required=True, metavar="C", help=about)
        if command.workdir:
            about = "folder that holds the studies, local or on a store such as gs://bucket/work (./work)"
            sub.add_argument("--workdir", type=_place, default="work", metavar="W", help=about)
        for flag, settings in command.flags:
            sub.add_argument(flag, **settings)
        loudness = sub.add_mutually_exclusive_group()
        for flags, level, about in ((("-q", "--quiet"), QUIET, "say warnings and errors only"), (("-v", "--verbose"), VERBOSE, "say more")):
            loudness.add_argument(*flags, dest="verbosity", action="store_const", const=level, default=NORMAL, help=about)
        if command.several:
            together = sub.add_argument_group("several processes, started by hand (Cloud TPU and SLURM need none of these)")
            together.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 is reached by all")
            together.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
            together.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1, each once")
    return program


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` (or `--config.a.b value`) out of the arguments."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            if not equals:
                value = next(words, None)
                if value is None:
                    raise UserError(f"{word} has no value; write {word}=VALUE.")
            overrides.append((key, value))
        else:
            rest.append(word)
    return rest, overrides


def is_one_of_several(arguments) -> bool:
    """Whether this command is one of several processes of a run. Raises UserError for flags that do not fit together."""
    if not COMMANDS[arguments.command].several or getattr(arguments, "dry_run", False):
        return False
    address, n, i = arguments.coordinator, arguments.num_processes, arguments.process_id
    if address is None and n is None and i is None:
        return processes.detected()
    if address is None or n is None or i is None:
        raise UserError(f"--coordinator={address}, --num-processes={n} and --process-id={i} go together; give all three, or none.")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address} must be HOST:PORT of process 0, such as 10.0.0.1:8476.")
    if n < 1 or not 0 <= i < n:
        raise UserError(f"--process-id={i} must lie between 0 and --num-processes - 1 = {n - 1}.")
    return n > 1


# -------------------------------------------------------------------------------------------------------------------------- the program


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status, as `STATUSES` lists them."""
    argv = sys.argv[1:] if argv is None else list(argv)
    worker = supervise.become_worker()
    start_logging()
    with contextlib.ExitStack() as stack:
        return _main(argv, worker, stack)


def _main(argv: list[str], worker: bool, stack: contextlib.ExitStack) -> int:
    """`main`, with a log file that is open until `stack` ends."""
    try:
        if sys.platform == "win32":
            raise UserError("plasticity runs on Linux and macOS; on Windows, install and start it inside WSL (wsl --install).")
        rest, overrides = split_overrides(argv)
        arguments = parser().parse_args(rest)
        start_logging(arguments.verbosity)
        command = COMMANDS[arguments.command]
        if overrides and not command.config:
            raise UserError(f"plasticity {arguments.command} reads no config; leave out --config.{overrides[0][0]}.")
        leave_out_absent_tpu()
        launch = None
        if command.config or command.several:
            from plasticity_jax.config import LaunchConfig, load_config

            if command.config:
                arguments.config = load_config(arguments.config, overrides)
            launch = arguments.config.launch if command.config else LaunchConfig()
        if launch is not None and command.several:
            prepare_backend(launch.compile_cache)
        several = is_one_of_several(arguments)
        if several and not worker:
            return supervise.supervise(argv, _log_folder(arguments))
        stack.enter_context(logged(_logged_workdir(arguments), arguments.command, argv))
        with preemption.handled():
            if command.memory:
                (keep_freed_memory if command.memory == "keep" else return_freed_memory)()
                stack.callback(release_freed_memory)
            if launch is not None and several:
                processes.start(arguments.coordinator, arguments.num_processes, arguments.process_id, timeout=launch.start_timeout)
            return command.run(arguments)
    except UserError as error:
        say_last(f"plasticity: {error}")
        return REFUSED
    except processes.Disconnected as error:
        say_last(f"plasticity: {error}; run the same commands again: they resume.")
        return 1
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say_last(f"plasticity: {str(error) or 'interrupted'}; the same command resumes.")
        return preemption.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        from plasticity_jax.study.execute import storage_problem

        problem = storage_problem(error) if isinstance(error, OSError) else None
        if problem is None:
            say_last(traceback.format_exc(), shown="")  # the interpreter shows it
            raise
        where = f"--workdir={arguments.workdir}" if "workdir" in arguments else f"--out={arguments.out}"
        say_last(f"plasticity: {where}: {problem}; make room or give another, then run again: it resumes.")
        return REFUSED


def entry() -> None:
    """The `plasticity` program: `main`, and its status as the process's."""
    try:
        status = main()
    except Exception:
        if processes.count() == 1:
            raise
        traceback.print_exc()
        status = 1
    if status in (REFUSED, preemption.INTERRUPTED) or (status and processes.count() > 1):
        # Orbax would print a trace for every array that was still to be read or written, and jax would wait for processes that wait for this one, or for
        # what was interrupted; all that is to be said has been.
        processes.leave(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _logged_workdir(arguments) -> Path | None:
    """The folder whose `logs` keep what this command says; None where it only reads, or works on a store."""
    from plasticity_jax.runs.storage import is_local

    command = COMMANDS[arguments.command]
    if not command.workdir or command.reads or getattr(arguments, "dry_run", False) or not is_local(arguments.workdir):
        return None
    return arguments.workdir


def _log_folder(arguments) -> Path | None:
    """Where the runtimes of the processes write; None where the command has no local folder."""
    from plasticity_jax.runs.storage import is_local

    if "workdir" not in arguments or not is_local(arguments.workdir):
        return None
    return arguments.workdir / arguments.config.name / "logs"
