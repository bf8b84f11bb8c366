"""From a Hugging Face folder to the decoder's parameters, and to a run directory that the stages accept."""

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from plasticity_jax.config import DataConfig, ModelConfig, StudyConfig, check_config, to_dict
from plasticity_jax.data.content import content_hash
from plasticity_jax.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, companions, copy_companions
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.hf_config import Description, read_description, read_object
from plasticity_jax.model.hf_names import EMBEDDING, HEAD, Part, parts
from plasticity_jax.model.hf_tensors import Weights
from plasticity_jax.model.transformer import Params, count_params
from plasticity_jax.parallel import lanes
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.progress import Progress
from plasticity_jax.runs.directory import CHECKPOINTS, PROVENANCE, RunDirectory
from plasticity_jax.runs.jsonfiles import read_json, write_json
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, check_checkpoint_place, is_local, joined, remove_tree

log = logging.getLogger("plasticity_jax")

SENTENCEPIECE_FILE = "tokenizer.model"
GENERATION_FILE = "generation_config.json"

# Old checkpoints store the rotary frequencies, which follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_ROWS_COMPARED = 4096


def is_hugging_face(path: AnyPath) -> bool:
    """Whether a folder holds a Hugging Face model, complete or not, rather than a run."""
    if (path / "config.json").is_file():
        return "run" not in read_object(path / "config.json")
    return path.is_dir() and any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in path.iterdir())


def open_folder(folder: AnyPath) -> tuple[Description, Weights]:
    """Reads a folder's config.json and the headers of its weights, but no weights.

    Raises:
      UserError: the folder is on an object store, something is not supported, or a tensor is missing, surplus or of the wrong shape.
    """
    if not is_local(folder):
        raise UserError(f"{folder} is a Hugging Face folder on a store, and weights are read from a local disk; copy it to one first.")
    description = read_description(folder)
    weights = Weights(folder)
    layers = description.model.n_layers
    if layers > len(weights.tensors):  # before they are listed one by one
        raise UserError(
            f"{folder / 'config.json'}: num_hidden_layers={layers} is more than the {len(weights.tensors)} tensors there; correct config.json."
        )
    expected = {part.name: part.shape for part in parts(description.model, description.family)}
    check_tensors(folder, weights, expected, tied=description.model.tie_embeddings)
    return description, weights


def check_tensors(folder: AnyPath, weights: Weights, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Checks that the tensors are those of a network.

    Args:
      expected: name → shape.
      tied: the output matrix is the embedding and may be stored twice.
    Raises:
      UserError: a tensor is missing, surplus or of the wrong shape.
    """
    missing = [name for name in expected if name not in weights.tensors]
    if missing:
        raise UserError(
            f"{folder} lacks the tensor {missing[0]} {list(expected[missing[0]])}{_and_more(missing)}; save the complete model, or correct config.json."
        )
    surplus = [name for name in weights.tensors if name not in expected and not _DERIVED.fullmatch(name)]
    if tied and HEAD in surplus:
        _check_tied(folder, weights)
        surplus.remove(HEAD)
    if surplus:
        shape = list(weights.tensors[surplus[0]].shape)
        raise UserError(
            f"{folder} holds the tensor {surplus[0]} {shape}{_and_more(surplus)}, for which config.json's network has no place; correct config.json."
        )
    for name, shape in expected.items():
        found = weights.tensors[name].shape
        if found != shape:
            raise UserError(f"{folder}: the tensor {name} has shape {list(found)}, and config.json makes it {list(shape)}; correct config.json.")


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_tied(folder: AnyPath, weights: Weights) -> None:
    """Checks that a stored output matrix equals the embedding: some writers store it twice, and a different one would be lost."""
    head, embedding = weights.tensors[HEAD], weights.tensors[EMBEDDING]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    for start in range(0, head.shape[0] if same else 0, _ROWS_COMPARED):
        rows = slice(start, min(start + _ROWS_COMPARED, head.shape[0]))
        same = same and weights.read(HEAD, rows).tobytes() == weights.read(EMBEDDING, rows).tobytes()
    if not same:
        raise UserError(
            f"{folder}: tie_word_embeddings is true, and {HEAD} is not {EMBEDDING}; set tie_word_embeddings to false in config.json to keep both."
        )


def read_params(description: Description, weights: Weights, what: str, shardings: Params | None = None) -> Params:
    """The parameters in float32, read tensor by tensor, so that memory holds at most one tensor besides them.

    Args:
      what: label of the progress display.
      shardings: where to put them; every process reads its shards only. None puts them on this process's first device.
    """
    tree: Params = {}
    placed = {} if shardings is None else dict(zip(param_paths(shardings), jax.tree.leaves(shardings), strict=True))
    by_leaf = itertools.groupby(parts(description.model, description.family), key=lambda part: part.path)
    with Progress(f"read {what}", total=count_params(description.model), unit="parameters") as progress:
        for path, group in by_leaf:
            node, (*keys, last) = tree, path.split("/")
            for key in keys:
                node = node.setdefault(key, {})
            of_leaf = list(group)
            node[last] = _leaf(weights, of_leaf) if shardings is None else _sharded_leaf(weights, of_leaf, placed[path])
            progress.update(sum(part.size for part in of_leaf))
    return tree


def _shape(of_leaf: list[Part]) -> tuple[int, ...]:
    shape = of_leaf[0].shape[::-1] if of_leaf[0].transposed else of_leaf[0].shape
    return shape if of_leaf[0].layer is None else (len(of_leaf), *shape)


def _sharded_leaf(weights: Weights, of_leaf: list[Part], sharding: NamedSharding) -> jax.Array:
    shape, held = _shape(of_leaf), {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in held:  # devices that hold the same shard share one reading
            one = of_leaf[0].layer is None
            held[key] = _part(weights, of_leaf[0], index) if one else np.stack([_part(weights, part, index[1:]) for part in of_leaf[index[0]]])
        return held[key]

    return jax.make_array_from_callback(shape, sharding, shard)  # pyright: ignore[reportArgumentType]


def _part(weights: Weights, part: Part, index: tuple[slice, ...]) -> np.ndarray:
    tensor = weights.read(part.name, index[::-1] if part.transposed else index)
    return (tensor.T if part.transposed else tensor).astype(np.float32)


def _leaf(weights: Weights, of_leaf: list[Part]) -> jax.Array:
    values = _aligned(_shape(of_leaf))
    for part in of_leaf:
        tensor = weights.read(part.name)
        values[... if part.layer is None else part.layer] = tensor.T if part.transposed else tensor
    return jax.device_put(values, lanes.local_device())


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory aligned to 64 bytes, which jax on a CPU uses without a copy."""
    n_bytes = 4 * int(np.prod(shape, dtype=np.int64))
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(np.float32).reshape(shape)


def read_tokenizer(folder: AnyPath, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer beside a model, if there is one. Raises UserError if it has more tokens than the model."""
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = Tokenizer.load(folder)
    elif (folder / SENTENCEPIECE_FILE).is_file():
        from plasticity_jax.data.sentencepiece_model import read_sentencepiece

        tokenizer = read_sentencepiece(folder / SENTENCEPIECE_FILE)
    else:
        return None
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens and its model {model.vocab_size}; use the tokenizer of the model's training."
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------------------------------------ the run


def import_folder(folder: AnyPath, out: AnyPath) -> None:
    """Makes `out` a finished run of stage "import" outside of any study. Repeats an interrupted import and keeps a finished one.

    Args:
      out: a missing or empty folder, or an import of the same files.
    Raises:
      UserError: `out` holds something else, or as `import_run` and `import_model` raise.
    """
    if not folder.is_dir():
        raise UserError(f"--hf={folder}: no such directory; give the folder that save_pretrained wrote.")
    if (folder / "config.json").is_file() and not is_hugging_face(folder):
        raise UserError(f"--hf={folder} is the directory of a run; give it to --model or --base directly.")
    earlier = None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        with contextlib.suppress(UserError, OSError, KeyError, TypeError):
            earlier = RunDirectory(out).run()
        if earlier is None or earlier.stage != "import":
            raise UserError(f"--out={out} exists and is not an empty folder; give another, or remove it.")
    check_checkpoint_place(out)
    run, config = import_run(folder, StudyConfig(name="import"))
    if earlier is not None and earlier.id != run.id:
        raise UserError(f"--out={out} is an import of other files, {earlier.id.removeprefix('import/')}; give another, or remove it.")
    if RunDirectory(out).done:
        log.info("%s already holds this import", out)
    else:
        import_model(folder, out, run, config)


def import_run(folder: AnyPath, config: StudyConfig) -> tuple[Run, StudyConfig]:
    """The run that imports a folder: named after the folder, defined by the bytes of its files.

    Args:
      config: of the run's study; the folder's network replaces its own.
    Returns:
      The run and its config.
    Raises:
      UserError: as `open_folder` raises, or the tokenizer does not match the model.
    """
    name, fields, model = import_fields(folder)
    config = with_network(config, model, folder)
    check_config(config)
    return Run(config.name, "import", name, fields), config


def import_fields(folder: AnyPath) -> tuple[str, dict[str, Any], ModelConfig]:
    """(name, result fields, network) of the run that imports a folder. Raises UserError: see `import_run`."""
    description, weights = open_folder(folder)
    read_tokenizer(folder, description.model)
    beside = [folder / name for name in companions(folder)]
    fields = {"files": file_hashes([folder / "config.json", *weights.files, *beside], folder), "model": to_dict(description.model)}
    return readable_name(folder.resolve().name), fields, description.model


def readable_name(text: str) -> str:
    """A name as a part of a run's directory."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def with_network(config: StudyConfig, model: ModelConfig, place: AnyPath) -> StudyConfig:
    """A study's config for runs on a model that exists: with its network, and with its tokenizer, where there is one, instead of the study's.

    Args:
      place: of the model.
    """
    names = [name for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE) if (place / name).is_file()]
    tokenizer = DataConfig().tokenizer if not names else str(place if names[0] == TOKENIZER_FILE else place / SENTENCEPIECE_FILE)
    return replace(config, model=model, data=replace(config.data, tokenizer=tokenizer))


def file_hashes(files: Sequence[AnyPath], folder: AnyPath) -> dict[str, str]:
    """Name, relative to the folder → sha256 of each file."""
    return {str(file).removeprefix(f"{folder}/"): content_hash(file) or "" for file in files}


def import_model(folder: AnyPath, target: AnyPath, run: Run, config: StudyConfig) -> None:
    """Makes `target` the finished directory of an import run from `import_run`. Repeats an interrupted import.

    Raises:
      UserError: the folder has changed and is no longer valid, or another process works on the same run.
    """
    with RunDirectory(target).work(run, config) as directory:
        directory.finish(read_folder(folder, directory))


def read_folder(folder: AnyPath, directory: RunDirectory) -> dict[str, Any]:
    """Writes the model of a folder into the directory of an import run that is being worked on.

    Returns:
      Its results: `parameters` (their number), `architecture`, `dtype` (of most of the source's tensors), `other_dtypes` (tensor name → dtype of the
      others) and `carried` (settings of the source's config.json that are not the network's).
    """
    description, weights = open_folder(folder)
    copy_companions(folder, directory.path)
    tokenizer = read_tokenizer(folder, description.model)
    if tokenizer is not None and not (folder / TOKENIZER_FILE).is_file():
        tokenizer.save(directory.path / TOKENIZER_FILE)
        if (folder / CONFIG_FILE).is_file():
            written = read_object(directory.path / CONFIG_FILE)
            write_json(directory.path / CONFIG_FILE, written | read_object(folder / CONFIG_FILE))
    ids = {name: value for name, value in description.carried.items() if name.endswith("_token_id") and value is not None}
    if ids and not (folder / GENERATION_FILE).is_file():  # transformers makes one of config.json, too
        write_json(directory.path / GENERATION_FILE, ids)
    save_params(directory, read_params(description, weights, folder.name))
    directory.provenance |= {"source": folder.resolve().name}
    of_network = parts(description.model, description.family)
    dtypes = {part.name: weights.tensors[part.name].dtype.name for part in of_network}
    sizes = Counter()
    for part in of_network:
        sizes[dtypes[part.name]] += part.size
    usual = sizes.most_common(1)[0][0]
    return {
        "parameters": count_params(description.model),
        "architecture": description.family.architecture,
        "dtype": usual,
        "other_dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != usual},
        "carried": description.carried,
    }


def save_params(directory: RunDirectory, params: Params) -> None:
    """Saves parameters as the one checkpoint of a run, in place of what an interrupted import has left."""
    checkpoints = directory.path / CHECKPOINTS
    remove_tree(checkpoints)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with Checkpoints(checkpoints, asynchronous=False, save_bytes=largest + 1, alone=True) as saved:
        saved.save(0, params)


def imported_from(directory: RunDirectory) -> dict[str, Any] | None:
    """The results of the import from which a run's model comes, directly or through fine-tuning; None if there is none or it is gone."""
    while directory.run().stage == "finetune":
        base = read_json(directory.path / PROVENANCE).get("parent_paths", {}).get("base")
        if base is None or not (joined(directory.path, base) / "config.json").is_file():
            return None
        directory = RunDirectory(joined(directory.path, base))
    return directory.results() if directory.run().stage == "import" else None
