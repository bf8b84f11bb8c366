"""Lanes: equal parts of the devices in which runs proceed side by side, each part with the processes that own its devices. Imports jax only when needed.

While a lane is active in a thread, everything there works as if its devices were all and its processes were the run's: meshes, `processes`, checkpoints.
"""

import contextlib
import contextvars
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax import progress
from plasticity_jax.errors import UserError
from plasticity_jax.parallel.threads import Threads

log = logging.getLogger("plasticity_jax")

_active: contextvars.ContextVar["Lane | None"] = contextvars.ContextVar("lane", default=None)


@dataclass(frozen=True)
class Lane:
    """A part of the devices.

    Attributes:
      index: of the lane, from 0.
      devices: its devices.
      ranks: the processes that own them, ascending.
    """

    index: int
    devices: tuple[Any, ...]
    ranks: tuple[int, ...]

    @property
    def here(self) -> bool:
        """Whether this process owns devices of the lane."""
        import jax

        return jax.process_index() in self.ranks

    @property
    def first(self) -> bool:
        """Whether this process is the first of the lane, which decides and writes."""
        import jax

        return jax.process_index() == self.ranks[0]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes it the lane of this thread while the block runs. A process without devices in it can only ask what it is like."""
        import jax

        own = next((device for device in self.devices if device.process_index == jax.process_index()), None)
        token = _active.set(self)
        try:
            with contextlib.nullcontext() if own is None else jax.default_device(own):
                yield
        finally:
            _active.reset(token)


def active() -> Lane | None:
    """The lane of this thread; None where work has all devices."""
    return _active.get()


def devices() -> list[Any]:
    """All devices, or those of this thread's lane."""
    import jax

    lane = active()
    return jax.devices() if lane is None else list(lane.devices)


def local_device() -> Any:
    """The first of them that this process owns."""
    import jax

    return next(device for device in devices() if device.process_index == jax.process_index())


def divided(devices: Sequence[Any], number: int) -> list[list[Any]]:
    """Devices in equal parts, those of a process side by side. Raises UserError if they cannot be divided."""
    size, rest = divmod(len(devices), number)
    if rest:
        raise UserError(f"launch.parallel_runs={number} does not divide the {len(devices)} devices; set it to a divisor of {len(devices)}.")
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def split(number: int) -> list[Lane]:
    """The devices in equal lanes, each of whole processes or within one.

    Raises:
      UserError: they cannot be split so.
    """
    import jax

    parts = divided(jax.devices(), number)
    lanes = [Lane(index, tuple(part), tuple(sorted({device.process_index for device in part}))) for index, part in enumerate(parts)]
    size, owned = len(parts[0]), jax.local_device_count()
    if size % owned and owned % size:
        raise UserError(
            f"launch.parallel_runs={number} gives {size} devices to each run, which cuts processes of {owned} devices; choose it so that a run gets "
            "whole processes, or equal parts of one."
        )
    return lanes


# ----------------------------------------------------------------------------------------------------------------------- side by side


class _Stop:
    """Tells the threads of a process to end."""

    def __init__(self):
        self.asked = threading.Event()
        self._in_order = False

    def ask(self, *, in_order: bool) -> None:
        """Args:
        in_order: trainings that are about to save after SIGTERM may do so.
        """
        self._in_order = in_order
        self.asked.set()

    def check(self) -> None:
        """Raises KeyboardInterrupt in the thread that must end."""
        from plasticity_jax.parallel import preemption

        if self.asked.is_set() and active() is not None and not (self._in_order and preemption.is_saving()):
            raise KeyboardInterrupt


def side_by_side(lanes: Sequence[Lane], work: Callable[[Lane], None]) -> None:
    """Calls `work` once per lane of this process, each in a thread of its own; with a single lane in this thread.

    Raises:
      The first error of any of them, once all have ended; the others are told to end at the next report of their progress.
    """
    here = [lane for lane in lanes if lane.here]

    def in_lane(lane: Lane) -> None:
        with lane.active():
            work(lane)

    if len(here) == 1:
        in_lane(here[0])
        return
    from plasticity_jax.parallel import preemption

    stop, errors = _Stop(), []

    def guarded(lane: Lane) -> None:
        try:
            in_lane(lane)
        except BaseException as error:
            errors.append(error)
            stop.ask(in_order=True)

    progress.checks.append(stop.check)
    try:
        threads = Threads({f"lane {lane.index}": functools.partial(guarded, lane) for lane in here})
        try:
            threads.wait()
        except KeyboardInterrupt as interrupt:
            stop.ask(in_order=False)
            threads.wait()
            raise next((error for error in errors if isinstance(error, preemption.Preempted)), interrupt) from None
    finally:
        progress.checks.remove(stop.check)
    if errors:
        raise errors[0]
