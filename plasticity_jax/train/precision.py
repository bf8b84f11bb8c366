"""Which number format the products run in."""

import logging
import time

log = logging.getLogger("plasticity_jax")

PAYS_FROM = 1.3  # speed-up from which bf16 is worth its rounding on a CPU
PROBE_TOKENS, PROBE_D_MODEL, PROBE_D_FF = 2048, 256, 1024
PROBE_ROUNDS = 5


def resolve_compute_dtype(requested: str) -> str:
    """The number format of the products in training: "float32" or "bfloat16".

    Args:
      requested: one of the two, which is returned as it is, or "auto": bf16 on TPU and GPU, and on a CPU where a probe of under a second
        shows that forward and backward products of an MLP run at least `PAYS_FROM` times as fast in bf16.
    """
    if requested != "auto":
        return requested
    import jax

    if jax.default_backend() in ("tpu", "gpu"):
        return "bfloat16"
    speed_up = _seconds("float32") / _seconds("bfloat16")
    log.info("bf16 products run %.2f times as fast as float32 on this CPU", speed_up)
    return "bfloat16" if speed_up >= PAYS_FROM else "float32"


def _seconds(dtype: str) -> float:
    """Best time of one forward and backward pass through the two matrices of an MLP."""
    import jax
    import jax.numpy as jnp

    def loss(weights, x):
        hidden = jax.nn.silu(x @ weights[0].astype(dtype))
        return jnp.mean(jnp.square((hidden @ weights[1].astype(dtype)).astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    keys = jax.random.split(jax.random.key(0), 3)
    weights = (jax.random.normal(keys[0], (PROBE_D_MODEL, PROBE_D_FF)), jax.random.normal(keys[1], (PROBE_D_FF, PROBE_D_MODEL)))
    x = jax.random.normal(keys[2], (PROBE_TOKENS, PROBE_D_MODEL)).astype(dtype)
    jax.block_until_ready(gradient(weights, x))
    times = []
    for _ in range(PROBE_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(gradient(weights, x))
        times.append(time.perf_counter() - start)
    return min(times)
