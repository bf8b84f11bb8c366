"""Safetensors files of a Hugging Face folder: read tensor by tensor, written tensor by tensor, so that one at a time is in memory."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from plasticity_jax.errors import UserError, reason

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 10**9  # per file; a whole shard is in memory while it is written

# safetensors names of the dtypes that float32 can represent exactly.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor, as described in the header of its file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class Weights:
    """The tensors of a folder's model.safetensors, or of the shards listed in its index.

    Attributes:
      files: the files with the tensors, and the index if there is one.
      tensors: file, shape and dtype of each tensor, by name.
    Raises:
      UserError: no safetensors file, an index that is wrong or points outside the folder, a missing or damaged file, an unsupported dtype.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / SINGLE).is_file():
            self.files, placed = [folder / SINGLE], None
        elif (folder / INDEX).is_file():
            placed = _weight_map(folder / INDEX)
            self.files = [folder / INDEX, *(folder / name for name in sorted(set(placed.values())))]
        else:
            raise _no_weights(folder)
        self.tensors: dict[str, Stored] = {}
        for file in (f for f in self.files if f.name != INDEX):
            self.tensors |= _header(file)
        if placed is not None:
            self._check_index(placed)

    def read(self, name: str, part: slice | tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or a part of it, in its stored dtype. Raises UserError if the file cannot be read."""
        file = self.tensors[name].file
        try:
            # Not with mmap: if the file is truncated while it is read, the process is killed.
            with safe_open(file, framework="numpy", backend="pread") as opened:
                return opened.get_tensor(name) if part is None else opened.get_slice(name)[part]
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    def _check_index(self, placed: dict[str, str]) -> None:
        for name, file in placed.items():
            stored = self.tensors.get(name)
            if stored is None or stored.file.name != file:
                raise UserError(f"{self.folder / INDEX} says that {file} holds {name}, but it does not; copy the folder again.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not placed or not all(isinstance(file, str) for file in placed.values()):
            raise ValueError("its weight_map is empty or holds values that are not file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files ({type(error).__name__}: {error}); copy the folder again.") from error
    for name, file in placed.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", file):
            raise UserError(
                f"{index} places {name} in {file!r}; a file must lie in the index's own folder and end in .safetensors: copy the folder again."
            )
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file} is missing, and {index.name} places {name} in it; copy the file into the folder.")
    return placed


def _no_weights(folder: Path) -> UserError:
    names = sorted(path.name for path in folder.iterdir())
    safe = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if safe:
        return UserError(
            f"{folder} holds {safe[0]}, but neither {SINGLE} nor {INDEX}; rename a single file to {SINGLE}, or add the index of several."
        )
    if pickles:
        return UserError(
            f"{folder / pickles[0]} is a pickle, which can run arbitrary code when it is read, so it is refused; "
            "save the model as safetensors (save_pretrained does) and give that folder."
        )
    return UserError(f"{folder} holds no weights (no {SINGLE}, no {INDEX}); give the folder that save_pretrained wrote.")


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy", backend="pread") as opened:
            described = {name: opened.get_slice(name) for name in opened.keys()}
            found = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in described.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    for name, (_, code) in found.items():
        if code not in DTYPES:
            raise UserError(f"{file}: tensor {name} has dtype {code}; supported are {', '.join(DTYPES)}: save the model in one of these.")
    return {name: Stored(file, shape, DTYPES[code]) for name, (shape, code) in found.items()}


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read as safetensors and may be truncated ({reason(error)}); copy the file again.")


# ------------------------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class ToWrite:
    """A tensor to write. `values` returns its array, in C order, when its shard is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_weights(folder: Path, tensors: Sequence[ToWrite]) -> None:
    """Writes tensors as model.safetensors, or as shards of up to MAX_SHARD_BYTES with their index, one shard in memory at a time.

    Args:
      folder: an existing folder that nobody reads before this returns.
    """
    shards: list[list[ToWrite]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Sequence[ToWrite]) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors would let nobody but its owner read the file
    save_file({tensor.name: tensor.values() for tensor in tensors}, path, metadata={"format": "pt"})
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
