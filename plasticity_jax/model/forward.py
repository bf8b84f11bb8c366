"""Forward passes outside of training: one runner for every stage, over batches of rows, on all devices and processes."""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from plasticity_jax.config import ModelConfig, StudyConfig
from plasticity_jax.data.batching import keep_in_flight
from plasticity_jax.data.loader import as_batch
from plasticity_jax.model.kernels import choose_kernel
from plasticity_jax.model.loss import chunks_that_fit, vocabulary_losses
from plasticity_jax.model.transformer import Params, hidden_states, output_kernel
from plasticity_jax.parallel import arrays
from plasticity_jax.parallel.batches import row_shards
from plasticity_jax.parallel.sharding import batch_sharding, gather
from plasticity_jax.progress import Progress

Batch = dict[str, np.ndarray]  # arrays [B, ...]


@dataclass(frozen=True)
class Forward:
    """How a model is run. Besides `compute_dtype`, it changes speed, memory and rounding only.

    Attributes:
      compute_dtype: dtype of the matmuls, "float32" or "bfloat16".
      attention: one of `kernels.KERNELS`.
      scan_layers: as in `transformer.hidden_states`.
      mesh: where rows and parameters are sharded, the latter as `load_model` places them; None for one device.
    """

    compute_dtype: str
    attention: str = "xla"
    scan_layers: bool = False
    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: StudyConfig, model: ModelConfig, mesh: Mesh | None, dtype: str | None = None) -> "Forward":
        """As a study runs a model. Raises UserError as `choose_kernel` does.

        Layers are scanned except on one CPU: one layer at a time is gathered, and programs are compiled in a fraction of the time.

        Args:
          dtype: the compute dtype; None for the config's.
        """
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        dtype = dtype or config.train.compute_dtype
        attention = choose_kernel(config.train.attention, platform=platform, head_dim=model.head_dim, compute_dtype=dtype)
        return cls(dtype, attention, config.train.scan_layers or platform != "cpu" or mesh is not None, mesh)

    @property
    def row_shards(self) -> int:
        """Number of shards that the rows of a batch are split into."""
        return 1 if self.mesh is None else row_shards(self.mesh)

    def batch_size(self, wanted: int) -> int:
        """The rows per batch: `wanted`, rounded up so that every device has as many."""
        return -(-wanted // self.row_shards) * self.row_shards

    def loss_chunks(self, config: ModelConfig, rows: int, seq_len: int, wanted: int = 0) -> int:
        """`loss.chunks_that_fit` for a batch of `rows` in all, as its logits lie on the mesh."""
        tensor = 1 if self.mesh is None else self.mesh.shape["tensor"]
        return chunks_that_fit(wanted, rows=rows // self.row_shards, seq_len=seq_len, vocab_size=-(-config.vocab_size // tensor))

    def hidden_states(self, config: ModelConfig, params: Params, tokens_BxT: Int[Array, "B T"], **options: Any) -> tuple[Array, dict[str, Array]]:
        """`transformer.hidden_states`, run this way."""
        return hidden_states(
            config,
            params,
            tokens_BxT,
            compute_dtype=jnp.dtype(self.compute_dtype),
            attention=self.attention,
            scan_layers=self.scan_layers,
            mesh=self.mesh,
            **options,
        )

    def output_kernel(self, config: ModelConfig, params: Params) -> Float[Array, "D V"]:
        """The matrix that maps normalized states to logits, gathered."""
        name = "embed" if config.tie_embeddings else "head"
        return output_kernel(config, gather(self.mesh, {name: params[name]}, jnp.dtype(self.compute_dtype)))

    def lower(self, function: Callable[..., Any], static: tuple[Hashable, ...], params: Params, shapes: dict[str, tuple[int, ...]]) -> Any:
        """The program that `run` compiles, lowered for the mesh's devices, with batches of integers of these shapes."""
        assert self.mesh is not None
        rows = batch_sharding(self.mesh)
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name, shape in shapes.items()}
        return _compiled(function, static, self).lower(params, batch)

    def run(
        self,
        function: Callable[..., Any],
        static: tuple[Hashable, ...],
        params: Params,
        batches: Iterable[tuple[Sequence[int], Batch]],
        *,
        what: str,
        total: int,
        unit: str,
        per_row: int = 1,
    ) -> Iterator[tuple[Sequence[int], Any]]:
        """Computes a function of a model on batches, two at a time: while the host reads one, the devices compute the next.

        With several processes, all call this with the same arguments and get the same results.

        Args:
          function: `function(forward, *static, params, batch)` → arrays [B, ...]; traced, and compiled once for equal `static` and shapes.
          batches: indices of a batch's rows, and its arrays: these rows first, then rows that fill it up, to `batch_size` in all.
          what, total, unit: of the progress display.
          per_row: units that a row counts.
        Yields:
          The indices, and the results of these rows as NumPy arrays.
        """
        program = _compiled(function, static, self)

        def dispatched() -> Iterator[tuple[Sequence[int], Any]]:
            for indices, batch in batches:
                yield indices, program(params, batch if self.mesh is None else arrays.put(batch, batch_sharding(self.mesh)))

        with Progress(what, total=total, unit=unit) as progress:
            for indices, found in keep_in_flight(dispatched()):
                yield indices, jax.tree.map(lambda x: x[: len(indices)], arrays.to_host(found))
                progress.update(per_row * len(indices))


@functools.lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any], static: tuple[Hashable, ...], forward: Forward):
    everywhere = None if forward.mesh is None else NamedSharding(forward.mesh, PartitionSpec())
    return jax.jit(functools.partial(function, forward, *static), out_shardings=everywhere)


def target_nats(forward: Forward, config: ModelConfig, chunks: int, isolate: bool, params: Params, batch: Any) -> Float[Array, "b t"]:
    """The loss of every target of a batch of `loader.as_batch`, in nats."""
    segments = batch["segment_ids"] if isolate else None
    x_BxTxD, _ = forward.hidden_states(config, params, batch["tokens"], segment_ids=segments, positions=batch["positions"])
    kernel_DxV, dtype = forward.output_kernel(config, params), jnp.dtype(forward.compute_dtype)
    return vocabulary_losses(x_BxTxD, kernel_DxV, batch["targets"], compute_dtype=dtype, chunks=chunks, mesh=forward.mesh)[0]


def record_nats(
    forward: Forward,
    config: ModelConfig,
    params: Params,
    read: Callable[[Int[np.ndarray, " b"]], Int[np.ndarray, "b record_length"]],
    indices: Int[np.ndarray, " n"],
    *,
    seq_len: int,
    batch_size: int,
    isolate: int | None,
    loss_chunks: int,
    what: str,
) -> Float[np.ndarray, " n"]:
    """The loss of packed records, in nats, summed over the targets of each; float64.

    Args:
      read: indices → records of T + 1 tokens.
      indices: of the records to read.
      seq_len: T.
      batch_size: records at a time; rounded up for the mesh.
      isolate: see `loader.as_batch`.
      loss_chunks: see `loss.chunks_that_fit`; changes memory and rounding only.
      what: label of the progress display.
    """
    size = forward.batch_size(batch_size)
    chunks = forward.loss_chunks(config, size, seq_len, loss_chunks)

    def batches() -> Iterator[tuple[Sequence[int], Batch]]:
        for start in range(0, len(indices), size):
            records = read(indices[start : start + size])
            filled = np.pad(records, ((0, size - len(records)), (0, 0)), mode="edge")  # one program, also for a short batch
            yield range(start, start + len(records)), as_batch(filled, isolate=isolate)

    nats = np.empty(len(indices))
    static, about = (config, chunks, isolate is not None), {"what": what, "total": len(indices) * seq_len, "unit": "tokens", "per_row": seq_len}
    for places, losses_BxT in forward.run(target_nats, static, params, batches(), **about):
        nats[np.asarray(places)] = losses_BxT.sum(axis=1, dtype=np.float64)
    return nats


def lower_record_nats(
    forward: Forward, config: ModelConfig, params: Params, *, batch_size: int, seq_len: int, isolate: bool, loss_chunks: int
) -> Any:
    """The program of `record_nats`, lowered for the mesh's devices."""
    size = forward.batch_size(batch_size)
    chunks = forward.loss_chunks(config, size, seq_len, loss_chunks)
    shapes = {name: (size, seq_len) for name in ("tokens", "targets", "segment_ids", "positions")}
    return forward.lower(target_nats, (config, chunks, isolate), params, shapes)
