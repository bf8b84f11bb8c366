"""The training loop, for pretraining and fine-tuning, for one model and for the members of a grid as one program.

Every model in the loop has a `Track`: its log, its checkpoints, and how it ended. Nothing in the loop waits for the device: the metrics of a step are
read after the next step is dispatched, unless a held-out loss or a checkpoint is due.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints, keep_last
from plasticity_jax.parallel import arrays, preemption, processes
from plasticity_jax.progress import Progress
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.runs.logs import METRICS, MetricsLog, read_log
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.profile import StepProfile
from plasticity_jax.train.step import Batch, Hyper, Metrics, State

KEPT = 2  # latest checkpoints while a training goes on: if one is damaged, or a kill falls between those of two members, there is another before it
TAIL_STEPS = 20  # last steps, which are all logged; their mean is the training loss of a run


@dataclass(frozen=True)
class LoopSettings:
    """Length of the loop, and intervals of its actions.

    Attributes:
      steps: total number of updates.
      log_every, checkpoint_every: in steps.
      keep_steps: steps whose checkpoints are kept beside the latest.
      eval_every: steps between held-out losses; None for none.
      max_loss: in nats per token; a model whose loss is higher, or not finite, has diverged.
      total_tokens: total number of targets per model, for the progress bar.
      profile_steps: the first and the last step to record (see `profile.StepProfile`); None for none.
      tracker: where the logged numbers go besides (see `runs.tracker`).
      peak_tokens_per_second: of the devices at their peak FLOP/s, for the model FLOPs utilization (MFU) of the log; None where it is not known.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    eval_every: int | None
    max_loss: float
    total_tokens: int
    tracker: str
    keep_steps: tuple[int, ...] = ()
    profile_steps: tuple[int, int] | None = None
    peak_tokens_per_second: float | None = None


@dataclass
class Track:
    """Progress of one model in the loop. With several processes, the first keeps its log, and all save its checkpoints together.

    Attributes:
      directory: of its run.
      diverged: the reason, or None.
      tokens: number of targets trained on.
      seconds: training time over all resumes, without held-out losses, saving and compilation; members of one program share its time equally.
    """

    directory: AnyPath
    diverged: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    checkpoints: Checkpoints | None = field(init=False, default=None)
    log: MetricsLog | None = field(init=False, default=None)

    def __post_init__(self):
        # A diverged member saves no more checkpoints, so a file records its end until the run is finished.
        self.diverged = processes.broadcast(self._noted)

    def _noted(self) -> str | None:
        if not (self.directory / _DIVERGED).is_file():
            return None
        reason = read_json(self.directory / _DIVERGED).get("reason")
        if not isinstance(reason, str) or not self.rows():
            raise UserError(f"{self.directory} holds no reason or no log of its divergence; delete it and run again, which makes it anew.")
        return reason

    def begin(self, step: int, *, keep_steps: tuple[int, ...], tracker: str) -> None:
        """Opens the log and the checkpoints as of `step`."""
        if processes.primary():
            self.log = MetricsLog(self.directory, step=step, tracker=tracker)
            if rows := self.rows():
                self.tokens, self.seconds = rows[-1]["tokens"], rows[-1]["seconds"]
        self.checkpoints = Checkpoints(self.directory / CHECKPOINTS, keep=KEPT, keep_steps=keep_steps, asynchronous=True)

    def rows(self) -> list[dict]:
        """All logged rows."""
        return read_log(self.directory / METRICS)

    def train_loss(self) -> float | None:
        """Mean training loss of the last `TAIL_STEPS` logged steps; None before the first."""
        losses = [float(row["loss"]) for row in self.rows()][-TAIL_STEPS:]
        return sum(losses) / len(losses) if losses else None

    def stop(self, reason: str) -> None:
        """Marks the model as diverged."""
        self.diverged = reason
        if processes.primary():
            write_json(self.directory / _DIVERGED, {"reason": reason})

    def finish(self, keep_steps: tuple[int, ...]) -> None:
        """Leaves the last checkpoint, and those to keep, of a training that is over."""
        if self.checkpoints is not None:
            self.checkpoints.wait()
            if processes.primary():
                keep_last(self.directory / CHECKPOINTS, keep_steps)

    def close(self) -> None:
        """Waits for a checkpoint in flight."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        if self.log is not None:
            self.log.close(hurry=preemption.requested())


_DIVERGED = "diverged.json"


def train(
    what: str,
    state: State,
    *,
    train_step: Callable[[State, Batch, Hyper], tuple[State, Metrics]],
    hyper: Hyper,
    batches: Iterator[Batch],
    tracks: Sequence[Track],
    members: bool,
    settings: LoopSettings,
    held_out: Callable[[Any], dict] | None,
) -> State:
    """Trains from the state's step to `settings.steps`, or until every model has diverged.

    Args:
      what: label of the progress bar.
      state: after `state["step"]` updates; donated.
      batches: from that step on.
      tracks: of the models, in the order of the member axis; opened and closed here, but for those that have diverged before. They hold `diverged`,
        `tokens` and `seconds` at the end.
      members: the state, hyperparameters and metrics have a leading member axis.
      held_out: params of one model → metrics for its log, every `settings.eval_every` steps and at the end.
    Returns:
      The last state.
    Raises:
      Preempted: after SIGTERM or Ctrl-C; the step in progress is saved.
    """
    start = int(np.asarray(state["step"]).reshape(-1)[0])
    with contextlib.ExitStack() as stack:
        save_and_end = stack.enter_context(preemption.saves_first())
        for track in tracks:
            if not track.diverged:
                stack.callback(track.close)
                track.begin(start, keep_steps=settings.keep_steps, tracker=settings.tracker)
        clock = _Clock()
        progress = stack.enter_context(
            Progress(what, total=settings.total_tokens * len(tracks), unit="tokens", initial=sum(track.tokens for track in tracks), main=True)
        )
        loop = _Loop(tracks, members, settings, held_out, clock, progress)
        profile = StepProfile(settings.profile_steps, tracks[0].directory)
        stack.callback(profile.close)
        shapes = set()
        for done, batch in enumerate(batches, start + 1):
            shape = np.shape(batch["tokens"])
            first = shape not in shapes  # which compiles
            with clock.paused() if first else contextlib.nullcontext(), profile.step(done) as sent:
                state, metrics = train_step(state, batch, hyper)
                sent(metrics)
            shapes.add(shape)
            loop.settle_pending()
            loop.pending = (done, metrics)
            if save_and_end(done):
                loop.last = done
                stack.enter_context(preemption.writing())
            if loop.due(done):
                loop.settle_pending(state)
            if all(track.diverged for track in tracks):
                break
            if loop.last == done:
                raise preemption.Preempted(f"ended by {preemption.name()}, saved at step {done} of {settings.steps}")
        loop.settle_pending(state)
        for track in tracks:
            if not track.diverged:
                track.finish(settings.keep_steps)
    return state


def utilization(track: Track, settings: LoopSettings) -> float | None:
    """Model FLOPs utilization over the training so far: tokens per second as a fraction of what the devices' peak allows. None where it is not known.

    Members of one program share its time, so each of them has the utilization of the program.
    """
    if not settings.peak_tokens_per_second or not track.seconds:
        return None
    return track.tokens / track.seconds / settings.peak_tokens_per_second


class _Clock:
    """Seconds since the last `lap`, without pauses."""

    def __init__(self):
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed

    @contextlib.contextmanager
    def paused(self):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - begin


@dataclass
class _Loop:
    tracks: Sequence[Track]
    members: bool
    settings: LoopSettings
    held_out: Callable[[Any], dict] | None
    clock: _Clock
    progress: Progress
    pending: tuple[int, Metrics] | None = None
    last: int | None = None  # the step at which training ends early, after a signal

    def _checkpoint_due(self, step: int) -> bool:
        return step % self.settings.checkpoint_every == 0 or step in (self.settings.steps, self.last, *self.settings.keep_steps)

    def _held_out_due(self, step: int) -> bool:
        return self.held_out is not None and (step % (self.settings.eval_every or self.settings.steps) == 0 or step == self.settings.steps)

    def _log_due(self, step: int) -> bool:
        return step == 1 or step % self.settings.log_every == 0 or step > self.settings.steps - TAIL_STEPS

    def due(self, step: int) -> bool:
        """Whether a checkpoint or a held-out loss is due, which needs the state."""
        return self._checkpoint_due(step) or self._held_out_due(step)

    def settle_pending(self, state: State | None = None) -> None:
        """Reads the metrics of the pending step: divergence and log, and with its state held-out loss and checkpoint."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        numbers = {name: np.atleast_1d(value) for name, value in arrays.to_host(metrics).items()}
        seconds = self.clock.lap() / len(self.tracks)
        # If something is due, the device is idle; otherwise the next step runs during the following lines.
        with self.clock.paused() if self.due(step) else contextlib.nullcontext():
            for i, track in enumerate(self.tracks):
                if track.diverged:
                    continue
                track.seconds += seconds
                track.tokens += round(float(numbers["tokens"][i]))
                self._settle_one(i, track, step, {name: float(values[i]) for name, values in numbers.items() if name != "tokens"}, state)
            if state is not None and self._checkpoint_due(step):
                self._save(step, state)
        losses = [float(loss) for loss, track in zip(numbers["loss"], self.tracks) if not track.diverged]
        if losses:
            note = f"step {step:,} of {self.settings.steps:,}, loss " + " ".join(f"{loss:.3f}" for loss in losses)
            if self.settings.peak_tokens_per_second:
                note += f", MFU {utilization(self.tracks[0], self.settings):.0%}"
            self.progress.update(round(float(numbers["tokens"].sum())), note=note)

    def _settle_one(self, i: int, track: Track, step: int, numbers: dict[str, float], state: State | None) -> None:
        loss = numbers["loss"]
        if not math.isfinite(loss) or loss > self.settings.max_loss:
            track.stop(f"loss {loss:.4g} at step {step}" + (f", above the limit {self.settings.max_loss:g}" if math.isfinite(loss) else ""))
        due = self.due(step)
        if due or track.diverged or self._log_due(step):
            row = {"tokens": track.tokens, **numbers, "seconds": track.seconds}
            if (mfu := utilization(track, self.settings)) is not None:
                row["mfu"] = mfu
            if self.held_out is not None and state is not None and self._held_out_due(step) and not track.diverged:
                row["held_out"] = self.held_out(self._model(i, state["params"]))
            if track.log is not None:
                track.log.write(step, **row)

    def _save(self, step: int, state: State) -> None:
        alive = [(i, track, track.checkpoints) for i, track in enumerate(self.tracks) if not track.diverged and track.checkpoints is not None]
        # All members' last checkpoints are whole before any member's next one begins: so they always share a step.
        for _, _, checkpoints in alive:
            checkpoints.wait()
        for i, track, checkpoints in alive:
            if track.log is not None:
                track.log.close_part()
            checkpoints.save(step, self._model(i, state["params"]), self._model(i, state["optimizer"]))

    def _model(self, i: int, tree: Any) -> Any:
        return jax.tree.map(lambda x: x[i], tree) if self.members else tree
