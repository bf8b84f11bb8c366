"""A trace of some training steps, and of the memory after them, for TensorBoard, Perfetto and pprof."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

from plasticity_jax.runs.storage import AnyPath, is_local

log = logging.getLogger("plasticity_jax")

PROFILE = "profile"  # folder in a run's directory


class StepProfile:
    """Records the steps from `first` to `last` on this process.

    A run that resumes after `first` records none: what it leaves would look like the whole.

    Args:
      steps: (first, last); None records nothing.
      directory: of the run; its folder profile/ gets the trace, and memory.prof, which `pprof` reads.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: AnyPath):
        self._steps, self._on = steps, False
        self._folder = directory / PROFILE
        if steps is not None and not is_local(directory):
            log.warning("train.profile_steps: %s is not on a local disk; nothing is recorded", directory)
            self._steps = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """The block sends one step to the devices, and hands what it returns to the function given, which is waited for after the last step."""
        if self._steps is not None and number == self._steps[0]:
            self._begin()
        if not self._on:
            yield lambda result: None
            return
        sent = []
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield sent.append
        if self._steps is not None and number == self._steps[1]:
            jax.block_until_ready(sent)
            self.close()
            jax.profiler.save_device_memory_profile(str(self._folder / "memory.prof"))
            log.info(
                "steps %d to %d recorded in %s: tensorboard --logdir %s, or open its trace in Perfetto", *self._steps, self._folder, self._folder
            )

    def _begin(self) -> None:
        try:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        except RuntimeError as error:  # a process has one profiler, and another training may be using it
            log.warning("train.profile_steps: nothing is recorded (%s)", error)

    def close(self) -> None:
        """Ends the recording, if one runs."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
