"""Reads folders of Parquet, JSON, CSV and text files, the formats of published corpora, text by text."""

import bz2
import codecs
import csv
import functools
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.storage import AnyPath, is_local, location

log = logging.getLogger("plasticity_jax")

KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
KNOWN_KINDS = f"{', '.join(KINDS)}, all but Parquet also with {', '.join(COMPRESSIONS)}"
# Files that describe a data set and hold none of its rows.
_ABOUT = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|(readme|licen[cs]e|notice|copying|citation|changelog|(md5|sha\d+)sums?)\.(txt|json)")
# Text in one part of a Parquet file, or in one part of small files: a minute or two of tokenizing, which is lost if the process is killed.
PART_BYTES = 128 * 2**20
# Of a text file, which is one document, or of a cell: the tokenizer needs several hundred bytes of memory per token.
TEXT_FILE_BYTES = 64 * 2**20
LINE_BYTES = 4 * TEXT_FILE_BYTES  # of a line, which may hold several cells
ROWS_AT_ONCE = 64
READ_BYTES = 2**20  # of a column at a time: a row group may hold gigabytes
NAMED_AT_MOST = 10  # of the files that are left out
BOM = codecs.BOM_UTF8

_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Survey:
    """The content of a corpus folder.

    Attributes:
      files: (relative path, bytes) of the files to read, sorted by name.
      left_out: (relative path, reason) of everything else, sorted by name.
    """

    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, one of KINDS, whatever its case and compression; None for another kind."""
    name = name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            name = name.removesuffix(compression)
            return next((kind for kind in KINDS[1:] if name.endswith(kind)), None)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def survey(folder: str) -> Survey | None:
    """Looks at all that lies below a folder. None if the folder does not exist.

    Names that begin with a dot or an underscore are left out: download tools use them for their own files. A link is followed, and left out if
    what it leads to is read already.

    Args:
      folder: local, or a URL such as gs://bucket/folder.
    Raises:
      UserError: the address cannot be read, or a file is a broken link.
    """
    return _survey_store(folder) if "://" in folder else _survey(folder)


def listing(folder: str) -> list[tuple[str, int]] | None:
    """The corpus files below a folder as (relative path, bytes), sorted by name. None if the folder does not exist. See `survey`."""
    found = survey(folder)
    return None if found is None else list(found.files)


@functools.lru_cache(maxsize=4)
def _survey_store(folder: str) -> Survey | None:
    return _survey(folder)


def _survey(folder: str) -> Survey | None:
    try:
        root = _path(folder)
        return _Walk().all_below(root) if root.is_dir() else None
    except (OSError, ValueError) as error:
        raise UserError(f"data.files={folder} cannot be read ({reason(error)}); check the address") from error


class _Walk:
    """What lies below a folder. Links come last, so that what they lead to keeps its own name if it lies in the folder too."""

    def __init__(self):
        self.files: list[tuple[str, int]] = []
        self.left_out: list[tuple[str, str]] = []
        self._seen: set[str] = set()
        self._links: list[tuple[str, AnyPath]] = []

    def all_below(self, root: AnyPath) -> Survey:
        self._add("", root)
        while self._links:
            links, self._links = sorted(self._links), []
            for name, path in links:
                self._add(name, path)
        return Survey(tuple(sorted(self.files)), tuple(sorted(self.left_out)))

    def _add(self, name: str, path: AnyPath) -> None:
        if is_local(path):
            if not path.exists():
                if kind_of(name) is not None:
                    raise UserError(f"{path} is a link to a file that is not there; download the file again, or remove the link")
                self.left_out.append((name, "a link to nothing"))
                return
            place = os.path.realpath(path)
            if place in self._seen:
                self.left_out.append((name, "a link to what is read already"))
                return
            self._seen.add(place)
        if path.is_dir():
            self._folder(name, path)
            return
        why = _why_not(name, path)
        if why is None:
            self.files.append((name, path.stat().st_size))
        else:
            self.left_out.append((name, why))

    def _folder(self, name: str, folder: AnyPath) -> None:
        for path in folder.iterdir():
            below = f"{name}/{path.name}" if name else path.name
            if path.name.startswith((".", "_")):
                self.left_out.append((below, "hidden"))
            elif is_local(path) and path.is_symlink():
                self._links.append((below, path))
            else:
                self._add(below, path)


def _why_not(name: str, path: AnyPath) -> str | None:
    """Why a file is left out; None for one that is read."""
    if kind_of(name) is None:
        return "of another kind"
    if _ABOUT.fullmatch(path.name.lower()):
        return "about the data set"
    if not path.is_file():
        return "not a file"
    return "empty" if path.stat().st_size == 0 and kind_of(name) != ".parquet" else None


def folder_name(folder: str) -> str:
    """The last part of a folder's path: the name of its domain."""
    return folder.rstrip("/").rsplit("/", 1)[-1]


def check_folder(folder: str) -> None:
    """Raises UserError if a folder does not exist or has no file of a known kind."""
    found = survey(folder)
    if found is None:
        raise UserError(f"data.files={folder}: no such folder; give the one that the corpus was downloaded to")
    if not found.files:
        raise UserError(
            f"data.files={folder} holds no file of a known kind ({KNOWN_KINDS}){_named(found.left_out, '; it holds ')}; give the folder that contains "
            "the corpus"
        )


@functools.lru_cache(maxsize=8)  # a command opens a corpus to check it and again to read it
def report_left_out(folder: str, left_out: tuple[tuple[str, str], ...], n_read: int) -> None:
    """Logs one line that counts and names what is in a folder and is not read, once per process.

    Args:
      left_out: of `Survey`.
      n_read: files that are read.
    """
    if left_out:
        log.warning("%s: reads %d files and leaves out %d%s", folder, n_read, len(left_out), _named(left_out, ": "))


def _named(left_out: Sequence[tuple[str, str]], before: str) -> str:
    if not left_out:
        return ""
    names = ", ".join(f"{name} ({why})" for name, why in left_out[:NAMED_AT_MOST])
    more = len(left_out) - NAMED_AT_MOST
    return before + ascii(names)[1:-1] + (f" and {more} more" if more > 0 else "")


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
    def kind(self) -> str:
        """One of KINDS."""
        return kind_of(self.name) or ""

    @property
    def is_parquet(self) -> bool:
        return self.kind == ".parquet"

    def place(self, number: int) -> str:
        """The position of a row, for messages."""
        what = {".parquet": "row", ".csv": "row", ".tsv": "row"}.get(self.kind, "line")
        return f"{what} {number} of {self.name} in {self.folder}"

    def source(self) -> dict[str, Any]:
        """The origin of the part's records, for their manifest. Leaves out the folder, which may move."""
        return {"file": self.name, "bytes": self.size, "row_groups": None if self.row_groups is None else list(self.row_groups)}

    def texts(self, text_field: str) -> Iterator[str]:
        """Yields the texts of the part's rows in order, with at most a few hundred in memory.

        Raises:
          UserError: the file is damaged or has the wrong format, or a row's field is missing or not text. Names the file and the row.
        """
        if self.kind == ".txt":
            yield text_file(self)
            return
        if self.is_parquet:
            rows = parquet_rows(self, lambda schema: _text_column(self, schema, text_field))
        elif self.kind in (".csv", ".tsv"):
            rows = csv_rows(self, lambda names: _named_column(self, names, text_field))
        else:
            rows = ((number, {text_field: _text_of(row, text_field, self, number)}) for number, row in json_rows(self))
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


@dataclass(frozen=True)
class TextFilesPart:
    """Successive text files of a folder, each of which is one document. A part of its own for each would waste most of its last record.

    Attributes:
      files: (name, bytes) of each.
    """

    folder: str
    files: tuple[tuple[str, int], ...]

    def source(self) -> dict[str, Any]:
        """See `FilePart.source`."""
        return {"first_file": self.files[0][0], "last_file": self.files[-1][0], "names_and_sizes": names_and_sizes(self.files)}

    def texts(self, text_field: str) -> Iterator[str]:
        """Yields the text of each file. Raises UserError: see `text_file`."""
        for name, size in self.files:
            yield text_file(FilePart(self.folder, name, size))


def names_and_sizes(files: Sequence[tuple[str, int]]) -> str:
    """sha256 (hex) of the names and sizes of files."""
    return hashlib.sha256(json.dumps(files).encode("ascii")).hexdigest()


def file_parts(folder: str, text_field: str) -> Iterator[FilePart | TextFilesPart]:
    """Yields the parts of all files of a folder, sorted by name. A large Parquet file is split between row groups, and text files are joined.

    Reads only the footers of Parquet files, one at a time.

    Raises:
      UserError: see `check_folder` and `FilePart.texts`.
    """
    check_folder(folder)
    texts: list[tuple[str, int]] = []
    held = 0  # bytes of them
    for name, size in listing(folder) or ():
        whole = FilePart(folder, name, size)
        if texts and (whole.kind != ".txt" or held >= PART_BYTES):
            yield TextFilesPart(folder, tuple(texts))
            texts, held = [], 0
        if whole.kind == ".txt":
            texts.append((name, size))
            held += size
        elif whole.is_parquet:
            yield from _parquet_parts(whole, text_field)
        else:
            yield whole
    if texts:
        yield TextFilesPart(folder, tuple(texts))


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

    _refuse_twice(part, _named_column(part, schema.names, text_field), schema.names)
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise UserError(f"column {text_field!r} of {part.name} in {part.folder} holds {kind}, not text; set data.text_field to a column of texts")


def _named_column(part: FilePart, names: Sequence[str], text_field: str) -> list[str]:
    if text_field not in names:
        raise UserError(
            f"{part.name} in {part.folder} has no column {text_field!r}; it has {', '.join(names) or 'none'}: set data.text_field to one of them"
        )
    return [text_field]


def _refuse_twice(part: FilePart, wanted: Iterable[str], names: Sequence[str]) -> None:
    for name in wanted:
        if list(names).count(name) > 1:
            raise UserError(f"{part.name} in {part.folder} has {list(names).count(name)} columns {name!r}; rename all but one of them")


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
            _refuse_twice(part, columns, file.schema_arrow.names)
            # One iterator over all row groups would keep every group's memory until the end.
            for group in range(*(part.row_groups or (0, file.num_row_groups))):
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    _refuse_long_cells(part, number, batch)
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            where = f" after row {number}" if number > part.first_row else ""
            raise UserError(f"{part.name} in {part.folder} is not a readable Parquet file{where} ({reason(error)}); download it again") from error


def _refuse_long_cells(part: FilePart, number: int, batch: Any) -> None:
    import pyarrow
    import pyarrow.compute

    if batch.nbytes <= TEXT_FILE_BYTES:
        return
    compute: Any = pyarrow.compute
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            lengths = compute.binary_length(column)
            if (compute.max(lengths).as_py() or 0) > TEXT_FILE_BYTES:
                row = compute.index(compute.greater(lengths, TEXT_FILE_BYTES), True).as_py()
                raise _too_long(f"{part.place(number + row + 1)}: a cell of column {name!r}", TEXT_FILE_BYTES)


def _too_long(what: str, limit: int, way_out: str = "shorten or drop it") -> UserError:
    return UserError(f"{what} holds more than {limit >> 20} MiB; {way_out}")


def _needs_pyarrow(part: FilePart) -> UserError:
    return UserError(f"{part.name} needs pyarrow; install it with: pip install 'plasticity_jax[data]'")


# ------------------------------------------------------------------------------------------------------------------- compressed files


def decompressed(file: Any, name: str) -> Any:
    """The decompressed binary file, which iterates by lines."""
    name = name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith(".bz2"):
        return bz2.BZ2File(file)
    if name.endswith(".xz"):
        return lzma.LZMAFile(file)
    if name.endswith((".zst", ".zstd")):
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"{name} needs pyarrow; install it with: pip install 'plasticity_jax[data]'") from error
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    return file


def _damaged(part: FilePart, where: str, error: Exception) -> UserError:
    return UserError(f"{part.name} in {part.folder} is truncated or damaged{where} ({reason(error)}); download it again")


# ---------------------------------------------------------------------------------------------------------------------- text and CSV


def text_file(part: FilePart) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
      UserError: the file is damaged, not UTF-8, or larger than TEXT_FILE_BYTES.
    """
    with open_part(part) as file:
        try:
            content = decompressed(file, part.name).read(TEXT_FILE_BYTES + 1)
        except _DAMAGED as error:
            raise _damaged(part, "", error) from error
    if len(content) > TEXT_FILE_BYTES:
        raise UserError(
            f"{part.name} in {part.folder} is larger than {TEXT_FILE_BYTES >> 20} MiB, and a text file is read as one document; write its documents "
            "as the lines of a .jsonl file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{part.name} in {part.folder} is not UTF-8 ({reason(error)}); {_convert(error)}") from error


def csv_rows(part: FilePart, columns_of: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields columns of a table with a header as (row number from 1, {column: text}). A .csv file has commas between fields, a .tsv file tabs.

    Args:
      columns_of: returns the columns to read from those that the first line names, or raises UserError.
    Raises:
      UserError: the file is damaged or not such a table, or a row has not as many fields as the header.
    """
    csv.field_size_limit(TEXT_FILE_BYTES)  # the default of 128 KiB is less than a long document
    number, where = 0, f"{part.name} in {part.folder}"
    with open_part(part) as file:
        try:
            lines = io.TextIOWrapper(decompressed(file, part.name), "utf-8-sig", newline="")
            rows = csv.reader(_bounded_lines(lines, part), delimiter="\t" if part.kind == ".tsv" else ",", strict=True)
            names = next(rows, [])
            columns = columns_of(names)
            _refuse_twice(part, columns, names)
            places = {column: names.index(column) for column in columns}
            for row in filter(None, rows):
                number += 1
                if len(row) != len(names):
                    raise UserError(f"{part.place(number)} has {len(row)} fields, and the first line names {len(names)}; repair or drop the row")
                yield number, {column: row[place] for column, place in places.items()}
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not a table of UTF-8 text after row {number} ({reason(error)}); {_convert(error)}") from error
        except csv.Error as error:
            if "field limit" in str(error):
                raise _too_long(f"{part.place(number + 1)}: a cell", TEXT_FILE_BYTES, "close the quote that opens there, or shorten it") from error
            why = "a quote opens there that does not close" if "unexpected end" in str(error) else reason(error)
            raise UserError(f'{where} is not a table of UTF-8 text after row {number} ({why}); repair it: a quote within quotes is ""') from error
        except _DAMAGED as error:
            raise _damaged(part, f" after row {number}", error) from error


def _bounded_lines(file: Any, part: FilePart) -> Iterator[Any]:
    """The lines of a binary or text file. Raises UserError for one of more than LINE_BYTES before it is all in memory."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise _too_long(f"line {number} of {part.name} in {part.folder}", LINE_BYTES)
        yield line


# -------------------------------------------------------------------------------------------------------------------------------- JSON

_BEGINNING, _BETWEEN = re.compile(r"\ufeff?[ \t\r\n]*\[?"), re.compile(r"[ \t\r\n,]*")


def json_rows(part: FilePart) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a file of JSON lines, or of one JSON list if its name says .json, as (number from 1, object).

    Raises:
      UserError: see `json_lines` and `json_list`.
    """
    return json_list(part) if part.kind == ".json" and _holds_list(part) else json_lines(part)


def _holds_list(part: FilePart) -> bool:
    try:
        with open_part(part) as file:
            return decompressed(file, part.name).read(READ_BYTES).removeprefix(BOM).lstrip(b" \t\r\n").startswith(b"[")
    except _DAMAGED as error:
        raise _damaged(part, "", error) from error


def json_list(part: FilePart) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a file with one JSON list as (number from 1, object), without reading the whole file at once.

    Raises:
      UserError: the file is truncated or damaged, or an element is not a JSON object in UTF-8. Names the element.
    """
    decoder, number, where = json.JSONDecoder(), 0, f"{part.name} in {part.folder}"
    with open_part(part) as file:
        try:
            chunks = _text_chunks(decompressed(file, part.name))
            text = next(chunks, "")
            position = _end(_BEGINNING, text, 0)
            while True:
                position = _end(_BETWEEN, text, position)
                if text.startswith("]", position):
                    return
                try:
                    row, position = decoder.raw_decode(text, position)
                except json.JSONDecodeError as error:
                    text, position = text[position:], 0
                    if len(text) > LINE_BYTES:
                        raise _too_long(f"element {number + 1} of {where}", LINE_BYTES) from None
                    # Double the text, so that even a long element is parsed only a few times.
                    more = _at_least(chunks, len(text))
                    if not more:
                        raise UserError(
                            f"element {number + 1} of {where} is not valid JSON ({reason(error)}); repair the file or download it again"
                        ) from error
                    text += more
                    continue
                number += 1
                if not isinstance(row, dict):
                    raise UserError(f"element {number} of {where} is not a JSON object; every element must be an object with named fields")
                yield number, row
        except (*_DAMAGED, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(part, f" after element {number}", error) from error


def _text_chunks(file: Any) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    while chunk := file.read(READ_BYTES):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _at_least(chunks: Iterator[str], size: int) -> str:
    """Joins the next chunks to at least `size` characters, or fewer at the end of the file."""
    found: list[str] = []
    while sum(map(len, found)) <= size and (chunk := next(chunks, None)) is not None:
        found.append(chunk)
    return "".join(found)


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Where a pattern that may match nothing ends."""
    found = pattern.match(text, position)
    return position if found is None else found.end()


def json_lines(part: FilePart) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSON-lines file as (line number from 1, object). Skips empty lines.

    Not `pyarrow.dataset`, which needs one schema per file, converts strings that look like dates, and names no line in errors.

    Raises:
      UserError: the file is truncated or damaged, or a line is not a JSON object in UTF-8. Names the line.
    """
    number = 0
    with open_part(part) as file:
        try:
            for number, line in enumerate(_bounded_lines(_buffered(decompressed(file, part.name)), part), 1):
                line = line.removeprefix(BOM)  # also where files that begin with one were joined
                if line.strip():
                    yield number, _json_object(line, part, number)
        except _DAMAGED as error:
            raise _damaged(part, f" after line {number}", error) from error


def _buffered(file: Any) -> Any:
    """A file whose `readline` takes a limit; that of fsspec's files does not."""
    return file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(file, READ_BYTES)


def _json_object(line: bytes, part: FilePart, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{part.place(number)} is not UTF-8 ({reason(error)}); {_convert(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{part.place(number)} is not valid JSON ({reason(error)}); repair or drop the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{part.place(number)} is not a JSON object; every line must be an object with named fields")
    return row


def _convert(error: UnicodeDecodeError) -> str:
    """The way out for text of another encoding."""
    encoding = "utf-16" if error.start == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    return f"convert it, such as with iconv -f {encoding} -t utf-8"


def _text_of(row: dict[str, Any], text_field: str, part: FilePart, number: int) -> str:
    if text_field not in row:
        raise UserError(
            f"{part.place(number)} has no field {text_field!r}; it has {', '.join(sorted(row)) or 'none'}: set data.text_field to one of them"
        )
    if not isinstance(row[text_field], str):
        raise UserError(f"{part.place(number)}: field {text_field!r} is {type(row[text_field]).__name__}, not text; repair or drop the line")
    return row[text_field]
