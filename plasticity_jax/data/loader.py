"""Training batches from token records. The batch at a step depends only on the records, the seed and the step."""

import contextlib
import functools
import io
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from upath import UPath

from plasticity_jax.data.packing import MANIFEST, index_path, records_path
from plasticity_jax.data.store_records import AGAIN, StoreRecords, read_objects
from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.jsonfiles import damaged, read_json
from plasticity_jax.runs.storage import AnyPath, is_local, location

if TYPE_CHECKING:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

# tokens, targets, loss_mask, segment_ids, positions; each [B, T].
Batch = dict[str, np.ndarray]

PREFETCH_BATCHES = 8
# A thread that reads from a store waits most of the time, so all batches ahead are asked for at once.
DISK_THREADS, STORE_THREADS = 2, PREFETCH_BATCHES
_BLOCK = 1 << 20  # keys of a shuffle that are held at once beside it
_shuffling = threading.Lock()  # the threads that read ahead would each make the same shuffle, which takes 8 bytes per record


@dataclass
class _File:
    """The first records of a file. ArrayRecordDataSource requires these names."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TokenRecords:
    """Random access to the packed records of a split, written by `write_token_records`, `prepare_stream` or `prepare_tokens`.

    Args:
      directory: the folder with tokens.json. On a store, the records asked for are read by byte range (`StoreRecords`), and nothing is copied.
      split: "train" or "held_out".
    Attributes:
      directory: as given.
      domain_of: index into `domains` of each record.
      document_of: index, within the split, of the document that each record starts in.
      read_threads: how many threads read at the same time with profit.
    Raises:
      UserError: there are no finished records, or no such split; on a store, also if files are missing or too short.
    """

    def __init__(self, directory: AnyPath, split: str):
        directory = location(directory)
        if not (directory / MANIFEST).is_file():
            raise UserError(f"{directory} holds no finished token records ({MANIFEST} is missing); run `plasticity prepare` for this study")
        with damaged(directory / MANIFEST):
            self._open(directory, read_json(directory / MANIFEST), split)

    def _open(self, directory: AnyPath, manifest: dict[str, Any], split: str) -> None:
        if split not in manifest["splits"]:
            raise UserError(f"split {split!r} is unknown; {directory} has {' and '.join(manifest['splits'])}")
        self.split = split
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.domains: tuple[str, ...] = tuple(manifest["domains"])
        self.directory, self._dtype = directory, np.dtype(manifest["dtype"])
        shards = manifest.get("shards", ())
        self._folders = [Path(shard["name"]) for shard in shards] or [Path()]  # below the directory
        self._counts = [shard[split] for shard in shards] or [sum(count["records"] for count in manifest["splits"][split].values())]
        self._documents = [shard[f"{split}_documents"] for shard in shards]  # in each shard; empty if there are none
        self._one_domain = bool(shards)  # as of a streamed corpus
        files = [records_path(folder, split) for folder in self._folders]
        if "files" in manifest:  # of token ids, which are not copied into the corpus
            from plasticity_jax.data.token_files import MappedRecords

            self._counts = [sum(file[split] for file in manifest["files"])]
            self.read_threads, self._records = DISK_THREADS, MappedRecords(manifest["files"], split, self._dtype, self.seq_len + 1)
            self._one_domain = True
        elif is_local(directory):
            self.read_threads, self._records = DISK_THREADS, _on_disk([directory / file for file in files], self._counts)
        else:
            record_bytes = (self.seq_len + 1) * self._dtype.itemsize
            self.read_threads, self._records = STORE_THREADS, StoreRecords(directory, _on_store(directory, files), self._counts, record_bytes)

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def domain_of(self) -> Int[np.ndarray, " n"]:
        if self._one_domain:
            return np.broadcast_to(np.int32(0), (len(self),))
        return self._per_record("domain_of")[0]

    @functools.cached_property
    def document_of(self) -> Int[np.ndarray, " n"]:
        inside = self._per_record("document_of")
        if not self._documents:
            return inside[0]
        firsts = np.cumsum([0, *self._documents[:-1]], dtype=np.int64)
        return np.concatenate([part + first for part, first in zip(inside, firsts, strict=True)])

    def tokens(self, indices: Sequence[int] | np.ndarray) -> Int[np.ndarray, "b record_length"]:
        """int32 [len(indices), T + 1]: the records at `indices`, in that order."""
        if len(indices) == 0:
            return np.empty((0, self.seq_len + 1), np.int32)
        contents = self._records.__getitems__([int(index) for index in indices])
        return np.frombuffer(b"".join(contents), self._dtype).reshape(len(contents), -1).astype(np.int32)

    def _per_record(self, name: str) -> list[np.ndarray]:
        """The array of that name in each folder of records, for the records used."""
        files = [index_path(folder, self.split, name) for folder in self._folders]
        directory = self.directory
        contents = [(directory / file).read_bytes() for file in files] if is_local(directory) else read_objects(_on_store(directory, files))
        arrays = []
        for file, content, n in zip(files, contents, self._counts, strict=True):
            try:
                arrays.append(np.load(io.BytesIO(content), allow_pickle=False)[:n])
            except (ValueError, EOFError) as error:
                raise UserError(f"{directory / file} is damaged ({reason(error)}); {AGAIN}") from error
        return arrays


def _on_store(directory: UPath, files: list[Path]) -> list[UPath]:
    return [directory / file.as_posix() for file in files]


def _on_disk(files: list[Path], counts: list[int]) -> "ArrayRecordDataSource":
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    used = [_File(str(file), skip=0, take=n, examples_in_shard=n) for file, n in zip(files, counts, strict=True) if n]
    if not used:  # an empty list is refused
        return ArrayRecordDataSource(str(files[0]))
    _allow_open_files(len(files))
    return ArrayRecordDataSource(used)


def _allow_open_files(n: int) -> None:
    """Raises the limit on open files: random access keeps every shard of both splits open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * n + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # if this is forbidden, opening a file reports the limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def order(n_records: int, *, seed: int, batch_size: int, step: int) -> Int[np.ndarray, " batch_size"]:
    """Indices of the records in the batch at `step`.

    Every epoch shuffles all records by (seed, epoch). The shuffles are concatenated and cut into batches, so every record comes once per
    epoch and a batch may span two epochs.

    Raises:
      UserError: there are no records.
    """
    if n_records == 0:
        raise UserError("0 token records give no batch; use more documents or a shorter seq_len")
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, n_records)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        with _shuffling:
            shuffled = _shuffle(n_records, seed, int(epoch))
        indices[inside] = shuffled[offsets[inside]]
    return indices


@functools.lru_cache(maxsize=4)
def _shuffle(n_records: int, seed: int, epoch: int) -> Int[np.ndarray, " n_records"]:
    shuffled = _sorted_places(lambda: _keys(n_records, seed, epoch), n_records)
    shuffled.setflags(write=False)
    return shuffled


def _keys(n_records: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """A random 64-bit number for every record, block after block."""
    # Raw Philox output is fixed by its definition; Generator.permutation may change between NumPy releases, and with it every batch.
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    for start in range(0, n_records, _BLOCK):
        yield generator.random_raw(min(_BLOCK, n_records - start))


def _sorted_places(blocks: Callable[[], Iterable[np.ndarray]], n: int) -> Int[np.ndarray, " n"]:
    """The stable argsort of n keys of 64 bits, in 8 bytes of memory per key and a fraction of argsort's time.

    The low bits of a key give way to its place, which the sort then carries along. Keys that differ in these bits only are put in order afterwards.

    Args:
      blocks: yields the keys in blocks, from the first on; called a second time where there are such keys.
    """
    low = np.uint64(2 ** n.bit_length() - 1)
    values, start = np.empty(n, np.uint64), 0
    for block in blocks():
        places = np.arange(start, start + len(block), dtype=np.uint64)
        values[start : start + len(block)] = (block & ~low) | places
        start += len(block)
    values.sort()
    tied = [start + np.flatnonzero(np.diff(values[start : start + _BLOCK + 1] & ~low) == 0) for start in range(0, n, _BLOCK)]
    values &= low
    places = values.view(np.int64)
    if (positions := np.concatenate(tied)).size:
        positions = np.union1d(positions, positions + 1)
        wanted = places[positions]
        keys, start = np.empty(len(wanted), np.uint64), 0
        for block in blocks():
            here = (wanted >= start) & (wanted < start + len(block))
            keys[here] = block[wanted[here] - start]
            start += len(block)
        places[positions] = wanted[np.argsort(keys, kind="stable")]
    return places


def as_batch(records_BxT1: Int[np.ndarray, "b record_length"], *, isolate: int | None = None) -> Batch:
    """A batch from packed records of T + 1 tokens.

    Args:
      isolate: the end-of-text token, to restrict attention to a document. None lets a token attend to earlier documents in its record.
    Returns:
      tokens (r[:-1]) and targets (r[1:]), loss_mask (all 1: there is no padding), segment_ids (all 1; with `isolate` 1, 2, 3, ... for the
      documents in the record, each including its end-of-text token) and positions (0 to T - 1, also with `isolate`, because rotary attention depends only on differences); all
      [B, T], loss_mask float32, the rest int32. The first token of a document still counts as the target of the end-of-text token before it.
    """
    records_BxT1 = np.asarray(records_BxT1, np.int32)
    tokens_BxT, targets_BxT = records_BxT1[:, :-1].copy(), records_BxT1[:, 1:].copy()
    segments_BxT = np.ones(tokens_BxT.shape, np.int32)
    if isolate is not None:
        segments_BxT[:, 1:] += np.cumsum(tokens_BxT[:, :-1] == isolate, axis=1, dtype=np.int32)
    return {
        "tokens": tokens_BxT,
        "targets": targets_BxT,
        "loss_mask": np.ones(tokens_BxT.shape, np.float32),
        "segment_ids": segments_BxT,
        "positions": np.broadcast_to(np.arange(tokens_BxT.shape[1], dtype=np.int32), tokens_BxT.shape).copy(),
    }


def batch_at(
    records: TokenRecords, *, seed: int, batch_size: int, step: int, isolate: int | None = None, rows: Int[np.ndarray, " rows"] | None = None
) -> Batch:
    """The batch at `step` for this seed and batch size. `isolate` is described in `as_batch`. With `rows`, reads only those rows of the batch."""
    indices = order(len(records), seed=seed, batch_size=batch_size, step=step)
    return as_batch(records.tokens(indices if rows is None else indices[rows]), isolate=isolate)


def batches(
    records: TokenRecords,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    steps: int,
    isolate: int | None = None,
    rows: Int[np.ndarray, " rows"] | None = None,
    prefetch: bool = True,
) -> Iterator[Batch]:
    """Yields `batch_at(step)` for `steps` steps from `start_step`. Starting late costs nothing.

    With `rows`, reads only those rows of each batch. With `prefetch`, threads read a few batches ahead.
    """
    import grain

    dataset = grain.MapDataset.range(start_step, start_step + steps).map(
        lambda step: batch_at(records, seed=seed, batch_size=batch_size, step=int(step), isolate=isolate, rows=rows)
    )
    if prefetch:
        options = grain.ReadOptions(num_threads=records.read_threads, prefetch_buffer_size=PREFETCH_BATCHES)
    else:
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))
