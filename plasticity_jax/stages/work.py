"""What the runs of a study compute, for the hours and the time left that commands print, and how many rows of which length they read.

Rows and their lengths are known once `prepare` is done. Before that they are bounded by what the config allows and the sources hold.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from plasticity_jax.config import StudyConfig
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh


@dataclass(frozen=True, kw_only=True)
class Work:
    """A part of what a run computes.

    Attributes:
      flops: model FLOPs, over all devices.
      tokens: that the network reads or writes, padding included; 0 for work on parameters alone.
      bytes: read from the devices' memory, over all devices, where that may take longer than the FLOPs, as in decoding.
      assumes: what is not known and bounded from above, one phrase each, such as "MetaMathQA: 395,000 training rows".
    """

    flops: float
    tokens: int = 0
    bytes: float = 0.0
    assumes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ahead:
    """A run that is to be carried out, for the estimate of its work.

    Attributes:
      config: that the run is carried out with, on the devices of `mesh`.
      finished: id of a run of the study → its directory; None where it is not done, or no workdir is given.
    """

    config: StudyConfig
    run: Run
    mesh: "Mesh | AbstractMesh"
    finished: Callable[[str], AnyPath | None]

    def task(self) -> "TaskRows":
        """The rows of the run's task: those that `prepare` has written, or the most that there can be."""
        from plasticity_jax.data.tasks import get_task
        from plasticity_jax.data.tasks.files import read_summary
        from plasticity_jax.stages.prepare import corpus_run, task_run, task_settings

        name = self.run.task_name
        made, settings = self.finished(task_run(self.config, name).id), task_settings(self.config, name)
        if made is not None:
            corpus = self.finished(corpus_run(self.config).id)
            return TaskRows(name, read_summary(made)["rows"], True, made if corpus is not None else None, corpus)
        train, test = get_task(name, self.config.tasks).published
        most = {"train": min(settings.train_rows, train or settings.train_rows), "test": min(settings.test_rows, test or settings.test_rows)}
        return TaskRows(name, most | {"validation": settings.validation_rows, "verifier": settings.verifier_rows}, False)


@dataclass(frozen=True)
class TaskRows:
    """How many rows a task has, and where they lie.

    Attributes:
      counts: split ("train", "validation", "verifier", "test") → rows.
      exact: whether they are prepared, and not only bounded.
      folder, corpus: of the prepared task, and of the prepared corpus with the tokenizer; None where one of the two is missing.
    """

    name: str
    counts: dict[str, int]
    exact: bool
    folder: AnyPath | None = None
    corpus: AnyPath | None = None

    def assumes(self, split: str) -> tuple[str, ...]:
        called = "training" if split == "train" else split
        return () if self.exact else (f"{self.name}: {self.counts[split]:,} {called} rows",)

    def row_lengths(self, *, max_length: int, too_long: str) -> np.ndarray | None:
        """Tokens of every row to fine-tune on; None where they are not known."""
        return None if self.folder is None else _row_lengths(self.folder, self.corpus, max_length, too_long)

    def prompt_lengths(self, split: str, *, longest: int) -> np.ndarray | None:
        """Tokens of every prompt, at most `longest`; None where they are not known."""
        return None if self.folder is None else np.minimum(_prompt_lengths(self.folder, self.corpus, split), longest)

    def option_lengths(self, split: str) -> np.ndarray | None:
        """Tokens of every prompt with each of its options; None where they are not known."""
        return None if self.folder is None else _option_lengths(self.folder, self.corpus, split)


@functools.lru_cache(maxsize=64)
def _row_lengths(folder: AnyPath, corpus: AnyPath, max_length: int, too_long: str) -> np.ndarray:
    from plasticity_jax.data.sft import encode_examples
    from plasticity_jax.data.tasks import read_task
    from plasticity_jax.data.tokenizer import Tokenizer

    return np.asarray(encode_examples(read_task(folder).train, Tokenizer.load(corpus), max_length=max_length, too_long=too_long).lengths)


@functools.lru_cache(maxsize=64)
def _prompt_lengths(folder: AnyPath, corpus: AnyPath, split: str) -> np.ndarray:
    from plasticity_jax.data.tasks import format_prompt, read_task
    from plasticity_jax.data.tokenizer import Tokenizer

    rows = getattr(read_task(folder), split)
    return np.asarray([len(ids) for ids in Tokenizer.load(corpus).encode_batch([format_prompt(row.prompt) for row in rows])])


@functools.lru_cache(maxsize=64)
def _option_lengths(folder: AnyPath, corpus: AnyPath, split: str) -> np.ndarray:
    from plasticity_jax.data.tasks import format_prompt, read_task
    from plasticity_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(corpus)
    pairs = [(format_prompt(row.prompt), option) for row in getattr(read_task(folder), split) for option in row.options]
    prompts, options = (tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
    return np.asarray([len(prompt) + len(option) for prompt, option in zip(prompts, options, strict=True)])


def padded_to(lengths: np.ndarray, buckets: tuple[int, ...], batch_size: int) -> list[tuple[int, int]]:
    """(bucket length, rows) of each bucket that rows of these lengths are padded to; the last batch of a bucket is filled up."""
    needed = np.minimum(np.searchsorted(np.asarray(buckets), lengths), len(buckets) - 1)
    counts = np.bincount(needed, minlength=len(buckets)).tolist()
    return [(length, -(-count // batch_size) * batch_size) for length, count in zip(buckets, counts, strict=True) if count]
