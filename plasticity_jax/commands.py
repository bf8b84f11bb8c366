"""The commands of the program: each calls library functions and prints. Nothing heavy is imported before it is needed."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from plasticity_jax.arguments import EXPORT_DTYPES
from plasticity_jax.config import Member, StudyConfig, grid_members, member_config
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes
from plasticity_jax.runs.storage import AnyPath

log = logging.getLogger("plasticity_jax")


def _study(arguments) -> int:
    from plasticity_jax.runs.records import STAGES
    from plasticity_jax.study.execute import resolve
    from plasticity_jax.study.graph import build_graph

    workdir, stages = arguments.workdir, _choices("--stages", arguments.stages, STAGES)
    config = resolve(arguments.config, workdir)
    runs = build_graph(config)
    if arguments.dry_run:
        _print_graph(workdir, config, runs)
        return 0
    chosen = [run for run in runs if run.stage in stages]
    _begin(config, workdir, chosen, runs)
    code = _execute(config, workdir, chosen)
    if set(stages) == set(STAGES):
        processes.broadcast(lambda: _report(workdir / config.name))
    return code


def _begin(config: StudyConfig, workdir: AnyPath, runs, graph) -> None:
    """Checks all that can be checked before anything is written, then writes study.json. On several processes the first decides."""
    from plasticity_jax.study.execute import check_shared, check_start, check_workdir
    from plasticity_jax.study.graph import save_study

    processes.broadcast(lambda: check_start(config, workdir, runs))
    processes.broadcast(lambda: check_workdir(workdir, config))
    check_shared(workdir)
    processes.broadcast(lambda: save_study(workdir, config, graph))


def _status(arguments) -> int:
    from plasticity_jax.runs.records import to_json
    from plasticity_jax.study.graph import study_status

    rows = study_status(arguments.workdir)
    if arguments.json:
        print(to_json({"runs": rows}))
        return 0
    width = max(len(row["id"]) for row in rows)
    for study in dict.fromkeys(row["study"] for row in rows):
        mine = [row for row in rows if row["study"] == study]
        counts = {state: sum(row["state"] == state for row in mine) for state in dict.fromkeys(row["state"] for row in mine)}
        print(f"{study}: {len(mine)} runs, " + ", ".join(f"{n} {state}" for state, n in counts.items()))
        for row in mine:
            print(f"  {row['id']:<{width}}  {row['state']:<8}  {row['reason']}".rstrip())
    return 0


def _prepare(arguments) -> int:
    return _stages(arguments, ("prepare",))


def _pretrain(arguments) -> int:
    names = list(dict.fromkeys(member.base for member in grid_members(arguments.config)))
    if arguments.member is not None and arguments.member not in names:
        raise UserError(f"--member={arguments.member} is not in the grid; its members are {', '.join(names)}.")
    return _stages(arguments, ("prepare", "init", "pretrain"), member=arguments.member)


def _stages(arguments, stages: Sequence[str], member: str | None = None) -> int:
    """Carries out whole stages of the graph; of pretrain, only `member` and what it is built from, if given."""
    from plasticity_jax.study.execute import resolve
    from plasticity_jax.study.graph import build_graph

    workdir = arguments.workdir
    config = resolve(arguments.config, workdir)
    graph = build_graph(config)
    runs = [run for run in graph if run.stage in stages]
    if "pretrain" in stages:
        chosen = [run for run in runs if run.stage == "pretrain" and member in (None, run.member)]
        needed = {parent for run in chosen for parent in run.parents.values()}
        runs = [run for run in runs if run.id in needed] + chosen
    _begin(config, workdir, runs, graph)
    return _execute(config, workdir, runs)


def _finetune(arguments) -> int:
    from plasticity_jax.study.graph import finetune_run

    study = arguments.config
    seed = study.finetune.seeds[0] if arguments.seed is None else arguments.seed
    members = {member.name: member for member in grid_members(study)}
    if arguments.member is not None and arguments.member not in members:
        raise UserError(f"--member={arguments.member} is not in the grid; its members are {', '.join(members)}.")
    member = members.get(arguments.member)

    def runs(config, base):
        if member is not None and (base.stage != "pretrain" or base.member != member.base):
            raise UserError(
                f"--member={member.name} is fine-tuned from {member.base}, and --base={arguments.base} is {base.name}; give its base or leave --member out."
            )
        return [finetune_run(config, base, arguments.task, seed, member)]

    return _on_model(arguments, arguments.base, "--base", runs, member)


def _evaluate(arguments) -> int:
    from plasticity_jax.study.graph import evaluate_run

    return _on_model(arguments, arguments.model, "--model", lambda config, model: [evaluate_run(config, model, arguments.task)])


def _analyze(arguments) -> int:
    from plasticity_jax.study import graph

    only = _choices("--only", arguments.only, ("probe", "spectra", "gap"))
    make = {"probe": graph.probe_run, "spectra": graph.spectra_run, "gap": graph.gap_run}

    def runs(config, model):
        kinds = only
        if arguments.only is None and "corpus" not in model.parents:
            log.info("gap is left out: %s was not itself pretrained on a corpus", model.id)
            kinds = ("probe", "spectra")
        return [make[kind](config, model) for kind in kinds]

    return _on_model(arguments, arguments.model, "--model", runs)


def _on_model(arguments, path: AnyPath, flag: str, make, member: Member | None = None) -> int:
    """Carries out runs on a given model directory, with the prepare runs that they need; a Hugging Face folder is imported into the study first.

    A `member` gives the recipe of the fine-tuning.
    """
    from plasticity_jax.model.hf_import import import_model, import_run, imported_from, is_hugging_face, with_network
    from plasticity_jax.model.load import MODEL_STAGES
    from plasticity_jax.runs.records import RunDirectory, open_run
    from plasticity_jax.study.execute import check_shared, check_start, check_workdir, resolve
    from plasticity_jax.study.graph import build_graph, prepare_runs, run_configs, save_study, study_dir

    folder = path if is_hugging_face(path) else None
    directory = open_run(path) if folder is None else None
    if directory is not None and directory.run().stage not in MODEL_STAGES:
        raise UserError(
            f"{flag}={path} is a {directory.run().stage} run and holds no model; give the directory of a pretrain, finetune or import run."
        )
    workdir = arguments.workdir
    study = config = resolve(arguments.config, workdir)
    if folder is not None:
        model, config = import_run(folder, study)
        path = study_dir(workdir, study) / model.id
    else:
        model = directory.run()
        config = run_configs(study, [model])[model.id]
        if imported_from(directory) is not None:
            config = with_network(study, directory.config().model)
    if member is not None:
        config = replace(config, finetune=member_config(study, member).finetune)
    runs = make(config, model)

    def begin() -> None:
        if not (study_dir(workdir, study) / "study.json").is_file():
            save_study(workdir, study, build_graph(study))
        if folder is not None and not RunDirectory(path).done:
            import_model(folder, path, model, config)

    processes.broadcast(lambda: check_start(config, workdir, runs))
    processes.broadcast(lambda: check_workdir(workdir, study))
    check_shared(workdir)
    processes.broadcast(begin)
    external = {model.id: path.resolve()}
    corpus = path.resolve().parents[1] / model.parents["corpus"] if "corpus" in model.parents else None
    if corpus is not None and corpus.is_dir():
        external[model.parents["corpus"]] = corpus
    needed = {parent for run in runs for parent in run.parents.values()} - set(external)
    return _execute(config, workdir, [run for run in prepare_runs(config) if run.id in needed] + runs, external)


def _execute(config: StudyConfig, workdir: AnyPath, runs, external=None) -> int:
    from plasticity_jax.study.execute import execute

    outcome = execute(config, workdir, runs, external=external)
    log.info(
        "%d runs carried out, %d were done already, %d failed, %d wait for a missing parent",
        *map(len, (outcome.carried_out, outcome.skipped, outcome.failed, outcome.waiting)),
    )
    if len(runs) <= 3 and processes.primary():
        for run in runs:
            print((external or {}).get(run.id, workdir / config.name / run.id))
    return 1 if outcome.failed or outcome.waiting else 0


def _show(arguments) -> int:
    from itertools import islice

    from plasticity_jax.report.browse import Filter, browse, text_of
    from plasticity_jax.runs.records import to_json

    if arguments.limit < 0:
        raise UserError(f"--limit={arguments.limit} must not be negative; 0 shows all.")
    wanted = Filter(arguments.member, arguments.weight_decay, arguments.task, arguments.when, arguments.verdict, arguments.id, arguments.samples)
    shown = 0
    for row in islice(browse(arguments.workdir, wanted), arguments.limit or None):
        print(to_json(row) if arguments.json else text_of(row))
        shown += 1
    if shown == 0:
        log.info("no completion is like that")
    elif shown == arguments.limit:
        log.info("the first %d; --limit shows more", shown)
    return 0


def _report_command(arguments) -> int:
    from plasticity_jax.study.graph import study_files

    for path in study_files(arguments.workdir):
        _report(path.parent)
    return 0


def _report(folder: AnyPath) -> None:
    from plasticity_jax.report.page import format_summary, summary_table, write_report

    page = write_report(folder)
    print(format_summary(summary_table(folder)))
    print(f"report: {page}")


def _config(arguments) -> int:
    import json

    from plasticity_jax.config import explain, to_dict

    if arguments.explain:
        lines = (f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in explain(arguments.config).items())
        print("{\n" + ",\n".join(lines) + "\n}")
    else:
        print(json.dumps(to_dict(arguments.config), indent=2, ensure_ascii=False))
    return 0


def _check(arguments) -> int:
    # Before jax is imported: the devices are described to the compiler, not looked for.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    from plasticity_jax.parallel.deviceless import target
    from plasticity_jax.runs.records import to_json
    from plasticity_jax.train.check import check, lines, search, to_record

    config = arguments.config
    if arguments.mfu is not None:
        if not 0 < arguments.mfu <= 1:
            raise UserError(f"--mfu={arguments.mfu} is a share of the peak; it must be above 0 and at most 1.")
        config = replace(config, launch=replace(config.launch, mfu=arguments.mfu))
    place = target(arguments.topology)
    answer = (search if arguments.search else check)(config, place)
    print(to_json(to_record(answer, place)) if arguments.json else "\n".join(lines(answer, place)))
    return 0 if answer.fits else 1


def _generate(arguments) -> int:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={arguments.max_new_tokens} must be at least 1.")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature={arguments.temperature} must be 0 or more.")
    if arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-k={arguments.top_k} must not be negative, and --top-p={arguments.top_p} must be above 0 and at most 1.")
    if not 0 < arguments.repetition_penalty < float("inf"):
        raise UserError(f"--repetition-penalty={arguments.repetition_penalty} must be positive; 1 is none.")
    from plasticity_jax.evaluate.generate import continue_text
    from plasticity_jax.model.load import load_model

    def text() -> str:
        model = load_model(arguments.model)
        return continue_text(
            model,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
        )

    continued = processes.broadcast(text)
    if processes.primary():
        print(continued)
    return 0


def _import(arguments) -> int:
    from plasticity_jax.model.hf_import import import_folder

    import_folder(arguments.hf, arguments.out)
    print(arguments.out)
    return 0


def _export(arguments) -> int:
    if arguments.dtype not in (None, *EXPORT_DTYPES):
        raise UserError(f"--dtype={arguments.dtype} must be one of {', '.join(EXPORT_DTYPES)}.")
    from plasticity_jax.model.hf_export import export_model

    export_model(arguments.model, arguments.out, arguments.dtype)
    print(arguments.out)
    return 0


def _choices(flag: str, text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if text is None:
        return tuple(known)
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise UserError(f"{flag}={text}: {', '.join(unknown) or 'nothing'} is not one of {', '.join(known)}.")
    return chosen


def _print_graph(workdir: AnyPath, config: StudyConfig, runs) -> None:
    from plasticity_jax.runs.records import RunDirectory

    for member in grid_members(config):
        share = "no decay" if member.timescale is None else f"timescale {member.timescale:.3g} of the run"
        peak_lr = member_config(config, member).train.peak_lr
        fields = "".join(f", {name} = {value}" for name, value in (*member.overrides, *member.changes))
        print(f"{member.name}: λ = {member.weight_decay:.6g}, peak lr·λ = {peak_lr * member.weight_decay:.4g}, {share}{fields}")
    for run in runs:
        state, reason = RunDirectory(workdir / config.name / run.id).state()
        parents = ", ".join(run.parents.values())
        print(f"{run.id}  {state}{f' ({reason})' if reason else ''}" + (f"  ← {parents}" if parents else ""))


COMMANDS = {
    "study": _study,
    "status": _status,
    "prepare": _prepare,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "show": _show,
    "report": _report_command,
    "import": _import,
    "export": _export,
    "generate": _generate,
    "check": _check,
    "config": _config,
}
