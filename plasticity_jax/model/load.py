"""Opens the model of a finished run, or of a Hugging Face folder."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.hf_import import is_hugging_face, open_folder, read_params, read_tokenizer
from plasticity_jax.model.transformer import Params, abstract_params, apply
from plasticity_jax.runs.directory import CHECKPOINTS, RunDirectory, open_run
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath, location

MODEL_STAGES = ("init", "import", "pretrain", "finetune")


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a run or a Hugging Face folder; never written back.

    Attributes:
      config: the model's shape.
      params: its parameters, float32.
      tokenizer: its tokenizer, if there is one.
      path: the directory.
      run: the run that made it; None for a Hugging Face folder.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    path: AnyPath
    run: Run | None

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
        """Logits and captured activations in float32, as `plasticity_jax.model.apply` defines them.

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
        return _forward(self.config, self.params, tokens_BxT, segment_ids, positions, tuple(capture))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _forward(config, params, tokens_BxT, segment_ids_BxT, positions_BxT, capture):
    return apply(config, params, tokens_BxT, segment_ids=segment_ids_BxT, positions=positions_BxT, capture=capture, compute_dtype=jnp.float32)


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


def load_model(path: str | AnyPath, step: int | None = None) -> LoadedModel:
    """Opens a Hugging Face folder, or the directory of a finished init, import, pretrain or finetune run and reads a checkpoint.

    Args:
      step: of a pretrain run, one that `train.keep_steps` has kept; None takes the last.
    Raises:
      UserError: not a finished run of such a stage, a step that is not there, a damaged checkpoint, or a folder that cannot be imported.
    """
    path = location(path)
    if is_hugging_face(path):
        if step is not None:
            raise UserError(f"{path} is a Hugging Face folder, which holds one model; leave step={step} out.")
        description, weights = open_folder(path)
        tokenizer = read_tokenizer(path, description.model)
        return LoadedModel(description.model, read_params(description, weights, path.name), tokenizer, path, run=None)
    directory = open_model_run(path)
    config = directory.config().model
    return LoadedModel(config, load_params(path, config, step), read_tokenizer(path, config), path, directory.run())


def open_model_run(path: AnyPath) -> RunDirectory:
    """The directory of a finished run that holds a model. Raises UserError for any other path."""
    directory = open_run(path)
    stage = directory.run().stage
    if stage not in MODEL_STAGES:
        raise UserError(f"{path} is a run of stage {stage}, which holds no model; give one of stage {', '.join(MODEL_STAGES)}.")
    return directory


def load_params(path: AnyPath, config: ModelConfig, step: int | None = None) -> Params:
    """The parameters of a checkpoint below a run's directory, the last by default. Raises UserError if there is none or it is damaged."""
    with open_checkpoints(path) as checkpoints:
        return checkpoints.restore_params(checkpoints.latest_step() if step is None else checkpoints.kept_step(step), abstract_params(config))


def open_checkpoints(path: AnyPath) -> Checkpoints:
    """The checkpoints below a run's directory, for reading. Raises UserError if there is none."""
    folder = path / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f"{path} has no checkpoints folder; delete the run's directory and run its stage again.")
    checkpoints = Checkpoints(folder, read_only=True, alone=True)
    if checkpoints.latest() is None:
        checkpoints.close()
        raise UserError(f"{folder} holds no finished checkpoint; delete the run's directory and run its stage again.")
    return checkpoints
