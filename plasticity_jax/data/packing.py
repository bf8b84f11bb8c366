"""Documents to fixed-length token records: concatenate with an end-of-text token after each, cut, never pad."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import Int

from plasticity_jax.data.documents import SPLITS, read_documents
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.progress import Progress

MANIFEST = "tokens.json"
# Enough text per call to share the work well, and little enough that the tokens of a corpus never lie in memory at once.
CHUNK_CHARACTERS = 4_000_000


def pack(documents: Iterable[Sequence[int]], *, eos_id: int, record_length: int) -> Iterator[tuple[Int[np.ndarray, " record_length"], int]]:
    """Cuts a stream of documents, each followed by `eos_id`, into records that do not overlap.

    Args:
      documents: token ids of each document, in order.
      eos_id: the token that ends a document.
      record_length: tokens per record; T + 1 for a model that reads T.
    Yields:
      (int32 [record_length], index of the document that the record's first token belongs to). What does not fill the last record is dropped:
      the number of tokens in (documents and their ends) modulo `record_length`.
    """
    record, filled, first_document = np.empty(record_length, np.int32), 0, 0
    for index, document in enumerate(documents):
        tokens = np.append(np.asarray(document, np.int32), np.int32(eos_id))
        start = 0
        while start < len(tokens):
            if filled == 0:
                first_document = index
            n = min(record_length - filled, len(tokens) - start)
            record[filled:filled + n] = tokens[start:start + n]
            filled, start = filled + n, start + n
            if filled == record_length:
                yield record, first_document
                record, filled = np.empty(record_length, np.int32), 0


def write_token_records(out: Path, documents_dir: Path, tokenizer: Tokenizer, *, seq_len: int) -> dict:
    """Tokenises the documents and writes each split as packed records, every record of one domain.

    Writes `<split>.array_record` (one record: seq_len + 1 token ids, uint16 or uint32, little endian), `<split>.domain_of.npy` (index
    into the list of domains), `<split>.document_of.npy` (position, in the order of `read_documents`, of the document that the record
    begins in), and last `tokens.json`, without which `TokenRecords` opens nothing.

    Args:
      out: folder for the records.
      documents_dir: what `build_documents` wrote.
      tokenizer: its vocabulary decides between uint16 and uint32.
      seq_len: tokens that the model reads, T; a record holds one more.
    Returns:
      The content of tokens.json: seq_len, vocab_size, dtype, domains, tokenizer (its fingerprint), fingerprint (sha256 over all
      records), and splits[split][domain] = {documents, tokens (ends of text included), bytes (UTF-8, of text), records, dropped_tokens}.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    documents = {split: list(read_documents(documents_dir, split)) for split in SPLITS}
    domains = sorted({domain for split in SPLITS for _, _, domain in documents[split]})
    digest = hashlib.sha256()
    counts = {}
    with Progress("tokenise and pack", total=sum(map(len, documents.values())), unit="documents") as progress:
        for split in SPLITS:
            counts[split] = _write_split(out, split, documents[split], tokenizer, domains, dtype, seq_len + 1, digest, progress)
    manifest = {"seq_len": seq_len, "vocab_size": tokenizer.vocab_size, "dtype": dtype.str, "domains": domains, "splits": counts,
                "tokenizer": tokenizer.fingerprint, "fingerprint": digest.hexdigest()}
    partial = out / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out / MANIFEST)
    return manifest


def records_path(directory: Path, split: str) -> Path:
    """The file of a split's records."""
    return Path(directory) / f"{split}.array_record"


def index_path(directory: Path, split: str, name: str) -> Path:
    """The file of a per-record array of a split: `name` is "domain_of" or "document_of"."""
    return Path(directory) / f"{split}.{name}.npy"


def _write_split(out: Path, split: str, documents: list[tuple[str, str, str]], tokenizer: Tokenizer, domains: list[str], dtype: np.dtype,
                 record_length: int, digest, progress: Progress) -> dict:
    from array_record.python.array_record_module import ArrayRecordWriter

    counts = {}
    domain_of, document_of = [], []
    writer = ArrayRecordWriter(str(records_path(out, split)), "group_size:1,uncompressed")
    first = 0
    for domain, group in groupby(documents, key=lambda document: document[2]):
        texts = [text for _, text, _ in group]
        count = {"documents": len(texts), "tokens": 0, "bytes": 0, "records": 0, "dropped_tokens": 0}
        encoded = _encode_counted(texts, tokenizer, count, progress)
        for record, document in pack(encoded, eos_id=tokenizer.eos_id, record_length=record_length):
            content = record.astype(dtype).tobytes()
            digest.update(content)
            writer.write(content)
            count["records"] += 1
            domain_of.append(domains.index(domain))
            document_of.append(first + document)
        count["dropped_tokens"] = count["tokens"] - count["records"] * record_length
        counts[domain] = count
        first += len(texts)
    writer.close()
    np.save(index_path(out, split, "domain_of"), np.asarray(domain_of, np.int32), allow_pickle=False)
    np.save(index_path(out, split, "document_of"), np.asarray(document_of, np.int32), allow_pickle=False)
    return counts


def _encode_counted(texts: list[str], tokenizer: Tokenizer, count: dict, progress: Progress) -> Iterator[Int[np.ndarray, " tokens"]]:
    for chunk in _chunks(texts):
        encoded = tokenizer.encode_arrays(chunk)
        count["tokens"] += sum(map(len, encoded)) + len(encoded)
        count["bytes"] += sum(len(text.encode("utf-8")) for text in chunk)
        yield from encoded
        progress.update(len(chunk))


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
