"""Several processes as one run: how they start, and the messages they exchange. Imports jax only when needed."""

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from plasticity_jax.errors import StudyRefused, UserError, reason
from plasticity_jax.parallel import lanes

log = logging.getLogger("plasticity_jax")

HEARTBEAT_TIMEOUT = 25  # seconds without a heartbeat after which jax's coordination service considers a process lost
JOINING, JOINED, LEAVING = "joining: ", "this is process ", "leaving with status "  # prefixes of the lines for the supervising process
_POLL = 10  # seconds that one read waits for a value, short enough to notice an interrupt

# Errors of reading a value from process 0, which stores the values.
_NO_ANSWER = ("Socket closed", "failed to connect to all addresses", "Connection refused", "Connection reset")

_numbers: dict[str, int] = {}  # uses of each name so far; gives every value its own key


def detected() -> bool:
    """Whether jax detects a cluster of several processes (Cloud TPU, SLURM, MPI, Kubernetes)."""
    from jax._src.clusters import ClusterEnv  # jax has no public way to ask without initializing

    for environment in ClusterEnv._cluster_types:
        try:
            if not environment.opt_in_only_method and environment.is_env_present() and environment.get_process_count() > 1:
                return True
        except Exception as error:  # such as an unreachable metadata server, which must not end a run on one machine
            log.warning("jax could not read this machine's cluster environment (%s); continuing as one process", reason(error))
    return False


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, *, timeout: int) -> None:
    """Joins the processes of a run. Call it before any device is used. If all three are None, jax detects them.

    Args:
      coordinator: HOST:PORT of process 0.
      timeout: seconds to wait for the other processes.
    Raises:
      UserError: the coordinator does not answer, or the processes have different numbers of devices.
    """
    import jax

    who = "" if process_id is None else f"process {process_id} of {num_processes}: "
    refusal = (
        f"--coordinator={coordinator}: the {num_processes} processes did not meet within {timeout} s; start all of them with the same address and "
        "number, each with its own --process-id, or raise launch.start_timeout."
        if coordinator
        else f"the processes of this cluster did not meet within {timeout} s; start all of them with the same command, or raise launch.start_timeout."
    )
    _to_supervisor(JOINING + refusal)  # on a timeout the runtime aborts this process before Python can report it
    log.info("%swaiting up to %d s for the other processes%s", who, timeout, f" at {coordinator}" if coordinator else "")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would replace ours
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
        _to_supervisor(f"{JOINED}{index()} of {count()}")
        everyone = _meet(timeout)
    except UserError:
        raise
    except Exception as error:
        raise UserError(refusal.replace("; start", f" ({reason(error)}); start")) from error
    if len({(one["devices"], one["kind"]) for one in everyone}) > 1:
        shown = ", ".join(f"process {i} ({one['host']}) has {one['devices']} x {one['kind']}" for i, one in enumerate(everyone))
        raise UserError(f"unequal hosts: {shown}; give every process the same number and kind of devices.")
    hosts = len({one["host"] for one in everyone})
    log.info("%d hosts, %d processes, %d devices each (%s); this is process %d", hosts, count(), everyone[0]["devices"], everyone[0]["kind"], index())
    if not primary():
        log.info("process 0 reports progress; this process reports only problems")
        log.setLevel(logging.WARNING)


def _meet(timeout: int) -> list[dict[str, Any]]:
    """Returns the host, devices and process count that every process reports, in order. Raises UserError if their counts disagree."""
    import jax

    mine = {
        "host": socket.gethostname(),
        "devices": jax.local_device_count(),
        "kind": jax.local_devices()[0].device_kind,
        "processes": count(),
    }
    _client().key_value_set(f"plasticity/start/{index()}", json.dumps(mine))
    everyone = []
    for i in range(count()):  # in order, to detect a wrong count before waiting for a process that does not exist
        one = json.loads(_read(f"plasticity/start/{i}", timeout))
        if one["processes"] != count():
            raise UserError(
                f"--num-processes={count()} of process {index()} is {one['processes']} for process {i} ({one['host']}); "
                "give every process the same number."
            )
        everyone.append(one)
    return everyone


def _to_supervisor(line: str) -> None:
    os.write(2, f"{line}\n".encode())


def leave(status: int) -> None:
    """Call before a process ends in the middle of a run. Process 0 serves the messages, so it waits until the others have read them.

    Args:
      status: the exit status to come. The supervising process reports it even if the runtime aborts this process first, because process 0 is gone.
    """
    if count() == 1:
        return
    _to_supervisor(f"{LEAVING}{status}")
    try:
        _client().key_value_set(f"plasticity/leave/{index()}", "")
        if primary():
            for i in range(count()):
                _client().blocking_key_value_get(f"plasticity/leave/{i}", _POLL * 1000)
    except Exception as error:
        log.debug("some processes ended without notice: %s", reason(error))


def _client() -> Any:
    from jax._src.distributed import global_state  # jax has no public access to the coordination service's key-value store

    return global_state.client


def total() -> int:
    """Number of processes of this run, in all lanes."""
    if "jax" not in sys.modules or _client() is None:
        return 1
    from jax._src.distributed import global_state

    return global_state.num_processes


def count() -> int:
    """Number of processes of this run, or of this thread's lane."""
    lane = lanes.active()
    return total() if lane is None else len(lane.ranks)


def index() -> int:
    """Number of this process among them, from 0."""
    if count() == 1:
        return 0
    from jax._src.distributed import global_state

    lane = lanes.active()
    return global_state.process_id if lane is None else lane.ranks.index(global_state.process_id)


def primary() -> bool:
    """Whether this is process 0, which makes decisions and writes text files. True in a single-process run."""
    return index() == 0


# ------------------------------------------------------------------------------------------------------------------- messages


def _key(name: str) -> str:
    lane = lanes.active()
    name = name if lane is None else f"lane{lane.index}/{name}"
    _numbers[name] = _numbers.get(name, 0) + 1
    return f"plasticity/{name}/{_numbers[name]}"


def _read(key: str, timeout: float | None) -> str:
    """Waits for a key and returns its value; without a limit if `timeout` is None. Raises Disconnected if process 0 is gone."""
    waited = 0
    while True:
        try:
            return _client().blocking_key_value_get(key, _POLL * 1000)
        except Exception as error:
            if any(words in str(error) for words in _NO_ANSWER):
                raise Disconnected(f"process 0 of {count()} was lost") from error
            waited += _POLL
            if "DEADLINE_EXCEEDED" not in str(error) or (timeout is not None and waited >= timeout):
                raise


class Failed(Exception):
    """Another process of the run failed, for the reason given."""


class Disconnected(Exception):
    """This process must end: it failed while the others continue, or process 0 is gone."""


def broadcast(decide: Callable[[], Any]) -> Any:
    """Calls `decide()` on process 0 and returns its JSON value on every process. It may take hours: the others wait without using a device.

    Raises:
      UserError: `decide` raised it; every process raises it with the same message.
      Failed: on the other processes, if `decide` raised another exception.
    """
    if count() == 1:
        return decide()
    key = _key("broadcast")
    if not primary():
        return outcome_of(json.loads(_read(key, None)))
    try:
        value = decide()
    except Exception as error:
        _client().key_value_set(key, json.dumps(as_message(error)))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def together(work: Callable[[], Any], *, patient: bool = False) -> Any:
    """Calls `work()` on every process and returns its value. If it fails on one process, it fails on all.

    Args:
      patient: the others' work does not wait for this process where it fails here, so that their answer is waited for without limit.
    Raises:
      UserError, Failed: the error of the first process that failed.
      Disconnected: `work` failed here, and the others do not answer because their `work` waits for this process.
    """
    if count() == 1:
        return work()
    value, own = None, None
    try:
        value = work()
    except Exception as error:
        own = error
    try:
        everyone = gather(
            "together", {"value": None} if own is None else as_message(own), timeout=None if own is None or patient else HEARTBEAT_TIMEOUT + 15
        )
    except Exception as error:
        if own is None or isinstance(error, Disconnected):
            raise
        raise Disconnected(f"process {index()} of {count()} failed: {reason(own)}") from own
    for i, message in enumerate(everyone):
        if i == index() and own is not None:
            raise own
        outcome_of(message)
    return value


def as_message(error: Exception) -> dict[str, str]:
    """An error as JSON, which `outcome_of` raises again in another process."""
    if isinstance(error, UserError):
        return {"ends study" if isinstance(error, StudyRefused) else "refused": str(error)}
    return {"failed": reason(error)}


def outcome_of(message: dict[str, Any]) -> Any:
    """The value that another process sent. Raises its error: StudyRefused or UserError with the same words, or Failed."""
    if "ends study" in message:
        raise StudyRefused(message["ends study"])
    if "refused" in message:
        raise UserError(message["refused"])
    if "failed" in message:
        raise Failed(message["failed"])
    return message["value"]


def first_wins(name: str) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """A JSON value that any process may set once: (sets it unless another has, reads it without waiting, None while nobody has)."""
    key = _key(name)

    def propose(value: Any) -> None:
        try:
            _client().key_value_set(key, json.dumps(value))
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def read() -> Any:
        found = _try_read(key)
        return None if found is None else json.loads(found)

    return propose, read


def _try_read(key: str) -> str | None:
    """The value of a key; None while nobody has set it. Does not wait."""
    try:
        return _client().key_value_try_get(key)
    except Exception as error:
        if "NOT_FOUND" not in str(error):
            raise
    return None


def raise_flag(name: str) -> None:
    """Raises a flag that every process of the run sees, whatever its lane."""
    _client().key_value_set(f"plasticity/flag/{name}", "", allow_overwrite=True)


def flag_raised(name: str) -> bool:
    """Whether any process has raised the flag. Does not wait."""
    return _try_read(f"plasticity/flag/{name}") is not None


def gather(name: str, value: Any, *, timeout: float | None = None) -> list[Any]:
    """Returns the JSON values of all processes, in process order, on every process."""
    if count() == 1:
        return [value]
    key = _key(name)
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(_read(f"{key}/{i}", timeout)) for i in range(count())]
