"""Labeled texts for linear probes: raw text without a template. Training and test rows share no text."""

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plasticity_jax.data.probe_files import ProbeFiles, read_labeled
from plasticity_jax.data.sources import SOURCES, split_of
from plasticity_jax.data.tasks import news, sentiment
from plasticity_jax.data.tasks.base import RowSettings, majority_share, shuffled, without_leaks
from plasticity_jax.data.tasks.files import licences_of, read_jsonl, read_summary, write_jsonl
from plasticity_jax.errors import UserError
from plasticity_jax.runs.jsonfiles import write_json
from plasticity_jax.runs.storage import AnyPath

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

Rows = list[tuple[str, str]]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True)
class ProbeRows:
    """All rows of a probe set, as (text, label), before sampling.

    Attributes:
      dropped_leaks: training rows dropped because their text is also a test text.
      sources: "package==version:member", or "package==version" if the rows come from many files.
      source_splits: the published split of the "train" and "test" rows.
    """

    train: Rows
    test: Rows
    dropped_leaks: int
    sources: tuple[str, ...]
    source_splits: dict[str, str]


@dataclass(frozen=True)
class ProbeSet:
    """A data set to probe for.

    Attributes:
      name: key of the set.
      labels: every label; a label's index is its class number.
      packages: wheels the rows are read from.
      build: (wheels, held_out_fraction) -> all rows.
    """

    name: str
    labels: tuple[str, ...]
    packages: tuple[str, ...]
    build: Callable[["Wheels", float], ProbeRows]


def _build_sentiment(wheels: "Wheels", held_out_fraction: float) -> ProbeRows:
    # SST-2 has a published validation split, so nothing is held out of the training file.
    del held_out_fraction
    sentences = sentiment.read_sentences(wheels)
    return ProbeRows(
        train=[(sentence.text, sentence.label) for sentence in sentences.train],
        test=[(sentence.text, sentence.label) for sentence in sentences.test],
        dropped_leaks=sentences.dropped_leaks,
        sources=(wheels.source(sentiment.VADER_PACKAGE, sentiment.VADER_FILE), wheels.source(sentiment.SST2_PACKAGE, sentiment.SST2_FILE)),
        source_splits={"train": "none", "test": "validation"},
    )


def headline_and_first_sentence(text: str) -> str:
    """A BBC article cut to the length of an AG News item, at the end of a sentence.

    If a text is cut mid-sentence, the state of its last token encodes the next word rather than the topic.
    """
    return _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0]


def _build_topic(wheels: "Wheels", held_out_fraction: float) -> ProbeRows:
    rows: dict[str, Rows] = {"train": [], "held_out": []}
    packages = set()
    for document in SOURCES["bbc"].read(wheels):
        rows[split_of(document.text, held_out_fraction)].append((headline_and_first_sentence(document.text), document.label))
        packages.add(document.source.partition(":")[0])
    train, dropped = without_leaks(rows["train"], [text for text, _ in rows["held_out"]], lambda row: row[0])
    return ProbeRows(
        train=train,
        test=rows["held_out"],
        dropped_leaks=dropped,
        sources=tuple(sorted(packages)),
        source_splits={"train": "train", "test": "held_out"},
    )


PROBE_SETS: dict[str, ProbeSet] = {
    probe_set.name: probe_set
    for probe_set in (
        ProbeSet(name="sentiment", labels=sentiment.LABELS, packages=sentiment.PACKAGES, build=_build_sentiment),
        ProbeSet(name="topic", labels=news.CATEGORIES, packages=news.NEWS.packages, build=_build_topic),
    )
}


def probe_set_of_files(name: str, files: ProbeFiles) -> ProbeSet:
    """The probe set whose rows are the user's own files, which this reads. Raises UserError: see `read_labeled`."""
    rows = read_labeled(name, files)

    def build(wheels: "Wheels", held_out_fraction: float) -> ProbeRows:
        splits: dict[str, Rows] = {"train": rows.train, "held_out": rows.test or []}
        if rows.test is None:
            splits = {"train": [], "held_out": []}
            for row in rows.train:
                splits[split_of(row[0], held_out_fraction)].append(row)
        train, dropped = without_leaks(splits["train"], [text for text, _ in splits["held_out"]], lambda row: row[0])
        return ProbeRows(
            train=train,
            test=splits["held_out"],
            dropped_leaks=dropped,
            sources=("files",),
            source_splits={"train": "train", "test": "held_out" if rows.test is None else "test"},
        )

    return ProbeSet(name=name, labels=rows.labels, packages=(), build=build)


def get_probe_set(name: str) -> ProbeSet:
    """The probe set of that name.

    Raises:
      UserError: there is none; the message names the nearest one and lists them all.
    """
    if name not in PROBE_SETS:
        nearest = difflib.get_close_matches(name, PROBE_SETS, n=1, cutoff=0.0)[0]
        raise UserError(f"probe set {name!r} is unknown; did you mean {nearest!r}? The probe sets are {', '.join(PROBE_SETS)}.")
    return PROBE_SETS[name]


def build_probe_set(probe_set: ProbeSet, wheels: "Wheels", *, train_rows: int, test_rows: int, held_out_fraction: float, seed: int) -> dict:
    """Makes the rows of a probe set, deterministically.

    Args:
      wheels: the set's packages.
      train_rows, test_rows: upper limits; a source that has fewer rows gives all it has.
      held_out_fraction: fraction of documents kept for test rows; unused if there is a published test split.
      seed: the order in which rows are drawn.
    Returns:
      `name`, `labels`, `train` and `test` (lists of (text, label)), `dropped_leaks`, `sources`, `source_splits`.
    Raises:
      UserError: a number is out of range, a wheel is missing or altered, a split is empty, or the drawn test rows have a label that the training rows
        lack.
    """
    name = probe_set.name
    settings = RowSettings(train_rows, test_rows, held_out_fraction, seed)
    rows = probe_set.build(wheels, settings.held_out_fraction)
    train, test = shuffled(rows.train, seed)[:train_rows], shuffled(rows.test, seed)[:test_rows]
    if not train or not test:
        raise UserError(f"held_out_fraction={held_out_fraction} leaves a split of probe set {name!r} without rows; use a fraction such as 0.1.")
    for label in probe_set.labels:
        if any(label == own for _, own in test) and not any(label == own for _, own in train):
            raise UserError(f"probe set {name}: none of its {len(train)} training rows has the label {label!r}; raise probe.train_rows.")
    return {
        "name": name,
        "labels": probe_set.labels,
        "train": train,
        "test": test,
        "dropped_leaks": rows.dropped_leaks,
        "sources": rows.sources,
        "source_splits": rows.source_splits,
    }


def write_probe_set(directory: Path, probe_rows: dict) -> dict:
    """Writes the result of `build_probe_set` to `directory`: `train.jsonl`, `test.jsonl`, then `summary.json`.

    Returns:
      The summary: `name`, `labels`, `rows`, `majority_share` (accuracy of always giving the most common test label), `dropped_leaks`,
      `sources`, `source_splits`, `licences`, `sha256` (per file) and `fingerprint` (sha256 over both).
    """
    (directory / "summary.json").unlink(missing_ok=True)
    hashes = {
        split: write_jsonl(directory / f"{split}.jsonl", [{"text": text, "label": label} for text, label in probe_rows[split]])
        for split in ("train", "test")
    }
    summary = {
        "name": probe_rows["name"],
        "labels": list(probe_rows["labels"]),
        "rows": {split: len(probe_rows[split]) for split in ("train", "test")},
        "majority_share": majority_share([label for _, label in probe_rows["test"]]),
        "dropped_leaks": probe_rows["dropped_leaks"],
        "sources": list(probe_rows["sources"]),
        "source_splits": probe_rows["source_splits"],
        "licences": licences_of(set(probe_rows["sources"])),
        "sha256": hashes,
        "fingerprint": hashlib.sha256("".join(hashes.values()).encode()).hexdigest(),
    }
    write_json(directory / "summary.json", summary)
    return summary


def read_probe_set(directory: AnyPath) -> dict:
    """Reads what `write_probe_set` wrote.

    Returns:
      The summary's entries, with `labels` as a tuple, and `train` and `test` (lists of (text, label)).
    Raises:
      UserError: there are no finished rows, or they were altered.
    """
    summary = read_summary(directory)
    splits = {
        split: [(row["text"], row["label"]) for row in read_jsonl(directory / f"{split}.jsonl", ("text", "label"), sha256=summary["sha256"][split])]
        for split in ("train", "test")
    }
    return summary | splits | {"labels": tuple(summary["labels"])}
