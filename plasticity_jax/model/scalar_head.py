"""A decoder with a scalar head: a score per text, as a linear map of the last token's normalized state.

Its parameters are those of a decoder without an output matrix (tied embeddings) and the head [D], without bias.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from plasticity_jax.config import ModelConfig, StudyConfig
from plasticity_jax.data.batching import keep_in_flight, padded_batches
from plasticity_jax.data.batching import length_buckets as length_buckets
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.model.hf_import import read_tokenizer
from plasticity_jax.model.kernels import choose_kernel
from plasticity_jax.model.load import open_checkpoints
from plasticity_jax.model.transformer import Params, abstract_params, hidden_states
from plasticity_jax.parallel import arrays
from plasticity_jax.parallel.batches import row_shards
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.parallel.sharding import batch_sharding, inference_shardings, param_shardings
from plasticity_jax.progress import Progress
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


@dataclass(frozen=True)
class Execution:
    """How to run a forward pass. Besides `compute_dtype`, it changes speed and rounding only.

    Attributes:
      compute_dtype: dtype of the matmuls, "float32" or "bfloat16".
      attention: one of `kernels.KERNELS`.
      scan_layers: as in `transformer.hidden_states`.
      mesh: where parameters and rows are sharded; None for one device.
    """

    compute_dtype: str
    attention: str
    scan_layers: bool
    mesh: Mesh | None


def execution_of(config: StudyConfig, model: ModelConfig) -> Execution:
    """How a study runs the forward passes of a model, on all devices. Raises UserError as `make_mesh` and `choose_kernel` do."""
    mesh, dtype = make_mesh(config.mesh), config.train.compute_dtype
    attention = choose_kernel(config.train.attention, platform=mesh.devices.flat[0].platform, head_dim=model.head_dim, compute_dtype=dtype)
    return Execution(dtype, attention, config.train.scan_layers, mesh if mesh.size > 1 else None)


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
    """Shardings of `ScalarModel.params` for training: the decoder's as always, the head replicated."""
    return {"decoder": param_shardings(mesh, abstract_params(config)), "head": NamedSharding(mesh, PartitionSpec())}


def scores(
    config: ModelConfig,
    params: Params,
    tokens_BxT: Int[Array | np.ndarray, "B T"],
    lengths_B: Int[Array | np.ndarray, " B"],
    *,
    compute_dtype: DTypeLike,
    **options: Any,
) -> Float[Array, " B"]:
    """The score of every row, float32: the dot product of the head and the final normalized state of the row's last token.

    Args:
      config, params: of a `ScalarModel`.
      tokens_BxT: rows padded on the right.
      lengths_B: tokens of each row; an empty row is read at its first position.
      compute_dtype, options: those of `transformer.hidden_states`. The head is applied in float32.
    """
    x_BxTxD, _ = hidden_states(config, params["decoder"], tokens_BxT, compute_dtype=compute_dtype, **options)
    last_Bx1x1 = jnp.maximum(jnp.asarray(lengths_B) - 1, 0)[:, None, None]
    last_BxD = jnp.take_along_axis(x_BxTxD, last_Bx1x1, axis=1)[:, 0].astype(jnp.float32)
    return jnp.einsum("bd,d->b", last_BxD, params["head"], precision=jax.lax.Precision.HIGHEST)


def score_rows(
    model: ScalarModel, rows: Sequence[Sequence[int]], *, buckets: Sequence[int], batch_size: int, execution: Execution, what: str
) -> Float[np.ndarray, " rows"]:
    """float32 scores of rows of tokens, computed in batches of a few fixed shapes.

    Args:
      rows: token ids, at least one and at most the last bucket's length each.
      buckets: lengths to pad to, ascending.
      batch_size: rows per batch; rounded up to a multiple of the mesh's row shards.
      what: label of the progress display.
    Returns:
      The scores, on every process.
    Raises:
      ValueError: a row is empty or too long.
    """
    mesh, shards = execution.mesh, 1 if execution.mesh is None else row_shards(execution.mesh)
    batch_size = -(-batch_size // shards) * shards
    params, forward = model.params, _compiled_scores(model.config, execution)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        params = {"decoder": arrays.put(params["decoder"], inference_shardings(mesh, params["decoder"])), "head": arrays.put(params["head"], whole)}

    def dispatched() -> Iterator[tuple[list[int], Array]]:
        for indices, *batch in padded_batches(rows, buckets=buckets, batch_size=batch_size):
            yield indices, forward(params, *(batch if mesh is None else (arrays.put(x, batch_sharding(mesh)) for x in batch)))

    found = np.zeros(len(rows), np.float32)
    with Progress(what, total=len(rows), unit="texts") as progress:
        for indices, scores_B in keep_in_flight(dispatched()):
            found[indices] = arrays.to_host(scores_B)[: len(indices)]
            progress.update(len(indices))
    return found


@functools.lru_cache(maxsize=8)
def _compiled_scores(config: ModelConfig, execution: Execution):
    options = {"attention": execution.attention, "scan_layers": execution.scan_layers, "mesh": execution.mesh}
    return jax.jit(functools.partial(scores, config, compute_dtype=jnp.dtype(execution.compute_dtype), **options))


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


def load_verifier(path: AnyPath) -> tuple[ScalarModel, Tokenizer]:
    """The model of a finished verifier run, and its tokenizer.

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
    with open_checkpoints(path) as checkpoints:
        params = checkpoints.restore_params(checkpoints.latest_step(), abstract_scalar_params(config))
    tokenizer = read_tokenizer(path, config)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer.json, so its model cannot read text; put its tokenizer there.")
    return ScalarModel(config, params), tokenizer
