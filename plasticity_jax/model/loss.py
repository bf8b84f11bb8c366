"""Cross-entropy of the next token, as sums and counts, so that gradient accumulation and padding change nothing."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.model import cpu
from plasticity_jax.model.layers import at_least_float32, project
from plasticity_jax.parallel.sharding import ROWS, constrain

LOGIT_BYTES = 256 << 20  # a small fraction of any accelerator's memory


@jax.custom_vjp
def token_losses(logits_BxTxV: Float[Array, "*batch V"], targets_BxT: Int[Array, "*batch"]) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Cross-entropy of every target in nats, and the log of the softmax's normalizer; at least float32, in the shape of the targets."""
    return _forward(logits_BxTxV, targets_BxT)[0]


def _forward(logits_BxTxV, targets_BxT):
    logits_BxTxV = logits_BxTxV.astype(at_least_float32(logits_BxTxV.dtype))
    log_sum_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    chosen_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1, mode="clip")[..., 0]
    return (log_sum_BxT - chosen_BxT, log_sum_BxT), (logits_BxTxV, log_sum_BxT, targets_BxT)


def _backward(saved, cotangents_BxT):
    # One fused pass over the logits. Autodiff would scatter into a second array of their size, which is slow on CPUs.
    logits_BxTxV, log_sum_BxT, targets_BxT = saved
    of_loss_BxT, of_log_sum_BxT = cotangents_BxT
    is_target_BxTxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxTxV.shape, logits_BxTxV.ndim - 1) == targets_BxT[..., None]
    softmax_BxTxV = jnp.exp(logits_BxTxV - log_sum_BxT[..., None])
    return softmax_BxTxV * (of_loss_BxT + of_log_sum_BxT)[..., None] - jnp.where(is_target_BxTxV, of_loss_BxT[..., None], 0.0), None


token_losses.defvjp(_forward, _backward)


def chunks_that_fit(chunks: int, *, rows: int, seq_len: int, vocab_size: int, logit_bytes: int = LOGIT_BYTES) -> int:
    """`chunks` itself, or for 0 the smallest divisor of `seq_len` with at most `logit_bytes` of float32 logits per chunk.

    Args:
      rows, vocab_size: of the logits, on one device.
    """
    if chunks:
        return chunks
    divisors = (n for n in range(1, seq_len + 1) if seq_len % n == 0)
    return next((n for n in divisors if 4 * rows * seq_len * vocab_size <= n * logit_bytes), seq_len)


def vocabulary_losses(
    x_BxTxD: Float[Array, "B T D"],
    kernel_DxV: Float[Array, "D V"],
    targets_BxT: Int[Array, "B T"],
    *,
    compute_dtype: DTypeLike,
    chunks: int,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_losses` of the logits x · kernel.

    Args:
      x_BxTxD: normalized states.
      compute_dtype: dtype of the matmul's inputs; its accumulation and the losses are at least float32.
      chunks: parts into which the T tokens are split. Only one part's logits exist at a time, forward and backward, so [B, T, V] is
        never materialized. Lowered to its greatest common divisor with T.
      mesh: where the arrays are sharded; rows of the logits are sharded, and their vocabulary over the tensor axis. None for one device.
    """
    chunks = math.gcd(chunks, targets_BxT.shape[1])

    @cpu.forms(mesh)
    def losses(x, targets):
        logits_BxTxV = project(x, kernel_DxV, compute_dtype, out_dtype=at_least_float32(compute_dtype))
        return token_losses(constrain(mesh, logits_BxTxV, ROWS, None, "tensor"), targets)

    if chunks == 1:
        return losses(x_BxTxD, targets_BxT)
    parts = [jnp.stack(jnp.split(array, chunks, axis=1)) for array in (x_BxTxD, targets_BxT)]  # [chunks, B, T/chunks, ...]: rows stay where they are
    of_parts = jax.lax.map(jax.checkpoint(lambda part: losses(*part), prevent_cse=False), tuple(parts))
    losses_BxT, log_sums_BxT = (jnp.concatenate(list(part), axis=1) for part in of_parts)
    return losses_BxT, log_sums_BxT


def masked_sum(
    losses_BxT: Float[Array, "*batch"], loss_mask_BxT: Bool[Array, "*batch"] | Int[Array, "*batch"] | Float[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the losses where the mask is 1, in nats, and the number of these targets; both scalars.

    Args:
      loss_mask_BxT: 1 if the target counts, else 0.
    """
    mask_BxT = loss_mask_BxT.astype(jnp.float32)
    return jnp.sum(losses_BxT * mask_BxT), jnp.sum(mask_BxT)
