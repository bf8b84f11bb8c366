"""Experiment tracking: the logged numbers of a run, sent to Weights & Biases while it trains (`launch.tracker`).

Nothing waits for it: a thread of its own starts the tracked run and sends the numbers. One that fails gives a warning, and training goes on without it.
Whether anything leaves this machine is wandb's own setting: with WANDB_MODE=offline it writes files, which `wandb sync` sends later.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Mapping
from typing import Any

from plasticity_jax.errors import UserError, reason
from plasticity_jax.progress import SHOW_AFTER_SECONDS
from plasticity_jax.runs.jsonfiles import read_json
from plasticity_jax.runs.storage import AnyPath, is_local

log = logging.getLogger("plasticity_jax")

PROJECT = "plasticity_jax"  # unless WANDB_PROJECT names another
START_SECONDS, SEND_SECONDS, HURRIED_SECONDS = 60.0, 30.0, 3.0  # that it may take to start, and to end

_given_up = threading.Event()  # a tracker has failed in this process: it has been said, and later runs do not try again


def check_tracker(name: str) -> None:
    """Refuses a tracker that cannot start here: its package is missing, or it would have to ask for a key. Raises UserError."""
    if name == "none":
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder ./wandb, which wandb itself makes, is found too
        raise UserError("launch.tracker=wandb needs the package wandb, which is not installed; run: pip install 'plasticity_jax[tracker]'")
    try:
        wandb = _quiet_wandb()
        ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise UserError(
            f"launch.tracker=wandb cannot start ({reason(error)}); mend that, or set WANDB_MODE=offline or launch.tracker=none."
        ) from error
    if not ready:
        raise UserError("launch.tracker=wandb has no API key here; run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline to write files only.")


def tracked_id(directory: AnyPath) -> str:
    """The id of a run at the tracker: the same whenever the run resumes, because it is made from the path of the run's directory."""
    place = str(directory.resolve()) if is_local(directory) else str(directory)
    return hashlib.sha256(place.encode()).hexdigest()[:16]


class Tracker:
    """Sends the numbers of one run to Weights & Biases.

    The tracked run is called like the run and grouped by study; its config holds the run's fields. wandb's own files lie in `<study>/wandb`, or where
    WANDB_DIR says; those of a study on a store in the current folder.

    Args:
      directory: of the run, with its config.json.
    """

    def __init__(self, directory: AnyPath):
        self._directory = directory
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hands on the numbers of a step, by name."""
        self._waiting.put((step, numbers))

    def flush(self) -> None:
        """Nothing: what was handed on is on its way."""

    def close(self, *, hurry: bool) -> None:
        """Sends what is left, for a limited time."""
        self._waiting.put(None)
        seconds = 0.0 if _given_up.is_set() else HURRIED_SECONDS if hurry else START_SECONDS + SEND_SECONDS
        self._thread.join(min(seconds, SHOW_AFTER_SECONDS))
        if self._thread.is_alive() and seconds > SHOW_AFTER_SECONDS and not _given_up.is_set():
            log.info("waiting up to %.0f s for wandb to take the last numbers", seconds)
            self._thread.join(seconds)
        if self._thread.is_alive():
            _give_up(f"it has not ended within {seconds:.0f} s")

    def _work(self) -> None:
        if _given_up.is_set():
            return
        try:
            tracked = self._start()
            if not tracked.disabled:
                log.info("%s is tracked: %s", tracked.name, tracked.url or f"wandb sync {os.path.dirname(tracked.dir)} sends it")
            while (given := self._waiting.get()) is not None:
                step, numbers = given
                tracked.log(dict(numbers), step=step)
            tracked.finish()
        except BaseException as error:  # some libraries end their threads by SystemExit
            _give_up(reason(error))

    def _start(self) -> Any:
        wandb = _quiet_wandb()
        run = read_json(self._directory / "config.json")["run"]
        study = self._directory.parent.parent
        own_folder = is_local(study) and "WANDB_DIR" not in os.environ
        facts = {name: run[name] for name in ("stage", "member", "task", "seed") if run.get(name) is not None}
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run["study"],
            job_type=run["stage"],
            name=run["name"],
            id=tracked_id(self._directory),
            resume="allow",
            reinit="create_new",  # members that train together are runs of one process
            dir=str(study) if own_folder else None,
            config=facts | run["fields"],
            settings=wandb.Settings(console="off", init_timeout=START_SECONDS, finish_timeout=SEND_SECONDS),
        )


def _quiet_wandb() -> Any:
    """The package, which from then on prints nothing and asks for nothing."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def _give_up(why: str) -> None:
    if not _given_up.is_set():
        _given_up.set()
        with contextlib.suppress(Exception):
            log.warning("launch.tracker=wandb failed (%s); training goes on without it, and metrics.jsonl and TensorBoard have all numbers", why)
