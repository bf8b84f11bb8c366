"""Cross-entropy of the next token, as sums with counts, so that accumulation and padding change nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.custom_vjp
def token_losses(logits_BxTxV: Float[Array, "*batch V"], targets_BxT: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Cross-entropy of every target in nats; float32, of the shape of the targets."""
    return _forward(logits_BxTxV, targets_BxT)[0]


def _forward(logits_BxTxV, targets_BxT):
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    log_sum_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    chosen_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1, mode="clip")[..., 0]
    return log_sum_BxT - chosen_BxT, (logits_BxTxV, log_sum_BxT, targets_BxT)


def _backward(saved, cotangent_BxT):
    # One fused pass over the logits. The automatic gradient scatters into a second array of their size, which is slow on CPUs.
    logits_BxTxV, log_sum_BxT, targets_BxT = saved
    is_target_BxTxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxTxV.shape, logits_BxTxV.ndim - 1) == targets_BxT[..., None]
    gradient = jnp.exp(logits_BxTxV - log_sum_BxT[..., None]) - is_target_BxTxV.astype(jnp.float32)
    return gradient * cotangent_BxT[..., None], None


token_losses.defvjp(_forward, _backward)


def cross_entropy(
    logits_BxTxV: Float[Array, "*batch V"], targets_BxT: Int[Array, "*batch"], loss_mask_BxT: Bool[Array, "*batch"] | Int[Array, "*batch"] | Float[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the cross-entropy over the counted targets, in nats, and their number; both float32 scalars.

    Args:
      loss_mask_BxT: 1 where the target counts, else 0.
    """
    mask_BxT = loss_mask_BxT.astype(jnp.float32)
    return jnp.sum(token_losses(logits_BxTxV, targets_BxT) * mask_BxT), jnp.sum(mask_BxT)
