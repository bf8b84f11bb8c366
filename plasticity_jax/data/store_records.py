"""Records on an object store, read by byte range: those that are asked for, and nothing else.

Where a record lies follows from its number. An array_record file that is written with `group_size:1,uncompressed` is a Riegeli file with one
chunk per record: a header of 40 bytes, a prefix of a few bytes, and the record. The chunks follow one another without gaps, after a first
header that belongs to the file, and every 64 KiB of the file begin with a block header of 24 bytes. Records of equal length make chunks of equal
length, so neither footer nor index is needed. That a chunk lies where it is looked for, undamaged, is known from the checksum in its header,
which the library also checks when it reads a local file.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from upath import UPath

from plasticity_jax.data.highwayhash import highwayhash64
from plasticity_jax.errors import UserError, reason

# Riegeli's file format: github.com/google/riegeli, doc/riegeli_records_file_format.md.
_BLOCK, _BLOCK_HEADER = 2**16, 24
_CHUNK_HEADER = 40  # header hash, size of the data, hash of the data, type and number of records, size of the records
_HASH_KEY = b"Riegeli/records\n" * 2
_SIMPLE_CHUNK, _ONE_RECORD = ord("r"), 1 << 8
# A longer run of records is read in several requests, which go out together.
REQUEST_BYTES = 8 * 2**20

# What to do about a damaged corpus.
AGAIN = "copy the corpus to the store again, or delete it and run `plasticity prepare`"


class StoreRecords:
    """Random access to the records of array_record files on one store, with the methods of array_record's own data source.

    Opening it lists the folder, and reads no file.

    Args:
      folder: holds the files, also in folders below.
      files: in the order of their records.
      counts: records to use of each file, from its first.
      record_bytes: length of every record.
    Raises:
      UserError: a file is missing or too short for its records.
    """

    def __init__(self, folder: UPath, files: Sequence[UPath], counts: Sequence[int], record_bytes: int):
        self._files = list(files)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._record_bytes = record_bytes
        sizes = _varint(record_bytes)
        # The prefix: no compression, and the sizes of the chunk's records, which is one.
        prefix = b"\0" + _varint(len(sizes)) + sizes
        data_bytes = len(prefix) + record_bytes
        self._chunk_bytes = _CHUNK_HEADER + data_bytes
        fields = np.array([0, data_bytes, 0, _SIMPLE_CHUNK | _ONE_RECORD, record_bytes], "<u8")
        self._beginning = np.frombuffer(fields.tobytes() + prefix, np.uint8)
        self._check_sizes(folder, counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        """The records at `indices`, in that order. Reads neighbors in one request, and all requests go out together.

        Raises:
          IndexError: there is no such record.
          UserError: a file is missing, cannot be read, is too short or is damaged.
        """
        wanted, order = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if len(wanted) == 0:
            return []
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"records {wanted[0]} to {wanted[-1]} of {len(self)}")
        file_of = np.searchsorted(self._ends, wanted, side="right")
        inside = wanted - np.concatenate([[0], self._ends])[file_of]
        runs = self._runs(wanted, file_of)
        starts = [self._position(int(inside[first])) for first, _ in runs]
        ends = [self._end(int(inside[stop - 1]) + 1) for _, stop in runs]
        contents = read_objects([self._files[file_of[first]] for first, _ in runs], starts, ends)
        chunks = np.empty((len(wanted), self._chunk_bytes), np.uint8)
        for (first, stop), start, content in zip(runs, starts, contents, strict=True):
            chunks[first:stop] = np.frombuffer(_without_block_headers(content, start), np.uint8).reshape(stop - first, -1)
        self._check(chunks, file_of, inside)
        return [chunks[place, -self._record_bytes :].tobytes() for place in order]

    def _runs(self, wanted: Int[np.ndarray, " n"], file_of: Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
        """Stretches of `wanted` that lie next to one another in a file, none longer than a request."""
        longest = max(1, REQUEST_BYTES // self._chunk_bytes)
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(file_of) != 0)) + 1
        edges = [0, *breaks.tolist(), len(wanted)]
        return [(first, min(first + longest, stop)) for start, stop in zip(edges, edges[1:]) for first in range(start, stop, longest)]

    def _position(self, record: int) -> int:
        """Where the chunk of a record begins in its file."""
        return _position(_CHUNK_HEADER + record * self._chunk_bytes)

    def _end(self, records: int) -> int:
        """Where the chunks of the first `records` records of a file end."""
        return _position(_CHUNK_HEADER + records * self._chunk_bytes - 1) + 1

    def _check_sizes(self, folder: UPath, counts: Sequence[int]) -> None:
        try:
            found = dict(folder.fs.find(folder.path, detail=True))
        except Exception as error:  # every driver has types of its own
            raise _unreadable(folder, error) from error
        for file, count in zip(self._files, counts, strict=True):
            if file.path not in found:
                raise _missing(file)
            if found[file.path]["size"] < self._end(count):
                raise _short(file, found[file.path]["size"], self._end(count))

    def _check(self, chunks: UInt8[np.ndarray, "n chunk_bytes"], file_of: np.ndarray, inside: np.ndarray) -> None:
        hashes = chunks[:, 16:24].copy().view("<u8")[:, 0]
        beginning = chunks[:, : len(self._beginning)].copy()
        beginning[:, :8] = beginning[:, 16:24] = 0  # the checksums of the header and of the data
        good = (beginning == self._beginning).all(axis=1)
        good &= highwayhash64(chunks[:, _CHUNK_HEADER:], _HASH_KEY) == hashes
        if not good.all():
            bad = int(np.argmin(good))
            raise UserError(f"{self._files[file_of[bad]]} is damaged at record {inside[bad]}: its checksum is another; {AGAIN}.")


def read_objects(objects: Sequence[UPath], starts: Sequence[int] = (), ends: Sequence[int] = ()) -> list[bytes]:
    """The contents of objects of one store, or of a byte range of each, read at the same time where the store's driver can.

    The driver itself tries requests again that fail for a passing reason.

    Raises:
      UserError: an object is missing, cannot be read, or ends before its range does.
    """
    paths = [each.path for each in objects]
    contents = objects[0].fs.cat_ranges(paths, list(starts) or [0] * len(paths), list(ends) or [None] * len(paths), on_error="return")
    for each, content, start, end in itertools.zip_longest(objects, contents, starts, ends):
        if isinstance(content, FileNotFoundError):
            raise _missing(each) from content
        if isinstance(content, BaseException):
            size = _size(each)
            if end is not None and size is not None and size < end:  # for a range behind the end, drivers have errors of their own
                raise _short(each, size, end) from content
            raise _unreadable(each, content) from content
        if end is not None and len(content) != end - start:
            raise _short(each, start + len(content), end)
    return contents


def _size(file: UPath) -> int | None:
    try:
        return file.fs.size(file.path)
    except Exception:  # the store does not answer at all
        return None


def _missing(file: UPath) -> UserError:
    return UserError(f"{file} is missing; {AGAIN}.")


def _short(file: UPath, size: int, needed: int) -> UserError:
    return UserError(f"{file} ends after {size} bytes, and its records reach to {needed}; {AGAIN}.")


def _unreadable(place: UPath, error: BaseException) -> UserError:
    return UserError(f"{place} cannot be read ({reason(error)}); run the command again when it can, and it resumes.")


def _position(offset: int) -> int:
    """Where a byte of the chunks lies in the file, with the block headers before it."""
    return offset + _BLOCK_HEADER * (offset // (_BLOCK - _BLOCK_HEADER) + 1)


def _without_block_headers(content: bytes, start: int) -> bytes:
    """The bytes of chunks in `content`, which was read from byte `start` on."""
    headers = range(-start % _BLOCK, len(content), _BLOCK)
    begins = [0, *(header + _BLOCK_HEADER for header in headers)]
    return b"".join(content[begin:stop] for begin, stop in zip(begins, [*headers, len(content)], strict=True))


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the highest bit says that more follow."""
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    return bytes([*content, value])
