"""Turns a large corpus of files or a TFDS data set into token records: in parallel, resumable, and never all in memory."""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plasticity_jax.data.packing import MANIFEST, TOKENS, token_dtype
from plasticity_jax.data.pool import ShardPool, available_cores
from plasticity_jax.data.shards import Part, ShardSettings, finished_shard
from plasticity_jax.data.sources import SPLITS, split_of
from plasticity_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.runs.jsonfiles import write_json

log = logging.getLogger("plasticity_jax")

SHARDS = "shards"
# Text to train a tokenizer on. More takes memory and hardly changes the merges.
TRAINING_CHARACTERS = 100_000_000


@dataclass(frozen=True)
class Corpus:
    """A corpus that is read part by part.

    Attributes:
      name: of its one domain.
      parts: returns its parts in reading order, and can be called repeatedly.
    """

    name: str
    parts: Callable[[], Iterator[Part]]


def open_corpus(*, files: str | None, tfds: str | None, tfds_split: str, text_field: str) -> Corpus:
    """Opens the corpus of a folder (`files`) or of a TFDS data set, without reading it. Raises UserError if it does not exist."""
    from plasticity_jax.data.corpus_files import check_folder, file_parts, folder_name, report_left_out, survey
    from plasticity_jax.data.corpus_tfds import data_set_name, example_parts

    if files is not None:
        check_folder(files)
        found = survey(files)
        if found is not None:
            report_left_out(f"data.files={files}", found.left_out, len(found.files))
        return Corpus(folder_name(files), lambda: file_parts(files, text_field))
    if tfds is None:
        raise ValueError("neither files nor tfds is given")
    return Corpus(data_set_name(tfds), lambda: example_parts(tfds, tfds_split, text_field))


def prepare_stream(
    directory: Path,
    corpus: Corpus,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seq_len: int,
    text_field: str,
    held_out_fraction: float,
    max_tokens: int | None,
    workers: int,
) -> dict:
    """Writes tokenizer.json and tokens/ into `directory`: one shard per part of the corpus under tokens/shards, and tokens/tokens.json last.

    Documents are held out by the hash of their text. After an interruption, another run makes the missing shards. The result is bitwise the same,
    and does not depend on `workers`.

    Args:
      directory: folder of the corpus run.
      corpus: the texts to read.
      tokenizer: None trains one of `vocab_size` entries on the first texts of the train split.
      vocab_size: rows of the model's embedding.
      seq_len: tokens that the model reads; a record holds one more.
      text_field: the field of the rows or examples with the text.
      held_out_fraction: expected fraction of documents to hold out.
      max_tokens: target tokens of the train split: keeps the first ceil(max_tokens / seq_len) train records, and the shards that contain them.
        None keeps all.
      workers: processes; 0 is one per core.
    Returns:
      JSON-able: tokens (the content of tokens.json), tokenizer {vocab_size, fingerprint}, fingerprint (of the token records, which
      identifies them for training runs), seconds {tokenizer, tokens}. tokens.json has the fields of `packing.write_token_records`, and shards: [{name, train, held_out}] with
      the number of records used of each. Documents, tokens and bytes are counted over the shards used; records and dropped_tokens reflect
      `max_tokens`. fingerprint is the sha256 over the sha256 of all shards and the records used.
    Raises:
      UserError: the input cannot be read, shards were made with different settings, or a split has no records.
    """
    directory = Path(directory)
    out = directory / TOKENS
    out.mkdir(parents=True, exist_ok=True)
    # If this run stops halfway, the records of an earlier run must not be taken for its own.
    (out / MANIFEST).unlink(missing_ok=True)
    start = time.monotonic()
    tokenizer = tokenizer or _train(corpus, vocab_size, text_field, held_out_fraction)
    tokenizer.save(directory / TOKENIZER_FILE)
    tokenizer_done = time.monotonic()
    settings = ShardSettings(tokenizer.fingerprint, tokenizer.eos_id, seq_len, text_field, held_out_fraction)
    wanted = None if max_tokens is None else math.ceil(max_tokens / seq_len)
    shards = _make_shards(
        out / SHARDS, corpus, directory / TOKENIZER_FILE, settings, wanted=wanted, max_tokens=max_tokens, workers=workers or available_cores()
    )
    tokens = _manifest(corpus, tokenizer, settings, shards, wanted)
    for name, what in (("train", "more text"), ("held_out", "more text or a larger data.held_out_fraction")):
        if not sum(shard[name] for shard in tokens["shards"]):
            raise UserError(
                f"data.held_out_fraction={held_out_fraction} and train.seq_len={seq_len} leave no {name} record of {corpus.name}; give {what}"
            )
    _remove_others(out / SHARDS, {shard["name"] for shard in tokens["shards"]})
    write_json(out / MANIFEST, tokens)
    return {
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "tokens": tokens,
        "fingerprint": tokens["fingerprint"],
        "seconds": {"tokenizer": tokenizer_done - start, "tokens": time.monotonic() - tokenizer_done},
    }


def _train(corpus: Corpus, vocab_size: int, text_field: str, held_out_fraction: float) -> Tokenizer:
    with Progress("train tokenizer", total=None, unit="documents") as progress:

        def texts() -> Iterator[str]:
            characters = 0
            for part in corpus.parts():
                for text in part.texts(text_field):
                    if split_of(text, held_out_fraction) == "train":
                        yield text
                        progress.update(1)
                        characters += len(text)
                        if characters >= TRAINING_CHARACTERS:
                            return

        return Tokenizer.train(texts(), vocab_size)


def _make_shards(
    folder: Path, corpus: Corpus, tokenizer_path: Path, settings: ShardSettings, *, wanted: int | None, max_tokens: int | None, workers: int
) -> list[tuple[str, dict]]:
    """(name, manifest) of the shards in the order of the parts, up to the one that completes the wanted records."""
    folder.mkdir(exist_ok=True)
    for partial in folder.glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    made: list[tuple[str, dict]] = []
    records = 0
    total = None if max_tokens is None else round(max_tokens / (1 - settings.held_out_fraction))
    with Progress("tokenize and pack", total=total, unit="tokens") as progress:

        def tasks() -> Iterator[tuple[Path, Part, dict | None]]:
            for index, part in enumerate(corpus.parts()):
                path = folder / f"{index:06d}"
                manifest = finished_shard(path, part, settings)
                if manifest is None:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    done = sum(count["tokens"] for count in manifest["splits"].values())
                    progress.initial += done
                    progress.update(done)
                yield path, part, manifest

        def advance(documents: int, tokens: int) -> None:
            progress.update(tokens, f"{len(made):,} shards finished")

        with ShardPool(workers, tokenizer_path, settings, on_progress=advance) as pool:
            for index, manifest in enumerate(pool.shards(tasks())):
                made.append((f"{index:06d}", manifest))
                records += manifest["splits"]["train"]["records"]
                if wanted is not None and records >= wanted:
                    break
    if wanted is not None and records < wanted:
        log.info(
            "%s has %s train tokens, fewer than data.max_tokens=%s: all are used", corpus.name, f"{records * settings.seq_len:,}", f"{max_tokens:,}"
        )
    return made


def _manifest(corpus: Corpus, tokenizer: Tokenizer, settings: ShardSettings, shards: list[tuple[str, dict]], wanted: int | None) -> dict:
    left = {"train": wanted, "held_out": None}
    used, digest = [], hashlib.sha256()
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "records": 0} for split in SPLITS}
    for name, shard in shards:
        entry = {"name": f"{SHARDS}/{name}"}
        for split in SPLITS:
            found = shard["splits"][split]
            n = found["records"] if left[split] is None else min(found["records"], left[split])
            left[split] = None if left[split] is None else left[split] - n
            entry |= {split: n, f"{split}_documents": found["documents"]}
            counts[split] = {key: counts[split][key] + (n if key == "records" else found[key]) for key in counts[split]}
            digest.update(json.dumps([split, found["sha256"], n]).encode("ascii"))
        used.append(entry)
    for count in counts.values():
        count["dropped_tokens"] = count["tokens"] - count["records"] * (settings.seq_len + 1)
    return {
        "seq_len": settings.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "domains": [corpus.name],
        "splits": {split: {corpus.name: counts[split]} for split in SPLITS},
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
        "shards": used,
    }


def _remove_others(folder: Path, names: set[str]) -> None:
    """Removes surplus shards: those in progress when the last wanted record was reached, and those of an earlier, larger run."""
    for path in folder.iterdir():
        if f"{SHARDS}/{path.name}" not in names:
            shutil.rmtree(path)
