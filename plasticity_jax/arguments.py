"""The words of the command line: sub-commands, their flags, and which of them go together. Imports nothing heavy."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes
from plasticity_jax.runs.storage import AnyPath, location

SEVERAL = ("study", "prepare", "pretrain", "finetune", "evaluate", "analyze", "generate")  # commands that run under several processes

_MODEL = "directory of a finished pretrain, finetune or import run, or a Hugging Face folder"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def _place(text: str) -> AnyPath:
    try:
        return location(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    program = _Parser(prog="plasticity", description="What does a pretraining hyperparameter do to what a language model can still learn?")
    commands = program.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, does: str, *, config: bool = True, workdir: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        if config:
            sub.add_argument(
                "--config",
                type=Path,
                required=True,
                metavar="C",
                help="Python config file, or the config.json of a run; --config.a.b=value overrides one of its keys",
            )
        if workdir:
            sub.add_argument("--workdir", type=_place, required=True, metavar="W", help="folder that holds the studies")
        sub.set_defaults(takes_config=config)
        return sub

    study = command("study", "the whole graph; run again, it does only what is missing")
    study.add_argument("--stages", metavar="A,B", help="only these stages, comma-separated")
    study.add_argument("--dry-run", action="store_true", help="print the graph and do nothing")
    status = command("status", "every run: done, running, failed, diverged, stale or missing", config=False)
    status.add_argument("--json", action="store_true", help="one JSON object on standard output")
    command("prepare", "corpus, tokenizer, token records, task and probe files")
    pretrain = command("pretrain", "pretrain the members of the grid, or one of them")
    pretrain.add_argument("--member", metavar="NAME", help="only this member, such as wd0.1")
    finetune = command("finetune", "fine-tune a pretrained model on a task")
    finetune.add_argument("--base", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=_MODEL)
    finetune.add_argument("--task", required=True, metavar="T")
    finetune.add_argument("--seed", type=int, metavar="S", help="of the order of the rows; the config's first otherwise")
    finetune.add_argument("--member", metavar="NAME", help="whose recipe to follow, where the grid sweeps fields of the fine-tuning")
    evaluate = command("evaluate", "generate answers to a task's test rows and grade them")
    evaluate.add_argument("--model", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=_MODEL)
    evaluate.add_argument("--task", required=True, metavar="T")
    analyze = command("analyze", "probes, attention spectra, and the gap between seen and held-out text")
    analyze.add_argument("--model", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=_MODEL)
    analyze.add_argument("--only", metavar="A,B", help="some of probe,spectra,gap")
    show = command("show", "read completions, by member, task and verdict", config=False)
    show.add_argument("--member", metavar="NAME", help="such as wd0.1")
    show.add_argument("--weight-decay", type=float, metavar="X", help="of the pretraining")
    show.add_argument("--task", metavar="T")
    show.add_argument("--when", choices=("before", "after"), help="fine-tuning")
    show.add_argument("--verdict", choices=("right", "wrong", "no answer", "timed out"))
    show.add_argument("--id", metavar="ID", help="of a problem")
    show.add_argument("--samples", action="store_true", help="the sampled completions too, not only the greedy ones")
    show.add_argument("--limit", type=int, default=10, metavar="N", help="completions to show (10); 0 shows all")
    show.add_argument("--json", action="store_true", help="one JSON object per completion and line")
    command("report", "write <workdir>/<study>/report/index.html, figures and tables", config=False)
    check = command("check", "compile the train step for hardware that need not be here: does it fit, and what does the grid take?", workdir=False)
    check.add_argument("--topology", required=True, metavar="T", help="such as v5e:4x4, v5p:4x4x4, h100:8, cpu:8")
    check.add_argument("--search", action="store_true", help="look for the largest microbatch and the lightest remat that fit (at most 6 compiles)")
    check.add_argument("--mfu", type=float, metavar="SHARE", help="of the devices' peak FLOP/s; launch.mfu otherwise")
    check.add_argument("--json", action="store_true", help="one JSON object on standard output")
    config = command("config", "print a config as JSON, with the overrides applied", workdir=False)
    config.add_argument("--explain", action="store_true", help="each field with its meaning, and whether it is an execution field")
    hf_import = command("import", "turn a Hugging Face folder into a run that the other commands take", config=False, workdir=False)
    hf_import.add_argument(
        "--hf", type=_place, required=True, metavar="DIR", help="folder with config.json and safetensors, as save_pretrained writes it"
    )
    hf_import.add_argument("--out", type=_place, required=True, metavar="RUN_DIR", help="directory of the run; missing or empty")
    export = command("export", "turn a run into a Hugging Face folder that transformers loads", config=False, workdir=False)
    export.add_argument("--model", type=_place, required=True, metavar="RUN_DIR", help="directory of a finished pretrain, finetune or import run")
    export.add_argument("--out", type=_place, required=True, metavar="DIR", help="the folder to write; missing or empty")
    export.add_argument("--dtype", metavar="D", help=f"{', '.join(EXPORT_DTYPES)}; otherwise that of an import's source, and float32 for other runs")
    generate = command("generate", "continue a prompt", config=False, workdir=False)
    generate.add_argument("--model", type=_place, required=True, metavar="RUN_OR_HF_DIR", help=_MODEL)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most likely token")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0 from all")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens that hold this probability")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="of tokens that are there already; 1 is none")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    for name in SEVERAL:
        together = commands.choices[name].add_argument_group("several processes, started by hand (Cloud TPU and SLURM need none of these)")
        together.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 is reached by all")
        together.add_argument("--num-processes", type=int, metavar="N")
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
    if arguments.command not in SEVERAL or getattr(arguments, "dry_run", False):
        return False
    address, n, i = arguments.coordinator, arguments.num_processes, arguments.process_id
    if address is None and n is None and i is None:
        return processes.detected()
    if None in (address, n, i):
        raise UserError(f"--coordinator={address}, --num-processes={n} and --process-id={i} go together; give all three, or none.")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address} must be HOST:PORT of process 0, such as 10.0.0.1:8476.")
    if n < 1 or not 0 <= i < n:
        raise UserError(f"--process-id={i} must lie between 0 and --num-processes - 1 = {n - 1}.")
    return n > 1
