"""Opens the model of a finished run."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from plasticity_jax import records
from plasticity_jax.config import ModelConfig
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import Params, abstract_params, apply

MODEL_STAGES = ("init", "pretrain", "finetune")


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a run; never written back.

    Attributes:
      config: the network's shape.
      params: its parameters, float32.
      tokenizer: the run's tokenizer, or None where it has none.
      path: the run's directory.
      run: the run that made it.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    path: Path
    run: records.Run

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
          ValueError: another rank, a token outside the vocabulary, no integers, an unknown capture.
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
        raise ValueError(f"{name} is of type {array.dtype}; it must hold integers.")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must be that of tokens, {list(shape)}.")
    return array.astype(np.int32)


def load_model(path: str | Path) -> LoadedModel:
    """Opens the directory of a finished init, pretrain or finetune run and reads its last checkpoint.

    Raises:
      UserError: no finished run of such a stage, or a damaged checkpoint.
    """
    directory = records.open_run(path)
    run = directory.run()
    if run.stage not in MODEL_STAGES:
        raise UserError(f"{path} is a run of stage {run.stage}, which holds no model; give one of stage {', '.join(MODEL_STAGES)}.")
    config = directory.config().model
    tokenizer_path = directory.path / "tokenizer.json"
    return LoadedModel(
        config=config,
        params=load_params(directory.path, config),
        tokenizer=Tokenizer.load(tokenizer_path) if tokenizer_path.is_file() else None,
        path=directory.path,
        run=run,
    )


def load_params(path: Path, config: ModelConfig) -> Params:
    """The parameters of the last checkpoint below a run's directory. Raises UserError if there is none or it is damaged."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{path} has no checkpoints folder; delete the run's directory and run its stage again.")
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{folder} holds no finished checkpoint; delete the run's directory and run its stage again.")
        return checkpoints.restore_params(step, abstract_params(config))
