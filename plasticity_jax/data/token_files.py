"""Corpora that are tokenized already, as AI2 publishes its mixes: raw token ids in files named .npy, read where they lie, memory-mapped.

A file is one array of little-endian integers without a header; every document ends with the end-of-text token. Nothing is copied: `prepare` reads the
files once, to check and to count, and training maps them.

Source: OLMo-core, docs/source/guides/data_loading.rst, and its numpy datasets.
"""

import glob
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from plasticity_jax.data.packing import MANIFEST, TOKENS, index_path
from plasticity_jax.data.sources import SPLITS
from plasticity_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.runs.jsonfiles import write_json

SUFFIX = ".npy"
NUMPY_MAGIC = b"\x93NUMPY"
TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids.

    Attributes:
      path: absolute.
      name: how it is called in fingerprints: its last two parts, which do not change when a mix is moved.
      tokens: ids in it.
    """

    path: str
    name: str
    tokens: int


def find_token_files(places: str, dtype: str) -> list[TokenFile]:
    """The files of comma-separated places: files, folders (with what lies below) or globs, each in the order of names.

    Raises:
      UserError: a place is empty or on a store, a file is named twice, has a NumPy header, or a size that is no multiple of the dtype's.
    """
    found: list[TokenFile] = []
    for place in filter(None, map(str.strip, places.split(","))):
        if "://" in place:
            raise UserError(f"data.token_files={place} is on a store, and token files are memory-mapped from a local disk; copy them to one first.")
        pattern = f"{place}/**/*{SUFFIX}" if os.path.isdir(os.path.expanduser(place)) else place
        paths = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
        if not paths:
            raise UserError(
                f"data.token_files={place} names no file; give {SUFFIX} files of token ids, a folder of them, or a glob such as mix/**/*{SUFFIX}."
            )
        found += [_token_file(Path(path), dtype) for path in paths]
    twice = next((one.path for i, one in enumerate(found) if one.path in {other.path for other in found[:i]}), None)
    if twice:
        raise UserError(f"data.token_files names {twice} twice; name every file once.")
    return found


def _token_file(path: Path, dtype: str) -> TokenFile:
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    with path.open("rb") as file:
        if file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            raise UserError(f"{path} has a NumPy header, and token files are raw ids without one; write it with numpy.memmap or ndarray.tofile.")
    if size == 0 or size % width:
        raise UserError(f"{path} has {size} bytes, which are no {dtype} ids ({width} bytes each); correct data.token_dtype, or download it again.")
    return TokenFile(str(path.resolve()), "/".join(path.resolve().parts[-2:]), size // width)


def listed(files: Sequence[TokenFile], dtype: str) -> list[tuple[str, int]]:
    """(name, bytes) of files, which identify them in a run's hash."""
    return [(file.name, file.tokens * np.dtype(dtype).itemsize) for file in files]


def prepare_tokens(
    directory: Path,
    files: Sequence[TokenFile],
    *,
    dtype: str,
    eos_id: int,
    tokenizer: Tokenizer,
    seq_len: int,
    held_out_fraction: float,
    max_tokens: int | None,
) -> dict:
    """Writes tokenizer.json and tokens/ into `directory`: what the files hold, and where each split's records lie in them.

    Of each file the last documents are held out: those after the first end of text behind 1 - `held_out_fraction` of its ids. What follows it is cut
    into records of seq_len + 1 ids that do not overlap, and so is what lies before. `max_tokens` limits the train split as in `prepare_stream`; files
    after the one that completes it are not read.

    Returns:
      JSON-able, as `prepare_stream`; tokens.json has `files` ([{path, train, held_out, held_out_start, train_documents, held_out_documents}]) in place
      of shards. fingerprint is the sha256 over the ids used.
    Raises:
      UserError: an id is beyond the tokenizer's vocabulary, or a split has no records.
    """
    out = Path(directory) / TOKENS
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    tokenizer.save(Path(directory) / TOKENIZER_FILE)
    record, wanted = seq_len + 1, None if max_tokens is None else math.ceil(max_tokens / seq_len)
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "records": 0, "dropped_tokens": 0} for split in SPLITS}
    document_of: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    used, digest, token_bytes = [], hashlib.sha256(), tokenizer.token_bytes
    with Progress("check token files", total=sum(file.tokens for file in files) if wanted is None else None, unit="tokens") as progress:
        for file in files:
            if wanted is not None and counts["train"]["records"] >= wanted:
                break
            ids = np.memmap(file.path, np.dtype(dtype).newbyteorder("<"), "r")
            start = _first_after(ids, eos_id, int(len(ids) * (1 - held_out_fraction)))
            left = None if wanted is None else wanted - counts["train"]["records"]
            n = {"train": start // record, "held_out": (len(ids) - start) // record}
            n["train"] = n["train"] if left is None else min(n["train"], left)
            entry = {"path": file.path, "held_out_start": start} | n
            for split, first in (("train", 0), ("held_out", start)):
                ends = _check_part(ids[first : first + n[split] * record], file, first, eos_id, token_bytes, counts[split], digest, progress)
                starts = np.arange(n[split], dtype=np.int64) * record
                before = counts[split]["documents"]
                document_of[split].append((before + np.searchsorted(ends, starts)).astype(np.int64))
                # A last document that its end does not close here still counts as one.
                documents = len(ends) + (n[split] > 0 and not (len(ends) and ends[-1] == n[split] * record - 1))
                counts[split]["documents"] += documents
                counts[split]["records"] += n[split]
                entry[f"{split}_documents"] = documents
            counts["held_out"]["dropped_tokens"] += (len(ids) - start) % record
            counts["train"]["dropped_tokens"] += start % record if n["train"] == start // record else 0
            used.append(entry)
    for split in SPLITS:
        if not counts[split]["records"]:
            raise UserError(
                f"data.token_files leave no {split} record at train.seq_len={seq_len}, held_out_fraction={held_out_fraction}; give more files."
            )
        np.save(index_path(out, split, "document_of"), np.concatenate(document_of[split]), allow_pickle=False)
    tokens = {
        "seq_len": seq_len,
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(dtype).newbyteorder("<").str,
        "domains": ["tokens"],
        "splits": {split: {"tokens": counts[split]} for split in SPLITS},
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
        "files": used,
    }
    write_json(out / MANIFEST, tokens)
    vocabulary = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    return {"tokenizer": vocabulary, "tokens": tokens, "fingerprint": tokens["fingerprint"]}


def _first_after(ids: np.ndarray, eos_id: int, place: int) -> int:
    """The place after the first end of text at or after `place`; the length of the file if there is none."""
    for start in range(place, len(ids), TOKENS_AT_ONCE):
        ends = np.flatnonzero(ids[start : start + TOKENS_AT_ONCE] == eos_id)
        if len(ends):
            return start + int(ends[0]) + 1
    return len(ids)


def _check_part(
    ids: np.ndarray, file: TokenFile, first: int, eos_id: int, token_bytes: np.ndarray, count: dict, digest, progress: Progress
) -> Int[np.ndarray, " documents"]:
    """Checks and counts the ids of a split in a file. Returns the places of the ends of text, from the split's beginning."""
    ends = [np.empty(0, np.int64)]
    for start in range(0, len(ids), TOKENS_AT_ONCE):
        part = np.asarray(ids[start : start + TOKENS_AT_ONCE])
        if part.max() >= len(token_bytes):
            place = first + start + int(np.argmax(part >= len(token_bytes)))
            raise UserError(
                f"{file.path}: id {part.max()} (first at place {place:,}) is beyond the {len(token_bytes):,} entries of data.tokenizer; the files need the "
                "tokenizer they were made with, or another data.token_dtype."
            )
        digest.update(part.tobytes())
        ends.append(start + np.flatnonzero(part == eos_id))
        count["tokens"] += len(part)
        count["bytes"] += int(token_bytes[part].sum(dtype=np.int64))
        progress.update(len(part), note=file.name)
    return np.concatenate(ends)


class MappedRecords:
    """Random access to the records of a split in token files, with the methods of array_record's own data source.

    Args:
      files: entries of the manifest.
      split: "train" or "held_out".
      dtype: of the ids in the files.
      record_length: ids per record.
    Raises:
      UserError: a file is no longer where it was, or has become shorter.
    """

    def __init__(self, files: Sequence[dict], split: str, dtype: np.dtype, record_length: int):
        self._ends = np.cumsum([file[split] for file in files], dtype=np.int64)
        self._parts = []
        for file in files:
            first, n = file["held_out_start"] if split == "held_out" else 0, file[split] * record_length
            size = os.path.getsize(file["path"]) // dtype.itemsize if os.path.isfile(file["path"]) else 0
            if size < first + n:
                raise UserError(
                    f"{file['path']} holds {size:,} ids, and its records reach to {first + n:,}; put the file back, or delete the corpus run and prepare again."
                )
            # An empty part needs no map.
            self._parts.append(np.memmap(file["path"], dtype, "r", offset=first * dtype.itemsize, shape=(file[split], record_length)) if n else None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        """The records at `indices`, in that order."""
        found = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            place = int(np.searchsorted(self._ends, index, side="right"))
            part = self._parts[place]
            assert part is not None
            found.append(part[index - (self._ends[place - 1] if place else 0)].tobytes())
        return found
