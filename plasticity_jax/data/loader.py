"""Token records to training batches: the batch at a step is a function of the records, the seed and the step, and of nothing else."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from plasticity_jax.data.packing import MANIFEST, index_path, records_path
from plasticity_jax.errors import UserError

# tokens, targets, loss_mask, segment_ids, positions; each [B, T].
Batch = dict[str, np.ndarray]

READ_THREADS = 2
PREFETCH_BATCHES = 8


class TokenRecords:
    """Random access to the packed records of a split, as `write_token_records` left them.

    Args:
      directory: the folder with tokens.json.
      split: "train" or "held_out".
    Raises:
      UserError: no finished records there, or no such split.
    """

    def __init__(self, directory: Path, split: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        directory = Path(directory)
        if not (directory / MANIFEST).is_file():
            raise UserError(f"{directory} holds no finished token records ({MANIFEST} is missing); run `plasticity prepare` for this study")
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if split not in manifest["splits"]:
            raise UserError(f"split {split!r} is unknown; {directory} has {' and '.join(manifest['splits'])}")
        self.split = split
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.domains: tuple[str, ...] = tuple(manifest["domains"])
        self.domain_of: Int[np.ndarray, " n"] = np.load(index_path(directory, split, "domain_of"), allow_pickle=False)
        self.document_of: Int[np.ndarray, " n"] = np.load(index_path(directory, split, "document_of"), allow_pickle=False)
        self._dtype = np.dtype(manifest["dtype"])
        self._source = ArrayRecordDataSource(str(records_path(directory, split)))

    def __len__(self) -> int:
        return len(self.domain_of)

    def tokens(self, indices: Sequence[int] | np.ndarray) -> Int[np.ndarray, "b record_length"]:
        """int32 [len(indices), T + 1]: the records at `indices`, in that order."""
        if len(indices) == 0:
            return np.empty((0, self.seq_len + 1), np.int32)
        contents = self._source.__getitems__([int(index) for index in indices])
        return np.frombuffer(b"".join(contents), self._dtype).reshape(len(contents), -1).astype(np.int32)


def order(n_records: int, *, seed: int, batch_size: int, step: int) -> Int[np.ndarray, " batch_size"]:
    """Indices of the records in the batch at `step`.

    The stream of indices is one shuffle of all records after another, each drawn anew from (seed, epoch), and is cut into batches: every
    record comes once per epoch, and a batch may lie across two epochs.

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
        indices[inside] = _shuffle(n_records, seed, int(epoch))[offsets[inside]]
    return indices


@functools.lru_cache(maxsize=4)
def _shuffle(n_records: int, seed: int, epoch: int) -> Int[np.ndarray, " n_records"]:
    # Raw Philox output is fixed by its definition; Generator.permutation may change between NumPy releases, and with it every batch.
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n_records)
    shuffled = np.argsort(keys, kind="stable")
    shuffled.setflags(write=False)
    return shuffled


def as_batch(records_BxT1: Int[np.ndarray, "b record_length"]) -> Batch:
    """A batch from packed records of T + 1 tokens.

    Returns:
      tokens (r[:-1]) and targets (r[1:]), loss_mask (all 1: nothing is padding), segment_ids (all 1: a token sees the documents before its
      own in the record, with the end-of-text token between) and positions (0 .. T - 1); all [B, T], loss_mask float32, the rest int32.
    """
    records_BxT1 = np.asarray(records_BxT1, np.int32)
    tokens_BxT, targets_BxT = records_BxT1[:, :-1].copy(), records_BxT1[:, 1:].copy()
    return {
        "tokens": tokens_BxT,
        "targets": targets_BxT,
        "loss_mask": np.ones(tokens_BxT.shape, np.float32),
        "segment_ids": np.ones(tokens_BxT.shape, np.int32),
        "positions": np.broadcast_to(np.arange(tokens_BxT.shape[1], dtype=np.int32), tokens_BxT.shape).copy(),
    }


def batch_at(records: TokenRecords, *, seed: int, batch_size: int, step: int) -> Batch:
    """The batch that every run with this seed and batch size sees at `step`."""
    return as_batch(records.tokens(order(len(records), seed=seed, batch_size=batch_size, step=step)))


def batches(records: TokenRecords, *, seed: int, batch_size: int, start_step: int, steps: int, prefetch: bool = True) -> Iterator[Batch]:
    """The batches of `steps` steps from `start_step` on: exactly `batch_at(step)` for each. A late start costs nothing.

    With `prefetch`, threads read a few batches ahead.
    """
    import grain

    dataset = grain.MapDataset.range(start_step, start_step + steps).map(
        lambda step: batch_at(records, seed=seed, batch_size=batch_size, step=int(step)))
    if prefetch:
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    else:
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))
