"""Identifies the inputs of corpora and tasks: settings, pinned wheels, and the user's own files: a corpus by names and sizes, the rows of a task by
their content."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plasticity_jax.config.schema import DataConfig
from plasticity_jax.data.content import content_hash
from plasticity_jax.data.corpus_files import folder_name, kind_of, listing, names_and_sizes
from plasticity_jax.data.named_tokenizers import NAMED, TRAINED, open_tokenizer, setting_fingerprint
from plasticity_jax.data.sources import SOURCES
from plasticity_jax.data.tasks.originals import Place, find_places, split_places
from plasticity_jax.data.wheels import Wheels, pins
from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import is_local, location


def corpus_fields(data: DataConfig) -> dict[str, Any]:
    """Returns the settings that define the token records, besides the model's vocabulary and the sequence length.

    Files, data sets and tokenizers given by path are identified by content, so that changed content makes a new run and a changed path does
    not. If they do not exist (a plan made on another machine), the path is used instead.
    """
    fields: dict[str, Any] = {"held_out_fraction": data.held_out_fraction}
    packages: set[str] = set()
    if data.files is not None:
        fields |= {"files": _content(folder_name(data.files), data.files, listing(data.files))}
    elif data.tfds is not None:
        from plasticity_jax.data.corpus_tfds import data_set_listing

        fields |= {"tfds": _content(folder_name(data.tfds), data.tfds, data_set_listing(data.tfds)), "tfds_split": data.tfds_split}
    elif data.token_files is not None:
        fields |= {"token_files": _token_content(data.token_files, data.token_dtype), "token_dtype": data.token_dtype, "max_tokens": data.max_tokens}
        fields |= {} if data.token_eos_id is None else {"token_eos_id": data.token_eos_id}
    else:
        fields |= {"sources": data.sources, "max_documents": data.max_documents}
        packages = {package for name in data.sources for package in SOURCES[name].packages}
    if data.files is not None or data.tfds is not None:
        fields |= {"text_field": data.text_field, "max_tokens": data.max_tokens}
    if data.tokenizer != TRAINED:
        fields["tokenizer"] = setting_fingerprint(data.tokenizer) or data.tokenizer
    if data.tokenizer in NAMED:
        packages.add(NAMED[data.tokenizer].package)
    return fields | {"wheels": {package: pins()[package].sha256 for package in sorted(packages)}}


def tokenizer_fields(setting: str, vocab_size: int) -> dict[str, Any]:
    """What defines token records of a tokenizer given by path: what it makes of a text, and its entries. Empty for one that is trained.

    Raises:
      UserError: it cannot be opened, or has more entries than `vocab_size`.
    """
    version = setting_fingerprint(setting)
    return {} if version is None else _tokenizer_fields(setting, vocab_size, version)


@functools.lru_cache(maxsize=4096)
def _tokenizer_fields(setting: str, vocab_size: int, version: str) -> dict[str, Any]:
    tokenizer = open_tokenizer(setting, Wheels(Path()), vocab_size=vocab_size)
    assert tokenizer is not None
    return {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}


def task_files(files: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Identifies the files of each of a task's sets by their kind and content, in their order, and by the split for a TFDS data set.

    A place that does not exist (a plan made on another machine) is identified by its path.

    Args:
      files: set of the task → its places (`TaskConfig.files`).
    """
    return {name: [_place_content(text, place) for text, place in zip(split_places(places), find_places(places))] for name, places in files.items()}


def newest(places: str) -> float | None:
    """When the last of a set's local files was changed, in seconds since 1970; None where one is missing, or on a store."""
    found = find_places(places)
    files = [location(place.folder).expanduser() / name for place in found if place is not None for name, _ in place.names]
    if None in found or not files or not all(map(is_local, files)):
        return None
    return max(path.stat().st_mtime for path in files)


def _place_content(text: str, place: Place | None) -> dict[str, str]:
    if place is None or not place.names:
        return {"place": text}
    files = [(kind_of(name), content_hash(location(place.folder).expanduser() / name)) for name, _ in place.names]
    return {"content": hashlib.sha256(json.dumps(files).encode()).hexdigest()} | ({} if place.split is None else {"split": place.split})


def _token_content(places: str, dtype: str) -> dict[str, str]:
    from plasticity_jax.data.token_files import find_token_files, listed

    try:
        return {"names_and_sizes": names_and_sizes(listed(find_token_files(places, dtype), dtype))}
    except UserError:  # not here, or not as they should be, which the checks before a study say
        return {"place": places}


def _content(name: str, place: str, files: list[tuple[str, int]] | None) -> dict[str, str]:
    if not files:
        return {"place": place}
    return {"name": name, "names_and_sizes": names_and_sizes(files)}
