#!/usr/bin/env python3
"""Pretrains the members of a grid side by side on this machine, one GPU each.

launch/local/members.py [--dry-run] --gpus 0,1,2,3 --config C --workdir W [--config.a.b=value ...]

Prepares the data first; then every free GPU takes the next member. If a member fails, the others continue. The log of each member is
W/<study>/logs/<member>.log. Afterwards `plasticity study` with the same config runs the rest of the study. A second call runs only missing members.
Use it if one model fits on one GPU: members never wait for each other. Run it with the Python of the environment that has plasticity_jax.
"""

import argparse
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from plasticity_jax.config import grid_members, load_config
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.runs.storage import is_local, location

log = logging.getLogger("plasticity_jax")


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise UserError(f"{message} (see members.py --help)")

    parser = Parser(prog="members.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--gpus", required=True, metavar="0,1", help="numbers of the GPUs to use")
    parser.add_argument("--config", type=Path, required=True, metavar="C", help="config of the study; --config.a.b=value overrides one of its keys")
    parser.add_argument("--workdir", required=True, metavar="W", help="folder that holds the studies, on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    arguments, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if not re.match(r"--config\.[^=]+=", word):
            raise UserError(f"{word} is not an option; write overrides as --config.a.b=value (see members.py --help).")
    if not re.fullmatch(r"\d+(,\d+)*", arguments.gpus):
        raise UserError(f"--gpus={arguments.gpus} must be numbers separated by commas, such as 0,1,2,3.")
    arguments.workdir = location(arguments.workdir)
    if not is_local(arguments.workdir):
        raise UserError(f"--workdir={arguments.workdir} must be a local folder: it holds the logs of the members.")
    return arguments, overrides


def _start(command: list[str], gpu: str, log_file: Path) -> subprocess.Popen:
    with open(log_file, "ab") as file:
        return subprocess.Popen(command, env=_environment(gpu), stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _environment(gpu: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpu}


def _side_by_side(commands: dict[str, list[str]], gpus: list[str], logs: Path) -> list[str]:
    """Runs the commands, one per GPU at a time. Returns the names of those that failed. An interrupt ends all running commands."""
    waiting, running, failed = list(commands), {}, []
    with Progress("pretrain", total=len(commands), unit="members") as progress:
        try:
            while waiting or running:
                for gpu in [gpu for gpu in gpus if gpu not in running][: len(waiting)]:
                    name = waiting.pop(0)
                    running[gpu] = name, _start(commands[name], gpu, logs / f"{name}.log")
                    log.info("%s on GPU %s: %s", name, gpu, logs / f"{name}.log")
                time.sleep(0.2)
                for gpu, (name, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[gpu]
                    if process.returncode:
                        failed.append(name)
                        log.error("%s ended with status %d: %s", name, process.returncode, logs / f"{name}.log")
                    progress.update(1)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return failed


def _interrupt(number, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Pretrains all members. Returns 0, 1 if one failed, 2 if the input was refused, 130 if interrupted, or the status of a failed preparation."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        arguments, overrides = _arguments(argv)
        config = load_config(arguments.config, [tuple(word.removeprefix("--config.").split("=", 1)) for word in overrides])
    except UserError as error:
        print(f"members.py: {error}", file=sys.stderr)
        return 2
    gpus = list(dict.fromkeys(arguments.gpus.split(",")))
    given = ["--config", str(arguments.config), *overrides, "--workdir", str(arguments.workdir)]
    prepare = [sys.executable, "-m", "plasticity_jax", "study", *given, "--stages", "prepare,init"]
    members = {m.base: [sys.executable, "-m", "plasticity_jax", "pretrain", *given, "--member", m.base] for m in grid_members(config)}
    if arguments.dry_run:
        print(shlex.join(["env", f"CUDA_VISIBLE_DEVICES={gpus[0]}", *prepare]))
        for number, command in enumerate(members.values()):
            print(shlex.join(["env", f"CUDA_VISIBLE_DEVICES={gpus[number] if number < len(gpus) else '<first free GPU>'}", *command]))
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = subprocess.run(prepare, env=_environment(gpus[0])).returncode
        if status:
            return status
        logs = arguments.workdir / config.name / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return 1 if _side_by_side(members, gpus, logs) else 0
    except KeyboardInterrupt:
        print("members.py: interrupted; the same command resumes.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
