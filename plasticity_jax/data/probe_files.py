"""Labeled texts for linear probes from the user's own files: JSON lines, CSV, TSV or Parquet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax.config.schema import Text, result
from plasticity_jax.data.content import content_hash
from plasticity_jax.data.corpus_files import FilePart, kind_of
from plasticity_jax.data.tasks.originals import KINDS, KNOWN_KINDS, raw_rows
from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import AnyPath, location


@dataclass(frozen=True)
class ProbeFiles:
    """A probe set whose rows are files."""

    train: Text = result("train.jsonl", "file of the training rows: Parquet, JSON lines, a JSON list, CSV or TSV; local or gs://")
    test: Text | None = result(None, "file of the test rows; None holds out the fraction data.held_out_fraction of train, by a hash of the text")
    text: Text = result("text", "column of the texts")
    label: Text = result("label", "column of the labels, which are all whole numbers or all texts")
    id: Text | None = result(None, "column of ids, each of which a file may hold once; None where there are none")


@dataclass(frozen=True)
class LabeledRows:
    """(text, label) of each file, without white space around the texts; `test` is None where the set has no such file. Labels in order."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]] | None
    labels: tuple[str, ...]


def content(files: ProbeFiles) -> dict[str, Any]:
    """What identifies a set: the columns, and the sha256 of each file. A file that is not there (a plan made elsewhere) is identified by its path."""
    found = {split: place and (content_hash(place) or f"place {place}") for split, place in (("train", files.train), ("test", files.test))}
    return found | {"text": files.text, "label": files.label, "id": files.id}


def read_labeled(name: str, files: ProbeFiles) -> LabeledRows:
    """Reads and checks the rows of a set.

    Args:
      name: of the set, for messages.
    Raises:
      UserError: a file is missing, empty, damaged or of an unknown kind; a column is missing; a text is empty or no text; a label is neither a whole
        number nor a text, or of another type than the others; an id is there twice; there are fewer than two labels; or a test label has no training
        row.
    """
    splits = {split: list(_rows(name, place, files)) for split, place in (("train", files.train), ("test", files.test)) if place is not None}
    first = {type(label): (label, where) for rows in reversed(splits.values()) for _, label, where in reversed(rows)}
    if len(first) > 1:
        (number, where), (text, elsewhere) = first[int], first[str]
        raise UserError(f"probe set {name}: labels are numbers ({number} at {where}) and texts ({text!r} at {elsewhere}); use one type for all")
    of = {split: {label for _, label, _ in rows} for split, rows in splits.items()}
    if len(of["train"]) < 2:
        raise UserError(
            f"probe set {name}: {files.train} has the single label {next(iter(of['train']))!r} in column {files.label!r}; a probe needs at least two"
        )
    if unseen := sorted(of.get("test", set()) - of["train"]):
        raise UserError(f"probe set {name}: label {unseen[0]!r} of {files.test} is not in {files.train}; give training rows of every label")
    rows = {split: [(text, str(label)) for text, label, _ in found] for split, found in splits.items()}
    return LabeledRows(rows["train"], rows.get("test"), tuple(map(str, sorted(of["train"]))))


def _rows(name: str, place: str, files: ProbeFiles) -> Iterator[tuple[str, int | str, str]]:
    """Yields (text, label, position) of the rows of a file."""
    columns = [column for column in (files.text, files.label, files.id) if column is not None]
    ids: dict[Any, str] = {}
    part, found = _part(name, _file(name, place)), False
    for number, row in _raw_rows(name, part, columns):
        found, where = True, part.place(number)
        for column in columns:
            if column not in row:
                raise _no_column(name, where, column, row)
        text, label = row[files.text], row[files.label]
        if not isinstance(text, str):
            raise UserError(f"probe set {name}: {where}: column {files.text!r} is {type(text).__name__}, not text; repair or drop the row")
        if not text.strip():
            raise UserError(f"probe set {name}: {where}: the text in column {files.text!r} is empty; drop the row")
        if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
            shown = "empty" if label in ("", None) else f"{label!r}"
            raise UserError(f"probe set {name}: {where}: the label in column {files.label!r} is {shown}; use a whole number or a text")
        if files.id is not None:
            if (other := ids.setdefault(str(row[files.id]), where)) != where:
                raise UserError(f"probe set {name}: {where} has the id {row[files.id]!r} of {other}; drop one of the rows")
        yield text.strip(), label, where
    if not found:
        raise UserError(f"probe set {name}: {place} has no rows; give the file that holds them")


def _file(name: str, place: str) -> AnyPath:
    if content_hash(place) is None:
        raise UserError(f"probe set {name}: {place}: no such file; give the place where it was downloaded")
    return location(place).expanduser()


def _part(name: str, path: AnyPath) -> FilePart:
    if kind_of(path.name) not in KINDS:
        raise UserError(f"probe set {name}: {path} is of an unknown kind; known are {KNOWN_KINDS}")
    return FilePart(str(path.parent), path.name, path.stat().st_size)


def _raw_rows(name: str, part: FilePart, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    def chosen(names: Sequence[str]) -> list[str]:
        for column in columns:
            if column not in names:
                raise _no_column(name, f"{part.name} in {part.folder}", column, names)
        return columns

    return raw_rows(part, chosen)


def _no_column(name: str, where: str, column: str, names: Any) -> UserError:
    return UserError(
        f"probe set {name}: {where} has no column {column!r}; it has {', '.join(sorted(names)) or 'none'}: name it in probe.files.{name}"
    )
