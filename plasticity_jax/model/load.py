"""Opens the model of a finished run, or of a Hugging Face folder."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.hf_import import is_hugging_face, open_folder, read_params, read_tokenizer
from plasticity_jax.model.param_count import count_params
from plasticity_jax.model.transformer import Params, abstract_params, apply
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.runs.directory import CHECKPOINTS, RunDirectory, open_run
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, location

MODEL_STAGES = ("init", "import", "pretrain", "finetune")


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a run or a Hugging Face folder; never written back.

    Attributes:
      config: the model's shape.
      params: its parameters: matrices in `dtype`, norms in float32.
      tokenizer: its tokenizer, if there is one.
      path: the directory.
      run: the run that made it; None for a Hugging Face folder.
      mesh: over which its parameters are sharded, as `parallel.param_shardings` says; None for one device.
      dtype: "float32" or "bfloat16".
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    path: AnyPath
    run: Run | None
    mesh: Mesh | None = None
    dtype: str = "float32"

    def __repr__(self) -> str:
        shape = f"{self.config.n_layers} layers, d_model {self.config.d_model}, vocabulary {self.config.vocab_size:,}"
        return f"<model of {count_params(self.config):,} parameters ({shape}) in {self.path}>"

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError where there is none, so that no text can be given to the model."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} holds no tokenizer.json, so no text can be given to its model; put the model's tokenizer there.")
        return self.tokenizer

    def __call__(
        self,
        tokens: Any,
        *,
        segment_ids: Any = None,
        positions: Any = None,
        capture: Sequence[str] = ("embed", "block_out"),
    ) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
        """Logits in float32 and captured activations in `dtype`, as `plasticity_jax.model.apply` defines them. Computed in `dtype`, on the mesh.

        Args:
          tokens, segment_ids, positions: integers [B, T], as arrays or nested lists of equal lengths.
        Raises:
          ValueError: wrong rank, a token outside the vocabulary, non-integers, or an unknown capture.
        """
        tokens_BxT = _integers("tokens", tokens, None)
        outside = tokens_BxT[(tokens_BxT < 0) | (tokens_BxT >= self.config.vocab_size)]
        if outside.size:
            raise ValueError(f"tokens hold {outside[0]}, outside the vocabulary 0 ... {self.config.vocab_size - 1}; use this model's tokenizer.")
        segment_ids, positions = (
            None if values is None else _integers(name, values, tokens_BxT.shape)
            for name, values in (("segment_ids", segment_ids), ("positions", positions))
        )
        how = (self.config, tuple(capture), self.dtype, self.mesh)
        return _forward(*how, self.params, tokens_BxT, segment_ids, positions)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forward(config, capture, dtype, mesh, params, tokens_BxT, segment_ids_BxT, positions_BxT):
    options = {"segment_ids": segment_ids_BxT, "positions": positions_BxT, "capture": capture, "scan_layers": mesh is not None, "mesh": mesh}
    return apply(config, params, tokens_BxT, compute_dtype=jnp.dtype(dtype), **options)


def _integers(name: str, values: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} has rows of different lengths; pad them to one length [B, T].") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must be a non-empty [B, T], such as tokens[None] for one sequence.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold integers.")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must have the shape of tokens, {list(shape)}.")
    return array.astype(np.int32)


def load_model(path: str | AnyPath, step: int | None = None, *, mesh: Mesh | None = None, dtype: str = "float32") -> LoadedModel:
    """Opens a Hugging Face folder, or the directory of a finished init, import, pretrain or finetune run and reads a checkpoint.

    Args:
      step: of a pretrain run, one that `train.keep_steps` has kept; None takes the last.
      mesh: devices to put the parameters on, sharded as in training. No device and no process reads or holds more than its shards. With several
        processes, all call this with the same arguments. None puts them on this process's first device.
      dtype: of the matrices, "float32" or "bfloat16"; norms stay in float32. Activations are computed in it.
    Raises:
      UserError: not a finished run of such a stage, a step that is not there, a damaged checkpoint, a folder that cannot be imported, or a mesh that
        does not divide the parameters.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r} is not one that models are run in; give 'float32' or 'bfloat16'.")
    path = location(path)
    if is_hugging_face(path):
        if step is not None:
            raise UserError(f"{path} is a Hugging Face folder, which holds one model; leave step={step} out.")
        description, weights = open_folder(path)
        config, run = description.model, None
        tokenizer = read_tokenizer(path, config)
        params = read_params(description, weights, path.name, None if mesh is None else param_shardings(mesh, abstract_params(config)))
    else:
        directory = open_model_run(path)
        config, run = directory.config().model, directory.run()
        tokenizer = read_tokenizer(path, config)
        shardings = None if mesh is None else param_shardings(mesh, abstract_params(config))
        params = restore(path, abstract_params(config), shardings, step=step)
    narrow(params, dtype)
    return LoadedModel(config, params, tokenizer, path, run, mesh, dtype)


def abstract_loaded(config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """Shapes and shardings of the parameters that `load_model` would return."""
    abstract = abstract_params(config)

    def one(path, x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype if path[-1].key == "scale" else dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, abstract, param_shardings(mesh, abstract))


def narrow(params: Params, dtype: str) -> None:
    """Replaces the matrices by their values in `dtype`, one after the other, where they lie. A forward pass in `dtype` gives the same results."""
    for name, part in params.items():
        if isinstance(part, dict):
            narrow(part, dtype)
        elif name != "scale":
            params[name] = part.astype(dtype)


def open_model_run(path: AnyPath) -> RunDirectory:
    """The directory of a finished run that holds a model. Raises UserError for any other path."""
    directory = open_run(path)
    stage = directory.run().stage
    if stage not in MODEL_STAGES:
        raise UserError(f"{path} is a run of stage {stage}, which holds no model; give one of stage {', '.join(MODEL_STAGES)}.")
    return directory


def restore(path: AnyPath, abstract: Any, shardings: Any = None, *, step: int | None = None) -> Any:
    """The parameters of a checkpoint below a run's directory.

    Args:
      abstract: their shapes.
      shardings: where to put them; every process reads its shards only. None puts them on this process's first device.
      step: one that was kept; None takes the last.
    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    if shardings is not None:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    with open_checkpoints(path) as checkpoints:
        return checkpoints.restore_params(checkpoints.latest_step() if step is None else checkpoints.kept_step(step), abstract)


def open_checkpoints(path: AnyPath) -> Checkpoints:
    """The checkpoints below a run's directory, for reading. Raises UserError if there is none."""
    folder = path / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f"{path} has no checkpoints folder; delete the run's directory and run its stage again.")
    checkpoints = Checkpoints(folder, read_only=True)
    if checkpoints.latest() is None:
        checkpoints.close()
        raise UserError(f"{folder} holds no finished checkpoint; delete the run's directory and run its stage again.")
    return checkpoints
