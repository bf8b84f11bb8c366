"""Turns one part of a corpus into one shard of token records, a folder that is written atomically."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from plasticity_jax.data.packing import Packer, SplitWriter, chunks, token_dtype
from plasticity_jax.data.sources import SPLITS, split_of
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.runs.jsonfiles import read_json, write_json

MANIFEST = "shard.json"
# Text per tokenizer call, which needs several hundred bytes of memory per token.
CHUNK_CHARACTERS = 500_000


@runtime_checkable
class Part(Protocol):
    """The source of a shard's texts. Picklable, so that another process can read it."""

    def source(self) -> dict[str, Any]: ...

    def texts(self, text_field: str) -> Iterator[str]: ...


@dataclass(frozen=True)
class ShardSettings:
    """The settings that a shard's records depend on, besides its texts. `tokenizer` is a fingerprint."""

    tokenizer: str
    eos_id: int
    seq_len: int
    text_field: str
    held_out_fraction: float


class Interrupted(Exception):
    """The work on a shard was canceled."""


def finished_shard(folder: Path, part: Part, settings: ShardSettings) -> dict | None:
    """The manifest of a shard from an earlier run, or None.

    Raises:
      UserError: it was made from different text or with different settings.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    for name, expected in (vars(settings) | {"source": part.source()}).items():
        found = manifest["source"] if name == "source" else manifest["settings"].get(name)
        if found != expected:
            raise UserError(
                f"shard {folder} was made with {name} {_short(found)}, and this study has {_short(expected)}; delete {folder.parent} to make "
                "new shards"
            )
    return manifest


def write_shard(folder: Path, part: Part, tokenizer: Tokenizer, settings: ShardSettings, *, on_chunk: Callable[[int, int], None]) -> dict:
    """Tokenizes and packs the texts of a part.

    Writes `<split>.array_record` and `<split>.document_of.npy` (index of the document, within the shard's split, that a record starts in) for
    both splits, and `shard.json`. Skips empty texts. Packs each split separately.

    Args:
      folder: of the shard. Written as `<folder>.<process id>.partial`, which is renamed at the end.
      part: the texts to read.
      tokenizer: its fingerprint is `settings.tokenizer`.
      on_chunk: called with (documents, tokens) done since the last call; may raise to cancel the work.
    Returns:
      The content of shard.json: settings, source, dtype, and splits[split] = {documents, tokens (ends of text included), bytes (UTF-8, of text),
      records, dropped_tokens, sha256 (of the records)}.
    Raises:
      UserError: see the part's `texts`.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _write(partial, part, tokenizer, settings, on_chunk)
        _to_disk(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # otherwise another process has written the same shard
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(out: Path, part: Part, tokenizer: Tokenizer, settings: ShardSettings, on_chunk: Callable[[int, int], None]) -> dict:
    dtype = token_dtype(tokenizer.vocab_size)
    record_length = settings.seq_len + 1
    packers = {split: Packer(eos_id=settings.eos_id, record_length=record_length) for split in SPLITS}
    writers = {split: SplitWriter(out, split, dtype) for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    counts: dict[str, dict[str, Any]] = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    for chunk in chunks(filter(None, part.texts(settings.text_field)), CHUNK_CHARACTERS):
        n_tokens = 0
        for text, ids in zip(chunk, tokenizer.encode_arrays(chunk)):
            split = split_of(text, settings.held_out_fraction)
            for record, document in packers[split].add(ids):
                digests[split].update(writers[split].write(record, document))
            counts[split]["documents"] += 1
            counts[split]["tokens"] += len(ids) + 1
            counts[split]["bytes"] += len(text.encode("utf-8"))
            n_tokens += len(ids) + 1
        on_chunk(len(chunk), n_tokens)
    for split in SPLITS:
        writers[split].close()
        records = len(writers[split])
        counts[split] |= {
            "records": records,
            "dropped_tokens": counts[split]["tokens"] - records * record_length,
            "sha256": digests[split].hexdigest(),
        }
    manifest = {"settings": vars(settings), "source": part.source(), "dtype": dtype.str, "splits": counts}
    write_json(out / MANIFEST, manifest)
    return manifest


def _to_disk(folder: Path) -> None:
    # The contents must reach the disk before the rename.
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
