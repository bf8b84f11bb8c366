"""Reads folders of Parquet and JSON-lines files, the format of published web corpora, text by text."""

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.storage import AnyPath, location

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".jsonl.zstd", ".json.zst")
# Text in one part of a Parquet file: a minute or two of tokenizing, which is lost if the process is killed.
PART_BYTES = 128 * 2**20
ROWS_AT_ONCE = 64
READ_BYTES = 2**20  # of a column at a time: a row group may hold gigabytes


def listing(folder: str) -> list[tuple[str, int]] | None:
    """Lists the corpus files below a folder as (relative path, bytes), sorted by name. None if the folder does not exist.

    Skips names that begin with a dot or an underscore, which download tools use for their own files.

    Args:
      folder: local, or a URL such as gs://bucket/folder.
    Raises:
      UserError: the URL cannot be read.
    """
    found = _remote_listing(folder) if "://" in folder else _walk(folder)
    return None if found is None else list(found)


@functools.lru_cache(maxsize=4)
def _remote_listing(folder: str) -> tuple[tuple[str, int], ...] | None:
    found = _walk(folder)
    return None if found is None else tuple(found)


def _walk(folder: str) -> list[tuple[str, int]] | None:
    try:
        root = _path(folder)
        return sorted(_below(root, "")) if root.is_dir() else None
    except (OSError, ValueError) as error:
        raise UserError(f"data.files={folder} cannot be read ({reason(error)}); check the address") from error


def _below(directory: AnyPath, prefix: str) -> Iterator[tuple[str, int]]:
    for path in directory.iterdir():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _below(path, f"{prefix}{path.name}/")
        elif path.name.endswith(SUFFIXES):
            yield prefix + path.name, path.stat().st_size


def folder_name(folder: str) -> str:
    """The last part of a folder's path: the name of its domain."""
    return folder.rstrip("/").rsplit("/", 1)[-1]


def check_folder(folder: str) -> None:
    """Raises UserError if a folder does not exist or has no file of a known kind."""
    found = listing(folder)
    if found is None:
        raise UserError(f"data.files={folder}: no such folder; give the one that the corpus was downloaded to")
    if not found:
        raise UserError(f"data.files={folder} holds no file of a known kind ({', '.join(SUFFIXES)}); give the folder that contains the corpus")


@dataclass(frozen=True)
class FilePart:
    """A file of a corpus, or some row groups of a Parquet file: the unit of work of one process.

    Attributes:
      folder, name: of the file; `name` is relative to `folder`.
      size: of the file, bytes.
      row_groups: (first, end) of a Parquet file; None for a file of lines, or for all of them.
      first_row: rows of the file before this part.
    """

    folder: str
    name: str
    size: int
    row_groups: tuple[int, int] | None = None
    first_row: int = 0

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(".parquet")

    def place(self, number: int) -> str:
        """The position of a row, for messages."""
        return f"{'row' if self.is_parquet else 'line'} {number} of {self.name} in {self.folder}"

    def source(self) -> dict[str, Any]:
        """The origin of the part's records, for their manifest. Leaves out the folder, which may move."""
        return {"file": self.name, "bytes": self.size, "row_groups": None if self.row_groups is None else list(self.row_groups)}

    def texts(self, text_field: str) -> Iterator[str]:
        """Yields the texts of the part's rows in order, with at most a few hundred in memory.

        Raises:
          UserError: the file is damaged or has the wrong format, or a row's field is missing or not text. Names the file and the row.
        """
        if self.is_parquet:
            rows = parquet_rows(self, lambda schema: _text_column(self, schema, text_field))
        else:
            rows = ((number, {text_field: _text_of(row, text_field, self, number)}) for number, row in json_lines(self))
        for number, row in rows:
            text = row[text_field]
            if text is None:
                raise UserError(f"{self.place(number)} has no text (null); drop the row")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{self.place(number)}: the text has half a surrogate pair, which is not a character; repair or drop the row"
                ) from error
            yield text


def file_parts(folder: str, text_field: str) -> Iterator[FilePart]:
    """Yields the parts of all files of a folder, sorted by name. A large Parquet file is split between row groups.

    Reads only the footers of Parquet files, one at a time.

    Raises:
      UserError: see `check_folder` and `FilePart.texts`.
    """
    check_folder(folder)
    for name, size in listing(folder) or ():
        whole = FilePart(folder, name, size)
        if name.endswith(".parquet"):
            yield from _parquet_parts(whole, text_field)
        else:
            yield whole


def _path(folder: str) -> AnyPath:
    return location(folder).expanduser()


def open_part(part: FilePart) -> Any:
    """The part's file, open for reading bytes. Raises UserError where it cannot be opened."""
    try:
        return (_path(part.folder) / part.name).open("rb")
    except OSError as error:
        raise UserError(f"{part.name} in {part.folder} cannot be opened ({reason(error)}); download it again") from error


# ----------------------------------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(part: FilePart, read: Callable[[Any], Any]) -> Any:
    """`read(ParquetFile)`, with pyarrow's errors about a damaged file as one line."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_pyarrow(part) from error
    try:
        with open_part(part) as file:
            return read(pyarrow.parquet.ParquetFile(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{part.name} in {part.folder} is not a readable Parquet file ({reason(error)}); download it again") from error


def _parquet_parts(whole: FilePart, text_field: str) -> Iterator[FilePart]:
    def groups(file) -> list[tuple[int, int]]:
        """(rows, bytes of text) of every row group."""
        _check_column(whole, file.schema_arrow, text_field)
        metadata = file.metadata
        column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_field)
        return [
            (metadata.row_group(i).num_rows, metadata.row_group(i).column(column).total_uncompressed_size) for i in range(metadata.num_row_groups)
        ]

    first, size, rows, first_row = 0, 0, 0, 0
    found = _read_parquet(whole, groups)
    for index, (group_rows, group_bytes) in enumerate(found):
        size, rows = size + group_bytes, rows + group_rows
        if size >= PART_BYTES or index == len(found) - 1:
            yield FilePart(whole.folder, whole.name, whole.size, (first, index + 1), first_row)
            first, size, rows, first_row = index + 1, 0, 0, first_row + rows


def _check_column(part: FilePart, schema, text_field: str) -> None:
    import pyarrow

    if text_field not in schema.names:
        raise UserError(
            f"{part.name} in {part.folder} has no column {text_field!r}; it has {', '.join(schema.names)}: set data.text_field to one of them"
        )
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise UserError(f"column {text_field!r} of {part.name} in {part.folder} holds {kind}, not text; set data.text_field to a column of texts")


def _text_column(part: FilePart, schema, text_field: str) -> list[str]:
    _check_column(part, schema, text_field)
    return [text_field]


def parquet_rows(part: FilePart, columns_of: Callable[[Any], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a Parquet file, or of some row groups, as (number in the file from 1, {column: value}), with a few in memory.

    Args:
      columns_of: returns the columns to read from the file's Arrow schema, or raises UserError.
    Raises:
      UserError: the file is damaged or not Parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_pyarrow(part) from error
    number = part.first_row
    with open_part(part) as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened, buffer_size=READ_BYTES)
            columns = list(columns_of(file.schema_arrow))
            # One iterator over all row groups would keep every group's memory until the end.
            for group in range(*(part.row_groups or (0, file.num_row_groups))):
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            where = f" after row {number}" if number > part.first_row else ""
            raise UserError(f"{part.name} in {part.folder} is not a readable Parquet file{where} ({reason(error)}); download it again") from error


def _needs_pyarrow(part: FilePart) -> UserError:
    return UserError(f"{part.name} needs pyarrow; install it with: pip install 'plasticity_jax[data]'")


# -------------------------------------------------------------------------------------------------------------------------- JSON lines


def json_lines(part: FilePart) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSON-lines file as (line number from 1, object). Skips empty lines.

    Not `pyarrow.dataset`, which needs one schema per file, converts strings that look like dates, and names no line in errors.

    Raises:
      UserError: the file is truncated or damaged, or a line is not a JSON object in UTF-8. Names the line.
    """
    number = 0
    with open_part(part) as file:
        try:
            for number, line in enumerate(decompressed(file, part.name), 1):
                if line.strip():
                    yield number, _json_object(line, part, number)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{part.name} in {part.folder} is truncated or damaged after line {number} ({reason(error)}); download it again"
            ) from error


def decompressed(file: Any, name: str) -> Any:
    """The decompressed binary file, which iterates by lines."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith((".zst", ".zstd")):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    return file


def _json_object(line: bytes, part: FilePart, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{part.place(number)} is not valid JSON ({reason(error)}); repair or drop the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{part.place(number)} is not a JSON object; every line must be an object with named fields")
    return row


def _text_of(row: dict[str, Any], text_field: str, part: FilePart, number: int) -> str:
    if text_field not in row:
        raise UserError(
            f"{part.place(number)} has no field {text_field!r}; it has {', '.join(sorted(row)) or 'none'}: set data.text_field to one of them"
        )
    if not isinstance(row[text_field], str):
        raise UserError(f"{part.place(number)}: field {text_field!r} is {type(row[text_field]).__name__}, not text; repair or drop the line")
    return row[text_field]
