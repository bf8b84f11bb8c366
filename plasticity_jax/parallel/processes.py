"""Several processes as one run: how they start, and what they exchange. jax is imported only when it is needed."""

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from plasticity_jax.errors import UserError, reason

log = logging.getLogger("plasticity_jax")

HEARTBEAT_TIMEOUT = 25  # seconds without a sign of life after which jax's coordination service counts a process as lost
JOINING, JOINED = "joining: ", "this is process "  # begin the lines for the process that supervises this one
_POLL = 10  # seconds that one read of a value not yet written waits, so that an interrupt is noticed

_NO_ANSWER = ("Socket closed", "failed to connect to all addresses", "Connection refused", "Connection reset")  # of process 0, which keeps the values

_numbers: dict[str, int] = {}  # how often each name was used, so that every value has a key of its own


def detected() -> bool:
    """Whether jax knows this environment (Cloud TPU, SLURM, MPI, Kubernetes) as one of several processes."""
    from jax._src.clusters import ClusterEnv  # jax names no public way to ask without starting

    for environment in ClusterEnv._cluster_types:
        try:
            if not environment.opt_in_only_method and environment.is_env_present() and environment.get_process_count() > 1:
                return True
        except Exception as error:  # such as a metadata server that does not answer; asking must not end a run on one machine
            log.warning("jax could not read this machine's cluster environment (%s); continuing as one process", reason(error))
    return False


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, *, timeout: int) -> None:
    """Joins the processes of a run, before any device is used; None leaves all three to jax.

    Args:
      coordinator: HOST:PORT of process 0.
      timeout: seconds that processes wait for one another.
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
    _to_supervisor(JOINING + refusal)  # on a time-out the runtime ends this process before Python can say it
    log.info("%swaiting up to %d s for the other processes%s", who, timeout, f" at {coordinator}" if coordinator else "")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would take the place of ours
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
        everyone = _meet(timeout)
    except UserError:
        raise
    except Exception as error:
        raise UserError(refusal.replace("; start", f" ({reason(error)}); start")) from error
    if len({(one["devices"], one["kind"]) for one in everyone}) > 1:
        shown = ", ".join(f"process {i} ({one['host']}) has {one['devices']} x {one['kind']}" for i, one in enumerate(everyone))
        raise UserError(f"unequal hosts: {shown}; give every process the same number and kind of devices.")
    _to_supervisor(f"{JOINED}{index()} of {count()}")
    hosts = len({one["host"] for one in everyone})
    log.info("%d hosts, %d processes, %d devices each (%s); this is process %d", hosts, count(), everyone[0]["devices"], everyone[0]["kind"], index())
    if not primary():
        log.info("process 0 shows the progress of all; this one speaks of problems only")
        log.setLevel(logging.WARNING)


def _meet(timeout: int) -> list[dict[str, Any]]:
    """Host, devices and number of processes of every process, in order. Raises UserError if they disagree on the number of processes."""
    import jax

    mine = {
        "host": socket.gethostname(),
        "devices": jax.local_device_count(),
        "kind": jax.local_devices()[0].device_kind,
        "processes": count(),
    }
    _client().key_value_set(f"plasticity/start/{index()}", json.dumps(mine))
    everyone = []
    for i in range(count()):  # in order, so that a wrong number is seen before waiting for a process that will not come
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


def leave() -> None:
    """Call before a process ends in the middle of a run: process 0 waits until the others have read its messages, which it serves."""
    if count() == 1:
        return
    try:
        _client().key_value_set(f"plasticity/leave/{index()}", "")
        if primary():
            for i in range(count()):
                _client().blocking_key_value_get(f"plasticity/leave/{i}", _POLL * 1000)
    except Exception as error:
        log.debug("some processes did not say that they leave: %s", reason(error))


def _client() -> Any:
    from jax._src.distributed import global_state  # jax has no public access to the coordination service's key-value store

    return global_state.client


def count() -> int:
    """Number of processes of this run."""
    if "jax" not in sys.modules or _client() is None:
        return 1
    from jax._src.distributed import global_state

    return global_state.num_processes


def index() -> int:
    """Number of this process, from 0."""
    if count() == 1:
        return 0
    from jax._src.distributed import global_state

    return global_state.process_id


def primary() -> bool:
    """Whether this process decides and writes text files; true of the only one."""
    return index() == 0


# ------------------------------------------------------------------------------------------------------------------- messages


def _key(name: str) -> str:
    _numbers[name] = _numbers.get(name, 0) + 1
    return f"plasticity/{name}/{_numbers[name]}"


def _read(key: str, timeout: float | None) -> str:
    """The value of a key, once some process has written it; waits without end if `timeout` is None. Raises Disconnected where process 0 is gone."""
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
    """What another process of the run failed with."""


class Disconnected(Exception):
    """This process has to end: it failed while the others continue, or process 0 is gone."""


def broadcast(decide: Callable[[], Any]) -> Any:
    """What `decide()` gives on process 0, on every process: a JSON value. It may take hours: the others wait without a device.

    Raises:
      UserError: raised by `decide`; on every process, with the same line.
      Failed: on the others, where `decide` raised something else.
    """
    if count() == 1:
        return decide()
    key = _key("broadcast")
    if not primary():
        return _outcome(json.loads(_read(key, None)))
    try:
        value = decide()
    except Exception as error:
        _client().key_value_set(key, json.dumps(_as_message(error)))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def together(work: Callable[[], Any]) -> Any:
    """`work()` on every process at once; where it fails on one, it fails on all.

    Raises:
      UserError, Failed: what the first process that failed said.
      Disconnected: `work` failed here and the others do not answer, for they wait for this process in the middle of theirs.
    """
    if count() == 1:
        return work()
    value, own = None, None
    try:
        value = work()
    except Exception as error:
        own = error
    try:
        everyone = gather("together", {"value": None} if own is None else _as_message(own), timeout=None if own is None else HEARTBEAT_TIMEOUT + 15)
    except Exception as error:
        if own is None or isinstance(error, Disconnected):
            raise
        raise Disconnected(f"process {index()} of {count()} failed: {reason(own)}") from own
    for i, message in enumerate(everyone):
        if i == index() and own is not None:
            raise own
        _outcome(message)
    return value


def _as_message(error: Exception) -> dict[str, str]:
    return {"refused": str(error)} if isinstance(error, UserError) else {"failed": reason(error)}


def _outcome(message: dict[str, Any]) -> Any:
    if "refused" in message:
        raise UserError(message["refused"])
    if "failed" in message:
        raise Failed(message["failed"])
    return message["value"]


def gather(name: str, value: Any, *, timeout: float | None = None) -> list[Any]:
    """Every process's JSON value, in their order, on every process."""
    if count() == 1:
        return [value]
    key = _key(name)
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(_read(f"{key}/{i}", timeout)) for i in range(count())]
