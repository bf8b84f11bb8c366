"""Tokenizes and packs the whole corpus, next to `encode_batch_fast` of the tokenizers library on the same texts.

    python benchmarks/tokenize_corpus.py --wheels data/wheels                                      # the library on all cores
    TOKENIZERS_PARALLELISM=false python benchmarks/tokenize_corpus.py --wheels data/wheels         # one core, like a worker of a large corpus

Checks that both give the same tokens, prints one table per vocabulary size and writes build/benchmarks/tokenize_corpus.json. Wall-clock is
noisy on a busy machine, so processor seconds are printed too. The speedup is the reason for data/pretokenize.py.
(The file is not called tokenize.py, which would hide the standard library's module.)
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from plasticity_jax.data.documents import SPLITS, build_documents, read_documents
from plasticity_jax.data.packing import CHUNK_CHARACTERS, chunks, write_token_records
from plasticity_jax.data.sources import SOURCES
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.data.wheels import Wheels


def timed(call):
    """(result of `call`, wall-clock seconds, processor seconds of all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(folder: Path, vocab_size: int, seq_len: int) -> dict:
    documents = {split: [text for _, text, _ in read_documents(folder, split)] for split in SPLITS}
    tokenizer, train_wall, train_cpu = timed(lambda: Tokenizer.train(iter(documents["train"]), vocab_size))
    manifest, wall, cpu = timed(lambda: write_token_records(folder / f"tokens-{vocab_size}", folder, tokenizer, seq_len=seq_len))
    texts = documents["train"] + documents["held_out"]
    tokenizer = Tokenizer(tokenizer._backend)  # with an empty cache
    ours, ours_wall, ours_cpu = timed(lambda: encode_all(tokenizer.encode_arrays, texts))
    library, library_wall, library_cpu = timed(lambda: encode_all(lambda chunk: library_arrays(tokenizer._backend, chunk), texts))
    assert all(map(np.array_equal, ours, library)), "data/pretokenize.py changes tokens"
    n_tokens = sum(count["tokens"] for split in manifest["splits"].values() for count in split.values())
    return {
        "vocab_size": vocab_size,
        "tokens": n_tokens,
        "characters": sum(map(len, texts)),
        "splits": manifest["splits"],
        "seconds": {
            "train tokenizer": [train_wall, train_cpu],
            "tokenize and pack": [wall, cpu],
            "tokenize": [ours_wall, ours_cpu],
            "tokenize, library": [library_wall, library_cpu],
        },
        "speedup": {"wall": library_wall / ours_wall, "processor": library_cpu / ours_cpu},
    }


def encode_all(encode, texts: list[str]) -> list[np.ndarray]:
    return [ids for chunk in chunks(texts, CHUNK_CHARACTERS) for ids in encode(chunk)]


def library_arrays(backend, texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(encoding.ids, np.int32) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def show(result: dict) -> None:
    print(
        f"\nvocabulary {result['vocab_size']:,}: {result['tokens']:,} tokens (ends of text included), "
        f"{result['characters'] / result['tokens']:.2f} characters per token, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for name, (wall, cpu) in result["seconds"].items():
        print(f"  {name:<24}{wall:>7.1f} s {cpu:>7.1f} s of processor {result['tokens'] / wall:>12,.0f} tokens/s")
    print(f"  faster than the library: {result['speedup']['wall']:.2f}x wall, {result['speedup']['processor']:.2f}x processor")
    print(f"  {'domain':<11}{'split':<10}{'documents':>10}{'bytes':>12}{'tokens':>11}{'records':>9}{'bytes/token':>13}")
    for split, counts in result["splits"].items():
        for domain, count in counts.items():
            print(
                f"  {domain:<11}{split:<10}{count['documents']:>10,}{count['bytes']:>12,}{count['tokens']:>11,}{count['records']:>9,}"
                f"{count['bytes'] / count['tokens']:>13.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path("data/wheels"))
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/tokenize_corpus.json"))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        build_documents(Path(folder), tuple(SOURCES), Wheels(arguments.wheels), held_out_fraction=0.1, max_documents=None)
        for vocab_size in arguments.vocab_sizes:
            results.append(measure(Path(folder), vocab_size, arguments.seq_len))
            show(results[-1])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
