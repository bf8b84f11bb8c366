"""Models that exist before a study (`grid.models`): Hugging Face folders, and finished runs of any study. What each is, by its content, and a copy of it."""

import functools
from dataclasses import dataclass
from typing import Any

from plasticity_jax.config import ModelConfig, StudyConfig, to_dict
from plasticity_jax.data.tokenizer import companions, copy_companions
from plasticity_jax.errors import UserError
from plasticity_jax.model.hf_export import unrelated_settings
from plasticity_jax.model.hf_import import (
    import_fields,
    imported_from,
    is_hugging_face,
    read_folder,
    read_tokenizer,
    readable_name,
    save_params,
    with_network,
)
from plasticity_jax.model.hf_names import family_of
from plasticity_jax.model.load import open_model_run, restore
from plasticity_jax.model.param_count import count_params
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.runs.directory import CHECKPOINTS, CONFIG, DONE, RunDirectory
from plasticity_jax.runs.storage import AnyPath, location


@dataclass(frozen=True)
class Existing:
    """A model that exists.

    Attributes:
      path: its place.
      name: readable.
      fields: what identifies it: the hashes of its files, and its network.
      model: its network.
    """

    path: AnyPath
    name: str
    fields: dict[str, Any]
    model: ModelConfig


def open_existing(place: str) -> Existing:
    """The model at a place. No weights are read; a process hashes a file again only when it has changed.

    Raises:
      UserError: nothing is there, it is neither a Hugging Face folder nor a finished run with a model, or it cannot be read.
    """
    try:
        path = location(place).expanduser()
        if path.is_dir():
            version = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime) for file in path.iterdir() if file.is_file()))
            return _open(path, version)
    except UserError as error:
        raise UserError(f"grid.models: {error}") from error
    raise UserError(
        f"grid.models: {place} is no folder; give a Hugging Face folder or the directory of a finished run, seen from the current folder."
    )


@functools.lru_cache(maxsize=4096)
def _open(path: AnyPath, version: Any) -> Existing:
    if is_hugging_face(path):
        return Existing(path, *import_fields(path))
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is neither a Hugging Face folder, which has config.json and safetensors, nor a run; correct the path.")
    directory = open_model_run(path)
    if directory.state()[0] == "diverged":
        raise UserError(f"{path} has diverged ({directory.state()[1]}), so there is no model to go on from; leave it out.")
    run, model = directory.run(), directory.config().model
    if run.stage == "import":
        return Existing(path, run.name, run.fields, model)
    beside = companions(path)
    held = {name: digest for name, (_, digest) in sorted(directory.recorded().items()) if name.startswith(f"{CHECKPOINTS}/") or name in beside}
    return Existing(path, readable_name(run.name), {"files": held or {DONE: run.hash}, "model": to_dict(model)}, model)


def with_existing(config: StudyConfig, place: str) -> StudyConfig:
    """A study's config for the runs on a model that exists: with its network and its tokenizer. Raises UserError: see `open_existing`."""
    existing = open_existing(place)
    return with_network(config, existing.model, existing.path)


def copy_existing(existing: Existing, directory: RunDirectory) -> dict[str, Any]:
    """Writes the model into the directory of an import run that is being worked on; its results, as `hf_import.read_folder` gives them."""
    path, model = existing.path, existing.model
    if is_hugging_face(path):
        return read_folder(path, directory)
    source = open_model_run(path)
    copy_companions(path, directory.path)
    save_params(directory, restore(path, abstract_params(model)))
    directory.provenance |= {"source": source.run().id}
    if source.run().stage == "import":
        return source.results()
    family = family_of(model)
    return {
        "parameters": count_params(model),
        "architecture": "" if family is None else family.architecture,
        "dtype": "float32",
        "other_dtypes": {},
        "carried": unrelated_settings(source, read_tokenizer(path, model), imported_from(source)),
    }
