"""Tokenizes and packs the whole corpus, next to `encode_batch_fast` of the tokenizers library on the same texts, on one core.

Command: python benchmarks/tokenize_corpus.py

One core is what a worker of a large corpus has; with TOKENIZERS_PARALLELISM=true the library takes all. The two take turns, a chunk of texts each.
Checks that both give the same tokens, and counts them by domain. Seconds are of the processor, because wall-clock is noisy on a busy machine. The
corpus has 35 MB, so that the time for a gigabyte is an extrapolation. (The file is not called tokenize.py, which would hide the standard library's
module.)
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
from side_by_side import finish

from plasticity_jax.data.documents import SPLITS, build_documents, read_documents
from plasticity_jax.data.packing import CHUNK_CHARACTERS, chunks, write_token_records
from plasticity_jax.data.sources import SOURCES
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.data.wheels import Wheels


def timed(call):
    """(result of `call`, processor seconds of all threads)."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def measure(folder: Path, vocab_size: int, seq_len: int) -> tuple[list[dict], list[dict]]:
    """Rows of speed, and of counts."""
    documents = {split: [text for _, text, _ in read_documents(folder, split)] for split in SPLITS}
    texts = [text for of_split in documents.values() for text in of_split]
    tokenizer, trained = timed(lambda: Tokenizer.train(iter(documents["train"]), vocab_size))
    manifest, packed = timed(lambda: write_token_records(folder / f"tokens-{vocab_size}", folder, tokenizer, seq_len=seq_len))
    tokenizer, library = (tokenizers.Tokenizer.from_str(tokenizer._backend.to_str()) for _ in range(2))  # with empty caches
    tokenizer, seconds = Tokenizer(tokenizer), {"tokenize": 0.0, "tokenize, the library": 0.0}
    for chunk in chunks(texts, CHUNK_CHARACTERS):
        ours, taken = timed(lambda: tokenizer.encode_arrays(chunk))
        seconds["tokenize"] += taken
        theirs, taken = timed(lambda: library_arrays(library, chunk))
        seconds["tokenize, the library"] += taken
        assert all(map(np.array_equal, ours, theirs)), "data/pretokenize.py changes tokens"
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    n_tokens = sum(count["tokens"] for split in manifest["splits"].values() for count in split.values())
    speeds = [
        {
            "vocabulary": vocab_size,
            "work": name,
            "processor seconds": taken,
            "MB/s per core": megabytes / taken,
            "tokens/s per core": n_tokens / taken,
            "1 GB, seconds (extrapolated)": 1000 / megabytes * taken,
            "times as fast as the library": seconds["tokenize, the library"] / taken if name.startswith("tokenize") else None,
        }
        for name, taken in (("train the tokenizer", trained), ("tokenize and pack", packed), *seconds.items())
    ]
    counts = [
        {"vocabulary": vocab_size, "domain": domain, "split": split, **count, "bytes/token": count["bytes"] / count["tokens"]}
        for split, of_split in manifest["splits"].items()
        for domain, count in of_split.items()
    ]
    return speeds, counts


def library_arrays(backend: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(encoding.ids, np.int32) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path("data/wheels"))
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    speeds, counts = [], []
    with tempfile.TemporaryDirectory() as folder:
        build_documents(Path(folder), tuple(SOURCES), Wheels(arguments.wheels), held_out_fraction=0.1, max_documents=None)
        for vocab_size in arguments.vocab_sizes:
            of_size = measure(Path(folder), vocab_size, arguments.seq_len)
            speeds += of_size[0]
            counts += of_size[1]
    megabytes = sum(count["bytes"] for count in counts if count["vocabulary"] == arguments.vocab_sizes[0]) / 1e6
    finish("Tokenizing", {f"{megabytes:.1f} MB of text": speeds, "What was tokenized": counts})


if __name__ == "__main__":
    main()
