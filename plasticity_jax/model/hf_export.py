"""Exports a run as a Hugging Face folder that transformers loads."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.tokenizer import CONFIG_FILE, END_OF_TEXT, PADDING, Tokenizer, copy_companions
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.hf_config import describe
from plasticity_jax.model.hf_import import GENERATION_FILE, imported_from, is_hugging_face, read_tokenizer
from plasticity_jax.model.hf_names import Part, family_of, parts
from plasticity_jax.model.hf_tensors import DTYPES_BY_NAME, ToWrite, write_weights
from plasticity_jax.model.load import open_checkpoints, open_model_run
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.progress import Progress
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import write_json
from plasticity_jax.runs.storage import AnyPath, is_local, upload


def export_model(path: AnyPath, out: AnyPath, dtype: str | None) -> None:
    """Writes the model of a finished run as config.json, safetensors, generation_config.json and the tokenizer's files.

    Args:
      out: a path that does not exist, or an empty folder. On a disk it appears complete or not at all; on a store config.json is written last.
      dtype: dtype of all tensors. None keeps the source's dtypes for an import, and means float32 for every other run, fine-tuned imports included.
    Raises:
      UserError: there is no finished run with a model, `out` is not empty, no Hugging Face architecture matches, or a value overflows `dtype`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder; give another, or remove it.")
    if is_hugging_face(path):
        raise UserError(f"--model={path} is a Hugging Face folder already; give the directory of a run, such as one that plasticity import made.")
    directory = open_model_run(path)
    model, stage = directory.config().model, directory.run().stage
    family = family_of(model)
    if family is None:
        raise UserError(
            f"{path}: model.norm_position={model.norm_position} with model.qk_norm={model.qk_norm} is not a Hugging Face architecture; "
            "pre without (Llama) and post with (OLMo-2) are."
        )
    if model.d_model % model.n_heads:
        raise UserError(
            f"{path}: model.d_model={model.d_model} is not divisible by model.n_heads={model.n_heads}, which transformers requires "
            "even if the head size is given; it cannot be exported."
        )
    tokenizer, source = read_tokenizer(path, model), imported_from(directory)
    default, others = dtype or "float32", {}
    if dtype is None and stage == "import" and source is not None:
        default, others = source["dtype"], source["other_dtypes"]
    tensors = parts(model, family)
    with _atomic_folder(out) as partial:
        total = sum(part.size for part in tensors)
        with open_checkpoints(path) as checkpoints, Progress(f"write {out.name}", total=total, unit="parameters") as progress:
            leaves = _Leaves(checkpoints, model)
            write_weights(partial, [_to_write(leaves, part, DTYPES_BY_NAME[others.get(part.name, default)], progress) for part in tensors])
        settings = unrelated_settings(directory, tokenizer, source)
        write_json(partial / "config.json", describe(model, family, default, settings))
        _write_companions(path, tokenizer, settings, partial)


@contextlib.contextmanager
def _atomic_folder(out: AnyPath) -> Iterator[Path]:
    """Yields a local folder that becomes `out` if the block ends without an error."""
    if not is_local(out):
        with tempfile.TemporaryDirectory(prefix="plasticity-export-") as folder:
            yield Path(folder)
            upload(Path(folder), out, last="config.json")
        return
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Leaves:
    """The parameters of a checkpoint, one in memory at a time."""

    def __init__(self, checkpoints: Checkpoints, model: ModelConfig):
        self._checkpoints, self._step = checkpoints, checkpoints.latest_step()
        self._abstract = abstract_params(model)
        self._index = {path: index for index, path in enumerate(param_paths(self._abstract))}
        self._path = ""
        self._leaf = np.zeros(0)

    def __getitem__(self, path: str) -> np.ndarray:
        if path != self._path:
            self._leaf = np.zeros(0)  # frees the previous array before reading the next
            self._leaf = self._checkpoints.restore_array(self._step, self._abstract, self._index[path])
            self._path = path
        return self._leaf


def _to_write(leaves: _Leaves, part: Part, dtype: np.dtype, progress: Progress) -> ToWrite:
    def values() -> np.ndarray:
        tensor = leaves[part.path][... if part.layer is None else part.layer]
        tensor = tensor.T if part.transposed else tensor
        with np.errstate(over="ignore"):
            narrowed = tensor.astype(dtype, order="C", copy=False)
        if dtype == np.float16 and np.isinf(narrowed).any() and not np.isinf(tensor).any():
            raise UserError(
                f"--dtype=float16: the tensor {part.name} holds {np.abs(tensor).max():g}, but the largest float16 is 65504; use bfloat16 or float32."
            )
        progress.update(part.size)
        return narrowed

    return ToWrite(part.name, part.shape, dtype, values)


def unrelated_settings(directory: RunDirectory, tokenizer: Tokenizer | None, source: dict[str, Any] | None) -> dict[str, Any]:
    """Entries of config.json that do not describe the network: the source's for an import and its descendants, otherwise this run's."""
    scaling = directory.config().model.rope_scaling
    own = {
        "max_position_embeddings": max(directory.config().train.seq_len, int(scaling.factor * scaling.original_length) if scaling else 0),
        "initializer_range": 0.02,
    }
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        ends = list(tokenizer.eos_ids)
        ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad_id}
    return own | ids if source is None else own | source["carried"]


def _write_companions(run: AnyPath, tokenizer: Tokenizer | None, settings: dict[str, Any], folder: Path) -> None:
    copy_companions(run, folder)
    ids = {name: value for name, value in settings.items() if name.endswith("_token_id") and value is not None}
    if ids and not (folder / GENERATION_FILE).exists():
        write_json(folder / GENERATION_FILE, ids)
    if tokenizer is not None and not (folder / CONFIG_FILE).exists():  # a tokenizer trained here
        write_json(
            folder / CONFIG_FILE,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT if tokenizer.pad_id == tokenizer.eos_id else PADDING,
                "model_max_length": settings["max_position_embeddings"],
                "clean_up_tokenization_spaces": False,
            },
        )
