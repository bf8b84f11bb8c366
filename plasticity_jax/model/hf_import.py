"""From a Hugging Face folder to the decoder's parameters, and to a run directory that the stages accept."""

import contextlib
import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from plasticity_jax.config import DataConfig, ModelConfig, StudyConfig, check_config, to_dict
from plasticity_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.hf_config import Description, read_description, read_object
from plasticity_jax.model.hf_names import EMBEDDING, HEAD, Part, parts
from plasticity_jax.model.hf_tensors import Weights
from plasticity_jax.model.transformer import Params, count_params
from plasticity_jax.progress import Progress
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import read_json
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, is_local, joined, remove_tree, write_bytes

log = logging.getLogger("plasticity_jax")

# What lies beside the weights and belongs to the tokenizer or to how text is generated; carried as it is.
SENTENCEPIECE_FILE = "tokenizer.model"
COMPANIONS = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", SENTENCEPIECE_FILE,
              "vocab.json", "merges.txt", "generation_config.json")  # fmt: skip

# Old checkpoints hold the rotary frequencies, which follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_ROWS_COMPARED = 4096


def is_hugging_face(path: AnyPath) -> bool:
    """Whether a folder holds a model of Hugging Face's form, whole or not, rather than a run."""
    if (path / "config.json").is_file():
        return "run" not in read_object(path / "config.json")
    return path.is_dir() and any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in path.iterdir())


def open_folder(folder: AnyPath) -> tuple[Description, Weights]:
    """What a folder's config.json and the headers of its weights say; no weight is read.

    Raises:
      UserError: a folder on a store, anything in either that is not supported, or tensors that are not those of the network: missing, surplus, of
        another shape.
    """
    if not is_local(folder):
        raise UserError(f"{folder} is a Hugging Face folder on a store, and weights are read from a disk alone; copy it to one first.")
    description = read_description(folder)
    weights = Weights(folder)
    expected = {part.name: part.shape for part in parts(description.model, description.family)}
    check_tensors(folder, weights, expected, tied=description.model.tie_embeddings)
    return description, weights


def check_tensors(folder: AnyPath, weights: Weights, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Refuses tensors that are not those of a network.

    Args:
      expected: name → shape of each.
      tied: the output matrix is the embedding, and may be stored a second time.
    Raises:
      UserError: a tensor is missing, surplus or of another shape.
    """
    missing = [name for name in expected if name not in weights.tensors]
    if missing:
        raise UserError(
            f"{folder} lacks the tensor {missing[0]} {list(expected[missing[0]])}{_and_more(missing)}; save the model whole, or correct config.json."
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
    """Some writers store the tied output matrix a second time; another one than the embedding would be lost."""
    head, embedding = weights.tensors[HEAD], weights.tensors[EMBEDDING]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    for start in range(0, head.shape[0] if same else 0, _ROWS_COMPARED):
        rows = slice(start, min(start + _ROWS_COMPARED, head.shape[0]))
        same = same and weights.read(HEAD, rows).tobytes() == weights.read(EMBEDDING, rows).tobytes()
    if not same:
        raise UserError(
            f"{folder}: tie_word_embeddings is true, and {HEAD} is not {EMBEDDING}; set tie_word_embeddings to false in config.json to keep both."
        )


def read_params(description: Description, weights: Weights, what: str) -> Params:
    """The parameters in float32, read tensor by tensor: beside them, one tensor is in memory.

    Args:
      what: of what the progress is told.
    """
    tree: Params = {}
    by_leaf = itertools.groupby(parts(description.model, description.family), key=lambda part: part.path)
    with Progress(f"read {what}", total=count_params(description.model), unit="parameters") as progress:
        for path, group in by_leaf:
            node, (*keys, last) = tree, path.split("/")
            for key in keys:
                node = node.setdefault(key, {})
            node[last] = _leaf(weights, list(group), progress)
    return tree


def _leaf(weights: Weights, of_leaf: list[Part], progress: Progress) -> jax.Array:
    first = of_leaf[0]
    shape = first.shape[::-1] if first.transposed else first.shape
    values = _aligned(shape if first.layer is None else (len(of_leaf), *shape))
    for part in of_leaf:
        tensor = weights.read(part.name)
        values[... if part.layer is None else part.layer] = tensor.T if part.transposed else tensor
        progress.update(part.size)
    return jax.device_put(values)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Memory that jax takes over on a CPU instead of copying it, which it does from 64-byte boundaries."""
    n_bytes = 4 * int(np.prod(shape, dtype=np.int64))
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(np.float32).reshape(shape)


def read_tokenizer(folder: AnyPath, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer beside a model, or None where there is none. Raises UserError if it has more tokens than the model."""
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = Tokenizer.load(folder)
    elif (folder / SENTENCEPIECE_FILE).is_file():
        from plasticity_jax.data.sentencepiece_model import read_sentencepiece

        tokenizer = read_sentencepiece(folder / SENTENCEPIECE_FILE)
    else:
        return None
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens and its model {model.vocab_size}; put the tokenizer there that the model was trained with."
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------------------------------------ the run


def import_folder(folder: AnyPath, out: AnyPath) -> None:
    """Makes `out` a finished run of stage "import" that belongs to no study; one that was cut off is done again, a finished one is left as it is.

    Args:
      out: is missing, an empty folder, or an import of the same files.
    Raises:
      UserError: `out` holds something else, or as `import_run` and `import_model`.
    """
    if not folder.is_dir():
        raise UserError(f"--hf={folder}: no such directory; give the folder that save_pretrained wrote.")
    if (folder / "config.json").is_file() and not is_hugging_face(folder):
        raise UserError(f"--hf={folder} is the directory of a run; give it to --model or --base as it is.")
    earlier = None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        with contextlib.suppress(UserError, OSError, KeyError, TypeError):
            earlier = RunDirectory(out).run()
        if earlier is None or earlier.stage != "import":
            raise UserError(f"--out={out} exists and is not an empty folder; give another, or remove it.")
    run, config = import_run(folder, StudyConfig(name="import"))
    if earlier is not None and earlier.id != run.id:
        raise UserError(f"--out={out} is an import of other files, {earlier.id.removeprefix('import/')}; give another, or remove it.")
    if RunDirectory(out).done:
        log.info("%s is this import already", out)
    else:
        import_model(folder, out, run, config)


def import_run(folder: AnyPath, config: StudyConfig) -> tuple[Run, StudyConfig]:
    """The run that an import of a folder is: named after the folder, defined by the bytes of its files.

    Args:
      config: of the study that the run belongs to; the folder's network takes the place of its own.
    Returns:
      The run and its config.
    Raises:
      UserError: as `open_folder`, and a tokenizer that does not fit.
    """
    description, weights = open_folder(folder)
    read_tokenizer(folder, description.model)
    companions = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    fields = {"files": file_hashes([folder / "config.json", *weights.files, *companions], folder.name), "model": to_dict(description.model)}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-.") or "model"
    config = with_network(config, description.model)
    check_config(config)
    return Run(config.name, "import", name, fields), config


def with_network(config: StudyConfig, model: ModelConfig) -> StudyConfig:
    """A study's config for runs on an imported model. Its corpus, and the tokenizer named for it, are not this model's."""
    return replace(config, model=model, data=replace(config.data, tokenizer=DataConfig().tokenizer))


def file_hashes(files: Sequence[AnyPath], what: str) -> dict[str, str]:
    """Name → sha256 of each file.

    Args:
      what: of what the progress is told.
    """
    with Progress(f"hash {what}", total=sum(file.stat().st_size for file in files), unit="bytes") as progress:
        return {file.name: _sha256(file, progress) for file in files}


def _sha256(path: AnyPath, progress: Progress) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()


def import_model(folder: AnyPath, target: AnyPath, run: Run, config: StudyConfig) -> None:
    """Makes `target` the finished directory of an import run, as `import_run` described it; one that was cut off is done again.

    Its results.json holds `parameters` (their number), `architecture`, `dtype` (of most of the source's tensors), `other_dtypes` (tensor name →
    type of the rest) and `carried` (settings of the source's config.json that are not the network's).

    Raises:
      UserError: the folder changed meanwhile so that it no longer fits, or another process works on the same run.
    """
    with RunDirectory(target).work(run, config) as directory:
        description, weights = open_folder(folder)
        checkpoints = directory.path / "checkpoints"
        remove_tree(checkpoints)
        for name in COMPANIONS:
            if (folder / name).is_file():
                write_bytes(directory.path / name, (folder / name).read_bytes())
        tokenizer = read_tokenizer(folder, description.model)
        if tokenizer is not None and not (folder / TOKENIZER_FILE).is_file():
            tokenizer.save(directory.path / TOKENIZER_FILE)
        params = read_params(description, weights, folder.name)
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        with Checkpoints(checkpoints, asynchronous=False, save_bytes=largest + 1) as saved:
            saved.save(0, params)
        directory.provenance |= {"source": folder.resolve().name}
        of_network = parts(description.model, description.family)
        dtypes = {part.name: weights.tensors[part.name].dtype.name for part in of_network}
        sizes = Counter()
        for part in of_network:
            sizes[dtypes[part.name]] += part.size
        usual = sizes.most_common(1)[0][0]
        directory.finish(
            {
                "parameters": count_params(description.model),
                "architecture": description.family.architecture,
                "dtype": usual,
                "other_dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != usual},
                "carried": description.carried,
            }
        )


def imported_from(directory: RunDirectory) -> dict[str, Any] | None:
    """The results of the import that a run's model comes from, itself or through fine-tuning; None where it was made here or the import is gone."""
    while directory.run().stage == "finetune":
        base = read_json(directory.path / "provenance.json").get("parent_paths", {}).get("base")
        if base is None or not (joined(directory.path, base) / "config.json").is_file():
            return None
        directory = RunDirectory(joined(directory.path, base))
    return directory.results() if directory.run().stage == "import" else None
