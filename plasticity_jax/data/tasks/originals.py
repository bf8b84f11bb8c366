"""Reads the rows of a data set: Parquet, JSON lines, a JSON list, CSV, TSV or a prepared TFDS data set. Checks the columns."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from plasticity_jax.data.corpus_files import COMPRESSIONS, FilePart, csv_rows, json_rows, kind_of, parquet_rows, report_left_out, survey
from plasticity_jax.errors import UserError, reason
from plasticity_jax.progress import Progress
from plasticity_jax.runs.storage import location

TFDS = "tfds:"
KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
KNOWN_KINDS = f"{', '.join(KINDS)}, all but Parquet also with {', '.join(COMPRESSIONS)}"
EXAMPLES_AT_ONCE = 256

_HALF_PAIR = re.compile("[\ud800-\udfff]")

AS_PUBLISHED = "give the data set as it was published"

# Column → what its values are: str, int, bool, list[...] of one, or a dict of these for a struct; or Cell.
Columns = Mapping[str, Any]


class Cell:
    """A text, a number, or true or false, each of which is read as text; nothing and NaN as an empty one."""


@dataclass(frozen=True)
class Place:
    """One location of a set's rows.

    Attributes:
      text: the location as the user wrote it.
      folder, names: of its files, and their sizes in bytes; `folder` is the data set's for TFDS.
      split: of a TFDS data set, None for files.
      left_out: (name, reason) of what else lies in a folder.
    """

    text: str
    folder: str
    names: tuple[tuple[str, int], ...]
    split: str | None = None
    left_out: tuple[tuple[str, str], ...] = ()


def find_places(places: str) -> list[Place | None]:
    """Resolves comma-separated places: files, folders, or tfds:NAME@SPLIT. None for one that does not exist."""
    return [_find(text) for text in split_places(places)]


def split_places(places: str) -> list[str]:
    """The individual places of a set."""
    return [text.strip() for text in places.split(",") if text.strip()]


def _find(text: str) -> Place | None:
    if text.startswith(TFDS):
        from plasticity_jax.data.corpus_tfds import data_set_folder, data_set_listing

        name, _, split = text.removeprefix(TFDS).rpartition("@")
        folder = data_set_folder(name) if name else None
        return None if folder is None else Place(text, str(folder), tuple(data_set_listing(str(folder)) or ()), split)
    try:
        path = location(text).expanduser()
        if path.is_file():
            return Place(text, str(path.parent), ((path.name, path.stat().st_size),))
    except (OSError, ValueError) as error:
        raise UserError(f"{text} cannot be read ({reason(error)}); check the address") from error
    found = survey(text)
    if found is None:
        return None
    # A file given by name may be plain .json. In folders, .json files usually describe the data set.
    rows = {name: kind_of(name) in KINDS and not name.lower().endswith(".json") for name, _ in found.files}
    others = [(name, "not rows" if kind_of(name) in KINDS else "of another kind") for name in rows if not rows[name]]
    return Place(text, text, tuple(file for file in found.files if rows[file[0]]), left_out=tuple(sorted([*found.left_out, *others])))


def read_rows(
    places: str, columns: Columns, *, what: str, otherwise: Columns | None = None, way_out: str = AS_PUBLISHED
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a set, in the order of its places, file names and rows, with a few in memory.

    Args:
      places: files, folders or tfds:NAME@SPLIT, separated by commas.
      columns: the required columns; others are ignored.
      what: the set's name in messages and progress, such as "RACE train".
      otherwise: alternative columns, used if a file has all of them but not all of `columns`.
      way_out: what to do about a column that is missing.
    Yields:
      (id, row): the id is "name:number" of the file and the row or line, from 1, prefixed by "2/" for the second place, and so on. The row has
      only `columns` (or `otherwise`): numbers as int, text as str ("" for null), lists as list, structs as dict.
    Raises:
      UserError: a place is empty, a file is damaged or of an unknown kind, a column is missing, or a value has another type.
    """
    if not split_places(places):
        raise UserError(f"{what}: no place is given; name a file or folder, or {TFDS}NAME@SPLIT")
    with Progress(f"read {what}", total=None, unit="rows") as progress:
        for index, (text, place) in enumerate(zip(split_places(places), find_places(places), strict=True)):
            place = _check_place(text, place, what)
            report_left_out(f"{what}: {text}", place.left_out, len(place.names))
            prefix = f"{index + 1}/" if index else ""
            for number, (row_id, row) in enumerate(_rows_of(place, columns, otherwise, what, way_out), 1):
                yield prefix + row_id, row
                if number % EXAMPLES_AT_ONCE == 0:
                    progress.update(EXAMPLES_AT_ONCE, note=row_id)


def check_places(places: str, *, what: str) -> None:
    """Raises UserError if a place has nothing to read. Reads no rows.

    Args:
      places, what: of `read_rows`.
    """
    for text, place in zip(split_places(places), find_places(places), strict=True):
        _check_place(text, place, what)


def _check_place(text: str, place: Place | None, what: str) -> Place:
    if text.startswith(TFDS) and "@" not in text:
        raise UserError(f"{what}: {text} names no split; give {TFDS}NAME@SPLIT, such as {text}@train")
    if place is None and text.startswith(TFDS):
        raise UserError(f"{what}: {text}: no such data set is prepared; prepare it with TFDS (file_format='array_record') or set $TFDS_DATA_DIR")
    if place is None:
        raise UserError(f"{what}: {text}: no such file or folder; give the place where the data set was downloaded")
    known = [name for name, _ in place.names if kind_of(name) in KINDS]
    if place.split is None and not known:
        raise UserError(f"{what}: {text} holds no file of a known kind ({KNOWN_KINDS}); give the place that contains the data set")
    return place


def _rows_of(place: Place, columns: Columns, otherwise: Columns | None, what: str, way_out: str) -> Iterator[tuple[str, dict[str, Any]]]:
    def choose(names: Any, where: str) -> Columns:
        return _choose(names, columns, otherwise, what, where, way_out)

    if place.split is not None:
        yield from _tfds_rows(place, choose, what)
        return
    for name, size in place.names:
        part = FilePart(place.folder, name, size)
        for number, row in raw_rows(part, lambda names, part=part: list(choose(names, f"{part.name} in {part.folder}"))):
            chosen = choose(row, part.place(number))
            yield f"{name}:{number}", {key: _checked(row[key], chosen[key], key, what, part.place(number)) for key in chosen}


def raw_rows(part: FilePart, columns_of: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a file of any of KINDS as (number from 1, row), with a few in memory. The values are as they lie in the file.

    Args:
      columns_of: returns the columns to read from those that a file with a header or a schema has, or raises UserError. Objects of JSON come whole.
    Raises:
      UserError: see `csv_rows`, `json_rows` and `parquet_rows`.
    """
    if part.is_parquet:
        return parquet_rows(part, lambda schema: columns_of(schema.names))
    return csv_rows(part, columns_of) if part.kind in (".csv", ".tsv") else json_rows(part)


def _choose(names: Any, columns: Columns, otherwise: Columns | None, what: str, where: str, way_out: str) -> Columns:
    """Chooses the kind of rows that has these columns."""
    missing = [name for name in columns if name not in names]
    if not missing:
        return columns
    if otherwise and all(name in names for name in otherwise):
        return otherwise
    raise UserError(f"{what}: {where} has no column {missing[0]!r}; it has {', '.join(sorted(names)) or 'none'}: {way_out}")


def _checked(value: Any, kind: Any, column: str, what: str, where: str) -> Any:
    value = "" if value is None and kind in (str, Cell) else value
    if not _is(value, kind):
        raise UserError(f"{what}: {where}: column {column!r} holds {_short(value)}, not {_describe(kind)}; repair or drop the row")
    return _plain(value, kind)


def _is(value: Any, kind: Any) -> bool:
    if kind is Cell:
        return isinstance(value, int | float) or _is(value, str)
    if kind is str:
        # Half a surrogate pair is not a character and cannot be written to a file.
        return isinstance(value, str) and not _HALF_PAIR.search(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(part, get_args(kind)[0]) for part in value)
    return isinstance(value, dict) and all(name in value and _is(value[name], part) for name, part in kind.items())


def _plain(value: Any, kind: Any) -> Any:
    if kind is Cell:
        return "" if isinstance(value, float) and math.isnan(value) else str(value)
    return {name: value[name] for name in kind} if isinstance(kind, dict) else value


def _describe(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0]).removeprefix('a ')}s"
    if isinstance(kind, dict):
        return "a struct of " + ", ".join(f"{name} ({_describe(part)})" for name, part in kind.items())
    return {str: "a text", int: "a whole number", bool: "true or false", Cell: "a text, a number, or true or false"}[kind]


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------------------------------------- TFDS


def _tfds_rows(place: Place, choose: Callable[[Any, str], Columns], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from plasticity_jax.data.corpus_tfds import open_split

    info, source = open_split(place.folder, place.split or "", setting=what, split_setting=f"{what}: split")
    chosen = choose(tuple(info.features), f"data set {info.full_name}")
    for first in range(0, len(source), EXAMPLES_AT_ONCE):
        numbers = range(first, min(first + EXAMPLES_AT_ONCE, len(source)))
        try:
            examples = source.__getitems__(numbers)
        except ImportError as error:
            raise UserError(
                f"{what}: {info.full_name} holds lists of lists, which TFDS can only read with TensorFlow ({reason(error)}); give it as Parquet"
            ) from error
        except (OSError, RuntimeError, IndexError) as error:
            raise UserError(f"{what}: {info.full_name} ({place.split}) in {place.folder} is damaged ({reason(error)}); prepare it again") from error
        for number, example in zip(numbers, examples, strict=True):
            where = f"example {number + 1} of {info.full_name} ({place.split})"
            try:
                row = {key: _of_numpy(example[key]) for key in chosen}
            except UnicodeDecodeError as error:
                raise UserError(f"{what}: {where} is not UTF-8; repair the data set") from error
            yield f"{info.full_name}@{place.split}:{number + 1}", {key: _checked(row[key], chosen[key], key, what, where) for key in chosen}


def _of_numpy(value: Any) -> Any:
    """Converts a TFDS value to plain Python: bytes to text, arrays (also ragged) to lists, NumPy integers to int."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {name: _of_numpy(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_of_numpy(part) for part in value]
    return _of_numpy(value.tolist()) if hasattr(value, "tolist") else value
