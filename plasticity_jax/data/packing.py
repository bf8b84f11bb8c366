"""Packs documents into fixed-length token records: concatenated with an end-of-text token after each, cut, never padded."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import Int

from plasticity_jax.data.sources import SPLITS
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.progress import Progress
from plasticity_jax.runs.jsonfiles import write_json

TOKENS = "tokens"  # folder of the token records within a corpus run
MANIFEST = "tokens.json"
# Text per tokenizer call: enough to use all threads, and far less than a whole corpus in memory.
CHUNK_CHARACTERS = 4_000_000


class Packer:
    """Cuts a stream of documents, each followed by `eos_id`, into non-overlapping records.

    Args:
      eos_id: the token that ends a document.
      record_length: tokens per record; T + 1 for a model that reads T.
    Attributes:
      documents: the number added so far.
    """

    def __init__(self, *, eos_id: int, record_length: int):
        self.documents = 0
        self._end = np.array([eos_id], np.int32)
        self._record = np.empty(record_length, np.int32)
        self._filled = self._first_document = 0

    def add(self, document: Sequence[int] | np.ndarray) -> Iterator[tuple[Int[np.ndarray, " record_length"], int]]:
        """Yields the records that this document completes, each with the index of the document of its first token.

        Remaining tokens wait for the next document.
        """
        tokens = np.concatenate([np.asarray(document, np.int32), self._end])
        index, start = self.documents, 0
        self.documents += 1
        while start < len(tokens):
            if self._filled == 0:
                self._first_document = index
            n = min(len(self._record) - self._filled, len(tokens) - start)
            self._record[self._filled : self._filled + n] = tokens[start : start + n]
            self._filled, start = self._filled + n, start + n
            if self._filled == len(self._record):
                record, self._record, self._filled = self._record, np.empty_like(self._record), 0
                yield record, self._first_document


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], *, eos_id: int, record_length: int
) -> Iterator[tuple[Int[np.ndarray, " record_length"], int]]:
    """Yields the records of all documents.

    Yields:
      (int32 [record_length], index of the document of the record's first token). Drops tokens that do not fill the last record.
    """
    packer = Packer(eos_id=eos_id, record_length=record_length)
    for document in documents:
        yield from packer.add(document)


class SplitWriter:
    """Writes `<split>.array_record`, one record after another, and `<split>.document_of.npy` at the end.

    Args:
      directory: an existing folder.
      split: "train" or "held_out".
      dtype: of the tokens in the file, little-endian.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.document_of = array("q")
        self._directory, self._split, self._dtype = directory, split, dtype
        # By these options `StoreRecords` knows where a record lies.
        self._writer = ArrayRecordWriter(str(records_path(directory, split)), "group_size:1,uncompressed")

    def __len__(self) -> int:
        return len(self.document_of)

    def write(self, record: Int[np.ndarray, " record_length"], document: int) -> bytes:
        """Writes a record whose first token belongs to `document`. Returns its bytes."""
        content = record.astype(self._dtype).tobytes()
        self._writer.write(content)
        self.document_of.append(document)
        return content

    def close(self) -> None:
        self._writer.close()
        np.save(index_path(self._directory, self._split, "document_of"), np.asarray(self.document_of, np.int32), allow_pickle=False)


def token_dtype(vocab_size: int) -> np.dtype:
    """The storage dtype of tokens: 16 bits if the vocabulary fits, otherwise 32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_token_records(out: Path, documents_dir: Path, tokenizer: Tokenizer, *, seq_len: int) -> dict:
    """Tokenizes the documents and writes each split as packed records. Every record belongs to one domain.

    Writes `<split>.array_record` (one record: seq_len + 1 token ids, uint16 or uint32, little endian), `<split>.domain_of.npy` (index
    into the list of domains), `<split>.document_of.npy` (index, in the order of `read_documents`, of the document that the record
    starts in), and last `tokens.json`, which `TokenRecords` requires.

    Args:
      out: folder for the records.
      documents_dir: output of `build_documents`.
      tokenizer: the size of its vocabulary decides between uint16 and uint32.
      seq_len: tokens that the model reads, T; a record holds one more.
    Returns:
      The content of tokens.json: seq_len, vocab_size, dtype, domains, tokenizer (its fingerprint), fingerprint (sha256 over all
      records), and splits[split][domain] = {documents, tokens (ends of text included), bytes (UTF-8, of text), records, dropped_tokens}.
    """
    from plasticity_jax.data.documents import read_documents  # imports TFDS, which processes that tokenize files do not need

    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    documents = {split: list(read_documents(documents_dir, split)) for split in SPLITS}
    domains = sorted({domain for split in SPLITS for _, _, domain in documents[split]})
    digest = hashlib.sha256()
    counts = {}
    with Progress("tokenize and pack", total=sum(map(len, documents.values())), unit="documents") as progress:
        for split in SPLITS:
            counts[split] = _write_split(out, split, documents[split], tokenizer, domains, dtype, seq_len + 1, digest, progress)
    manifest = {
        "seq_len": seq_len,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
        "domains": domains,
        "splits": counts,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def records_path(directory: Path, split: str) -> Path:
    """The file of a split's records."""
    return Path(directory) / f"{split}.array_record"


def index_path(directory: Path, split: str, name: str) -> Path:
    """The file of a per-record array of a split: `name` is "domain_of" or "document_of"."""
    return Path(directory) / f"{split}.{name}.npy"


def _write_split(
    out: Path,
    split: str,
    documents: list[tuple[str, str, str]],
    tokenizer: Tokenizer,
    domains: list[str],
    dtype: np.dtype,
    record_length: int,
    digest,
    progress: Progress,
) -> dict:
    counts = {}
    domain_of = array("i")
    writer = SplitWriter(out, split, dtype)
    first = 0
    for domain, group in groupby(documents, key=lambda document: document[2]):
        texts = [text for _, text, _ in group]
        count = {"documents": len(texts), "tokens": 0, "bytes": 0, "records": 0, "dropped_tokens": 0}
        encoded = _encode_counted(texts, tokenizer, count, progress)
        for record, document in pack(encoded, eos_id=tokenizer.eos_id, record_length=record_length):
            digest.update(writer.write(record, first + document))
            count["records"] += 1
            domain_of.append(domains.index(domain))
        count["dropped_tokens"] = count["tokens"] - count["records"] * record_length
        counts[domain] = count
        first += len(texts)
    writer.close()
    np.save(index_path(out, split, "domain_of"), np.asarray(domain_of, np.int32), allow_pickle=False)
    return counts


def _encode_counted(texts: list[str], tokenizer: Tokenizer, count: dict, progress: Progress) -> Iterator[Int[np.ndarray, " tokens"]]:
    for chunk in chunks(texts, CHUNK_CHARACTERS):
        encoded = tokenizer.encode_arrays(chunk)
        count["tokens"] += sum(map(len, encoded)) + len(encoded)
        count["bytes"] += sum(len(text.encode("utf-8")) for text in chunk)
        yield from encoded
        progress.update(len(chunk))


def chunks(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Groups the texts into lists of about `characters` characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
