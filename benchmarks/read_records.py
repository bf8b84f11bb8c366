"""Reads batches of token records by byte range, next to array_record's own reader of the same files.

    python benchmarks/read_records.py
    python benchmarks/read_records.py --store gs://bucket/folder      # writes 100 MB there, reads them, and removes them

Every batch holds shuffled records of 2,048 tokens, as a process of a pod reads its rows: one request for each. Without --store the ranges are read
through fsspec from a local disk, whose pages are in memory: that measures what our code and fsspec cost per record, and says nothing about a
network. Checks that both give the same tokens.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from side_by_side import finish, markdown
from upath import UPath

from plasticity_jax.data.highwayhash import highwayhash64
from plasticity_jax.data.loader import TokenRecords, batches
from plasticity_jax.data.packing import MANIFEST, SplitWriter
from plasticity_jax.runs.jsonfiles import write_json
from plasticity_jax.runs.storage import remove_tree, upload

SEQ_LEN, VOCAB, SHARDS, RECORDS_PER_SHARD = 2048, 32_000, 8, 3_200


def write_corpus(folder: Path) -> None:
    """Random tokens, in the form of a streamed corpus."""
    rng, dtype, shards = np.random.default_rng(0), np.dtype("<u2"), []
    for i in range(SHARDS):
        name = f"shards/{i:06d}"
        (folder / name).mkdir(parents=True)
        writer = SplitWriter(folder / name, "train", dtype)
        for document in range(RECORDS_PER_SHARD):
            writer.write(rng.integers(0, VOCAB, SEQ_LEN + 1), document)
        writer.close()
        shards.append({"name": name, "train": RECORDS_PER_SHARD, "train_documents": RECORDS_PER_SHARD})
    manifest = {"seq_len": SEQ_LEN, "vocab_size": VOCAB, "dtype": dtype.str, "domains": ["random"], "fingerprint": "", "splits": {"train": {}}}
    write_json(folder / MANIFEST, manifest | {"shards": shards})


def measure(records: TokenRecords, rows: int, seconds: float) -> tuple[int, float]:
    """(records, seconds) of batches of that many rows, after the first."""
    steps = iter(batches(records, seed=0, batch_size=rows, start_step=0, steps=10**6))
    next(steps)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        n += len(next(steps)["tokens"])
    return n, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="URL of a folder for the records; a local disk without it")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128], help="rows of a batch that one process reads")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        stored = UPath(f"file://{folder}")  # unlike a local path, read through fsspec
        if arguments.store:
            stored = UPath(arguments.store) / "read_records"
            upload(Path(folder), stored)
        try:
            results = compare(TokenRecords(Path(folder), "train"), TokenRecords(stored, "train"), arguments)
        finally:
            if arguments.store:
                remove_tree(stored)
    if arguments.store:  # the page is about a local disk
        print(markdown(results))
    else:
        finish("Reading records", {f"Records of {SEQ_LEN + 1:,} tokens per second, 16 bits each, from a local disk": results})


def compare(local: TokenRecords, stored: TokenRecords, arguments: argparse.Namespace) -> list[dict]:
    results = []
    for rows in arguments.rows:
        some = np.random.default_rng(1).integers(0, len(local), rows)
        assert np.array_equal(local.tokens(some), stored.tokens(some))
        data = np.zeros((rows, 2 * (SEQ_LEN + 1)), np.uint8)
        start = time.perf_counter()
        for _ in range(10):
            highwayhash64(data, bytes(32))
        checksums = 10 * rows / (time.perf_counter() - start)
        (n, seconds), (n_stored, seconds_stored) = (measure(records, rows, arguments.seconds) for records in (local, stored))
        rates = {"array_record": n / seconds, "by range": n_stored / seconds_stored, "checksums alone": checksums}
        results.append({"rows of a batch": rows} | rates | {"by range / array_record": rates["by range"] / rates["array_record"]})
    return results


if __name__ == "__main__":
    main()
