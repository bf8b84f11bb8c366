"""A decoder with a scalar head: a score per text, as a linear map of the last token's normalized state.

Its parameters are those of a decoder without an output matrix (tied embeddings) and the head [D], without bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.data.batching import length_buckets as length_buckets
from plasticity_jax.data.batching import padded_batches
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.hf_import import read_tokenizer
from plasticity_jax.model.load import restore
from plasticity_jax.model.transformer import Params, abstract_params
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.runs.directory import open_run
from plasticity_jax.runs.storage import AnyPath


@dataclass(frozen=True)
class ScalarModel:
    """A decoder with a scalar head.

    Attributes:
      config: the decoder's, from `without_output`.
      params: the decoder's parameters and the head: {"decoder": tree, "head": [D]}.
    """

    config: ModelConfig
    params: Params


def without_output(config: ModelConfig) -> ModelConfig:
    """The config of the same decoder without an output matrix."""
    return replace(config, tie_embeddings=True)


def with_head(config: ModelConfig, params: Params, head_D: Float[Array | np.ndarray, " D"]) -> ScalarModel:
    """A language model's decoder with a scalar head instead of its output matrix."""
    return ScalarModel(without_output(config), {"decoder": {name: part for name, part in params.items() if name != "head"}, "head": head_D})


def abstract_scalar_params(config: ModelConfig) -> Params:
    """The shapes of `ScalarModel.params`, float32."""
    return {"decoder": abstract_params(config), "head": jax.ShapeDtypeStruct((config.d_model,), jnp.float32)}


def scalar_shardings(mesh: Mesh, config: ModelConfig) -> Params:
    """Shardings of `ScalarModel.params`: the decoder's as always, the head replicated."""
    return {"decoder": param_shardings(mesh, abstract_params(config)), "head": NamedSharding(mesh, PartitionSpec())}


def scores(params: Params, x_BxTxD: Float[Array, "B T D"], lengths_B: Int[Array | np.ndarray, " B"]) -> Float[Array, " B"]:
    """The score of every row, float32: the dot product of the head and the final normalized state of the row's last token.

    Args:
      params: of a `ScalarModel`.
      x_BxTxD: what `transformer.hidden_states` returns for rows padded on the right.
      lengths_B: tokens of each row; an empty row is read at its first position.
    """
    last_Bx1x1 = jnp.maximum(jnp.asarray(lengths_B) - 1, 0)[:, None, None]
    last_BxD = jnp.take_along_axis(x_BxTxD, last_Bx1x1, axis=1)[:, 0].astype(jnp.float32)
    return jnp.einsum("bd,d->b", last_BxD, params["head"], precision=jax.lax.Precision.HIGHEST)


def _row_scores(forward: Forward, config: ModelConfig, params: Params, batch: Any) -> Float[Array, " B"]:
    return scores(params, forward.hidden_states(config, params["decoder"], batch["tokens"])[0], batch["lengths"])


def score_rows(
    model: ScalarModel, rows: Sequence[Sequence[int]], *, buckets: Sequence[int], batch_size: int, forward: Forward, what: str
) -> Float[np.ndarray, " rows"]:
    """float32 scores of rows of tokens, computed in batches of a few fixed shapes.

    Args:
      rows: token ids, at least one and at most the last bucket's length each.
      buckets: lengths to pad to, ascending.
      batch_size: rows per batch; rounded up for the mesh.
      forward: how to run the model; its parameters lie as `scalar_shardings` says.
      what: label of the progress display.
    Returns:
      The scores, on every process.
    Raises:
      ValueError: a row is empty or too long.
    """
    padded = padded_batches(rows, buckets=buckets, batch_size=forward.batch_size(batch_size))
    batches = ((batch.indices, {"tokens": batch.tokens, "lengths": batch.lengths}) for batch in padded)
    found = np.zeros(len(rows), np.float32)
    for indices, scores_B in forward.run(_row_scores, (model.config,), model.params, batches, what=what, total=len(rows), unit="texts"):
        found[np.asarray(indices)] = scores_B
    return found


def lower_row_scores(forward: Forward, config: ModelConfig, params: Params, *, batch_size: int, max_length: int) -> Any:
    """The program of `score_rows` for rows of `max_length` tokens, lowered for the mesh's devices."""
    rows = forward.batch_size(batch_size)
    return forward.lower(_row_scores, (config,), params, {"tokens": (rows, max_length), "lengths": (rows,)})


# ------------------------------------------------------------------------------------------------------------------------ the verifier's


def encode_answers(tokenizer: Tokenizer, prompts: Sequence[str], texts: Sequence[str], *, max_length: int, bos: bool) -> tuple[list[list[int]], int]:
    """Inputs of a verifier (prompt, completion, end of text), and the number of rows that lost their beginning.

    Prompt and completion are tokenized separately, as in fine-tuning and generation.

    Args:
      max_length: tokens per row; longer rows lose their beginning.
      bos: put the beginning-of-text token first, if the tokenizer has one.
    """
    begin = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    pairs = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(texts), strict=True)
    rows = [[*begin, *prompt, *text, tokenizer.eos_id] for prompt, text in pairs]
    return [row[-max_length:] for row in rows], sum(len(row) > max_length for row in rows)


def load_verifier(path: AnyPath, mesh: Mesh | None = None) -> tuple[ScalarModel, Tokenizer]:
    """The model of a finished verifier run, and its tokenizer.

    Args:
      mesh: where to put the parameters; None for one device.
    Raises:
      UserError: the run is of another stage, diverged or is not finished, its checkpoint is damaged, or it has no tokenizer.
    """
    directory = open_run(path)
    stage = directory.run().stage
    if stage != "verifier":
        raise UserError(f"{path} is a run of stage {stage}, not of stage verifier; give a verifier run.")
    state, why = directory.state()
    if state == "diverged":
        raise UserError(f"{path} diverged ({why}), so it gives no rewards; lower verifier.peak_lr, or set another reward.scorer.")
    config = without_output(directory.config().model)
    shardings = None if mesh is None else scalar_shardings(mesh, config)
    params = restore(path, abstract_scalar_params(config), shardings)
    tokenizer = read_tokenizer(path, config)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer.json, so its model cannot read text; put its tokenizer there.")
    return ScalarModel(config, params), tokenizer
