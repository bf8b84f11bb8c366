"""Writes the corpus as a TFDS data set of documents with their origin, split by document hash."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.read_only_builder import ReadOnlyBuilder

from plasticity_jax.data.sources import SOURCES, SPLITS, Document, split_of
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError
from plasticity_jax.progress import Progress
from plasticity_jax.runs.jsonfiles import read_json, write_json

FIELDS = ("id", "text", "domain", "source", "licence")
MANIFEST = "documents.json"

tfds.disable_progress_bar()  # ours is shown instead


class _OwnInfo:
    """Keeps a builder's info with the builder. TFDS memoizes `info` for all builders, so that a process would keep every one that it has made."""

    @functools.cached_property
    def info(self) -> tfds.core.DatasetInfo:
        return self._info()  # pyright: ignore[reportAttributeAccessIssue]


class FinishedDocuments(_OwnInfo, ReadOnlyBuilder, skip_registration=True):
    """A data set that lies in a folder, as `tfds.builder_from_directory` opens it."""


class CorpusDocuments(_OwnInfo, tfds.core.GeneratorBasedBuilder):
    """Documents of several domains, one per example: id, text, domain, source (package==version:file) and license.

    The configuration is named by the hash of the content, because TFDS considers any folder with that name and version complete,
    whatever text it contains.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, documents: dict[str, list[Document]], fingerprint: str, **kwargs):
        self._documents = documents
        config = tfds.core.BuilderConfig(name=fingerprint, version=self.VERSION, description="content hash of the documents")
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(CorpusDocuments.__doc__ or "").partition("\n")[0],
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in FIELDS}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for document in self._documents[split]:
            yield document.id, {field: getattr(document, field) for field in FIELDS}


def build_documents(out: Path, sources: tuple[str, ...], wheels: Wheels, *, held_out_fraction: float, max_documents: int | None) -> dict:
    """Reads the sources, splits them by document hash and writes the TFDS data set under `out`.

    `tfds.builder_from_directory(out / result["directory"])` reads it without this package. Replaces an earlier data set under `out` if its
    content differs.

    Args:
      out: folder of the data set.
      sources: names in SOURCES.
      wheels: the sources' packages.
      held_out_fraction: expected fraction of documents to hold out, in (0, 1).
      max_documents: maximum per source, taken in the order of the id's hash; None for all.
    Returns:
      The content of documents.json: directory (relative to `out`), fingerprint (sha256 over documents and splits), held_out_fraction,
      max_documents, splits[split][domain] = {documents, bytes (UTF-8)}, licences[source].
    Raises:
      UserError: a source is unknown, a wheel is missing or altered, or a split is empty.
    """
    splits = _read_splits(sources, wheels, held_out_fraction=held_out_fraction, max_documents=max_documents)
    fingerprint = _fingerprint(splits)
    written = _manifest(out)
    if written is None or written["fingerprint"] != fingerprint:
        out.mkdir(parents=True, exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(out / CorpusDocuments.name, ignore_errors=True)
    with quiet_tfds():
        builder = CorpusDocuments(documents=splits, fingerprint=fingerprint[:16], data_dir=str(out))
        builder.download_and_prepare()
    manifest = {
        "directory": str(Path(builder.data_dir).relative_to(out)),
        "fingerprint": fingerprint,
        "held_out_fraction": held_out_fraction,
        "max_documents": max_documents,
        "splits": {split: _count(documents) for split, documents in splits.items()},
        "licences": {name: SOURCES[name].licence for name in sorted(set(sources))},
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def read_documents(directory: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """The documents of a split as (id, text, domain), ordered by domain and then by the hash of the id.

    Args:
      directory: the `out` of `build_documents`.
      split: "train" or "held_out".
    Raises:
      UserError: the data set is not finished, or there is no such split.
    """
    manifest = _manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} holds no finished corpus ({MANIFEST} is missing); run `plasticity prepare` for this study")
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; the corpus has {' and '.join(SPLITS)}")
    with quiet_tfds():
        examples = FinishedDocuments(str(Path(directory) / manifest["directory"])).as_data_source(split)  # pyright: ignore[reportCallIssue]
    documents = [
        tuple(example[field].decode("utf-8") for field in ("id", "text", "domain")) for example in examples.__getitems__(range(len(examples)))
    ]
    yield from sorted(documents, key=lambda document: (document[2], _hash(document[0])))


def _read_splits(sources: tuple[str, ...], wheels: Wheels, *, held_out_fraction: float, max_documents: int | None) -> dict[str, list[Document]]:
    for name in sources:
        if name not in SOURCES:
            raise UserError(f"source {name!r} is unknown; the sources are {', '.join(sorted(SOURCES))}")
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    with Progress("read documents", total=None, unit="documents") as progress:
        for name in sorted(set(sources)):
            documents = sorted(SOURCES[name].read(wheels), key=lambda document: _hash(document.id))[:max_documents]
            for document in documents:
                splits[split_of(document.text, held_out_fraction)].append(document)
            progress.update(len(documents), note=name)
    for split, documents in splits.items():
        if not documents:
            n = sum(map(len, splits.values()))
            raise UserError(
                f"held_out_fraction={held_out_fraction} leaves no {split} document out of {n}; move it towards 0.5 or raise max_documents"
            )
    return splits


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Silences TFDS on standard output and in the log."""
    # TFDS prints to standard output, which `--json` uses, and announces downloads that do not happen.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _fingerprint(splits: dict[str, list[Document]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in splits[split]:
            digest.update(json.dumps([split] + [getattr(document, field) for field in FIELDS]).encode("ascii"))
    return digest.hexdigest()


def _count(documents: list[Document]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for document in documents:
        count = counts.setdefault(document.domain, {"documents": 0, "bytes": 0})
        count["documents"] += 1
        count["bytes"] += len(document.text.encode("utf-8"))
    return counts


def _manifest(directory: Path) -> dict | None:
    path = Path(directory) / MANIFEST
    return read_json(path) if path.is_file() else None


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()
