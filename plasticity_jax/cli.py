"""The program `plasticity`: from words to a command, from errors to one line and an exit status. The commands are in `commands.py`."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from plasticity_jax.arguments import SEVERAL, is_one_of_several, parser, split_overrides
from plasticity_jax.commands import COMMANDS
from plasticity_jax.config import StudyConfig, load_config
from plasticity_jax.errors import UserError
from plasticity_jax.parallel import processes, supervise
from plasticity_jax.parallel.allocator import keep_freed_memory, return_freed_memory
from plasticity_jax.parallel.flags import prepare_backend
from plasticity_jax.runs.storage import is_local

log = logging.getLogger("plasticity_jax")

REFUSED, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 done, 1 a run failed, 2 the input was refused, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    worker = supervise.become_worker()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    for library in ("absl", "asyncio"):  # a failed write raises in our code too; they would add a trace per array
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        rest, overrides = split_overrides(argv)
        arguments = parser().parse_args(rest)
        if overrides and not arguments.takes_config:
            raise UserError(f"plasticity {arguments.command} reads no config; leave out --config.{overrides[0][0]}.")
        if arguments.takes_config:
            arguments.config = load_config(arguments.config, overrides)
        config = arguments.config if arguments.takes_config else StudyConfig()
        if arguments.command in SEVERAL:
            prepare_backend(config.launch.compile_cache)
        several = is_one_of_several(arguments)
        if several and not worker:
            return supervise.supervise(argv, _log_folder(arguments))
        signal.signal(signal.SIGTERM, _interrupt)
        if arguments.command in ("import", "export"):
            return_freed_memory()
        elif arguments.command not in ("status", "show", "report"):
            keep_freed_memory()
        if several:
            processes.start(arguments.coordinator, arguments.num_processes, arguments.process_id, timeout=config.launch.start_timeout)
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"plasticity: {error}", file=sys.stderr)
        return REFUSED
    except processes.Parted as error:
        print(f"plasticity: {error}; run the same commands again: they resume.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("plasticity: interrupted; the same command resumes.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        from plasticity_jax.study.execute import storage_problem

        problem = storage_problem(error)
        if problem is None:
            raise
        where = f"--workdir={arguments.workdir}" if "workdir" in arguments else f"--out={arguments.out}"
        print(f"plasticity: {where}: {problem}; make room or give another, then run again: it resumes.", file=sys.stderr)
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
    if status == REFUSED or (status and processes.count() > 1):
        # Orbax would print a trace for every array that was still to be read or written, and jax would wait for processes that wait for this one; all
        # that is to be said has been.
        processes.leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _interrupt(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to a worker and to its parent, which passes it on
    raise KeyboardInterrupt


def _log_folder(arguments) -> Path | None:
    """Where the runtimes of the processes write; None where the command has no local folder."""
    if "workdir" not in arguments or not is_local(arguments.workdir):
        return None
    return arguments.workdir / arguments.config.name / "logs"
